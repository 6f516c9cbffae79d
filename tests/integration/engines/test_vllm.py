"""vLLM computes the tokens, in its own environment: they, and all that is said of them, are our own engine's.

Each start of vLLM takes some ten seconds, so one engine serves whatever does not end it.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from llguidance import LLMatcher
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from tests.checkpoints import CONTEXT, DECODERS, packed, save_model, save_tokenizer, tiny
from tests.engine_requests import Result, a_request, add, run, run_one, run_steps
from tests.vllm.environment import vllm_python
from tests.waiting import wait_until
from tidegate.engines.base import Engine, EngineLoadError
from tidegate.engines.create import create_engine
from tidegate.engines.vllm.engine import Blocks, VllmEngine
from tidegate.engines.vllm.process import PYTHON_VARIABLE, VllmProcess
from tidegate.engines.vllm.stepping import ENDED_WITH_REPLICA
from tidegate.messages.engine_metrics import exposition, pack
from tidegate.messages.work import Request
from tidegate.replica_args import EngineSpec, VllmArgs

PROMPT = "The gate opens when"
SLOTS = 8
HAS_PACKED_PRODUCT = torch.cpu._is_avx512_supported()
GRAMMAR = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"name": {"enum": ["low", "high"]}, "level": {"type": "integer", "maximum": 99}},
        "required": ["name", "level"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)
WARM = {"temperature": 1.3, "top_p": 0.95, "seed": 11}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 20},
    "warm": {"max_tokens": 25, "temperature": 1.3, "seed": 1},
    "narrow": {"max_tokens": 15, "temperature": 1.0, "top_p": 0.5, "top_k": 20, "min_p": 0.01},
    "penalised": {
        "max_tokens": 40,
        "presence_penalty": 1.5,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.2,
        **WARM,
    },
    "held": {"max_tokens": 40, "min_tokens": 20, "ignore_eos": False, "logit_bias": ((2, 8.0),)},
    "few": {"max_tokens": 12, "allowed_token_ids": (40, 41, 42, 43), "temperature": 1.0},
    "spared": {"max_tokens": 30, "bad_words": ("e", "t"), **WARM},
    "structured": {"max_tokens": 60, "grammar": GRAMMAR, **WARM},
    "ends": {"max_tokens": 90, "temperature": 1.5, "ignore_eos": False},
    "scored": {"max_tokens": 8, "echo": True, "top_logprobs": 3, "prompt_logprobs": 2},
    "echoed": {"max_tokens": 0, "echo": True, "top_logprobs": 0},
}


def requests(**changes: Any) -> list[Request]:
    return [a_request(name, PROMPT, **{**asked, **changes}) for name, asked in ASKED.items()]


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., VllmEngine]]:
    """Load an engine on a folder, in the environment that tests have; closed after the module."""
    patch = pytest.MonkeyPatch()
    patch.setenv(PYTHON_VARIABLE, str(vllm_python()))
    engines: list[VllmEngine] = []

    def make(folder: Path, **spec: Any) -> VllmEngine:
        args = {"threads": 1, "enforce_eager": True, **spec.pop("args", {})}
        wanted = {"precision": "float32", "device": "cpu", "kv_cache_bytes": 1 << 26, **spec}
        engine = create_engine(EngineSpec("vllm", path=str(folder), args=args, **wanted))
        assert isinstance(engine, VllmEngine)
        engines.append(engine)
        engine.load()
        return engine

    yield make
    for engine in engines:
        engine.close()
    patch.undo()


@pytest.fixture(scope="module")
def vllm(start: Callable[..., VllmEngine], checkpoints: Callable[[str], Path]) -> VllmEngine:
    return start(checkpoints("llama"), max_slots=SLOTS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pid(engine: VllmEngine) -> int:
    assert engine._process is not None
    return engine._process.pid


def said(result: Result) -> tuple[list[int], str, object]:
    """What both engines say. How much of a prompt they hold depends on the size of their blocks."""
    finish = result.finish and replace(result.finish, cached_tokens=0)
    return result.tokens, result.text, finish


def test_every_request_of_a_batch_is_answered_as_by_our_own_engine(vllm: VllmEngine, llama: Engine) -> None:
    ours = run(llama, requests())
    for batch in (requests()[:SLOTS], requests()[SLOTS:]):
        theirs = run(vllm, batch, apart=2)
        for request in batch:
            assert said(theirs[request.id]) == said(ours[request.id]), request.id
    assert len({tuple(result.tokens) for result in ours.values()}) == len(ours)


def test_log_probabilities_are_those_of_our_own_engine(vllm: VllmEngine, llama: Engine) -> None:
    for request in requests():
        if request.id not in ("scored", "echoed"):
            continue
        theirs, ours = run_one(vllm, request), run_one(llama, request)
        assert [item.token_id for item in theirs.logprobs] == [item.token_id for item in ours.logprobs]
        told = [segment.output.prompt_logprobs for segment in (theirs.log[0], ours.log[0])]
        assert [item.rank for item in told[0]] == [item.rank for item in told[1]]
        pairs = [*zip(theirs.logprobs, ours.logprobs, strict=True), *zip(*told, strict=True)]
        for one, other in pairs:
            assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-4))
            assert [(token, raw) for token, _, _, raw in one.top] == [
                (token, raw) for token, _, _, raw in other.top
            ]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_halves_and_a_small_cache(
    start: Callable[..., VllmEngine],
    checkpoints: Callable[[str], Path],
    load: Callable[..., Engine],
    precision: str,
) -> None:
    """Scores are near our own. No more is claimed than the cache has room for, nor than a step has tokens."""
    token = 2 * 2 * 2 * 32 * 2  # layers, keys and values, heads, head size, bytes
    small = {"kv_cache_bytes": 8 * 128 * token, "args": {"max_num_batched_tokens": 24}}
    engine = start(checkpoints("llama"), precision=precision, max_slots=32, **small)
    ours = run_one(load("llama", precision=precision), requests()[-1])
    theirs = run_one(engine, requests()[-1])
    for one, other in zip(theirs.logprobs, ours.logprobs, strict=True):
        assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=0.2))
    assert engine._slots <= 24
    free = []
    asked = [a_request(str(row), [5 + row] * (100 + row), max_tokens=100) for row in range(3)]
    for request in asked:
        free.append(engine.free_slots())
        add(engine, request)
    assert free == [3, 2, 1]  # seven blocks, of which each takes two
    assert engine.free_slots() == 0
    results = {request.id: Result() for request in asked}
    while engine.has_work():
        for output in engine.step():
            results[output.request_id].take(output)
    assert {len(result.tokens) for result in results.values()} == {100}
    assert engine.free_slots() == free[0]
    begun = run_steps(engine, asked[1], 30)
    assert begun.tokens + run_one(engine, asked[1], begun.log).tokens == results["1"].tokens


def test_factors_of_positions_are_those_of_the_context(
    start: Callable[..., VllmEngine], load: Callable[..., Engine], tmp_path: Path
) -> None:
    """At the length up to which a model turns by its short factors, vLLM takes those too."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 16,
        "long_factor": [40.0] * 16,
    }
    changes = {
        "rope_parameters": rope,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 256,
    }
    folder = tmp_path / "phi3"
    save_model(folder, "phi3", {**DECODERS["phi3"][1], **changes})
    save_tokenizer(folder)
    scored = a_request("r", [5 + place % 90 for place in range(60)], max_tokens=0, echo=True, top_logprobs=0)
    ours = run_one(load(folder, context_length=64), scored)
    theirs = run_one(start(folder, context_length=64), scored)
    for one, other in zip(theirs.logprobs, ours.logprobs, strict=True):
        assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-3))


def test_what_rows_take_of_blocks_that_groups_share() -> None:
    """Attention to all, to a window of four blocks, and a state."""
    blocks = Blocks(60, [(16, 1000), (16, 4), (1 << 20, 1)])
    assert [blocks.of_row(tokens) for tokens in (1, 16, 17, 64, 160)] == [3, 3, 5, 9, 15]
    assert (blocks.more([], 160), blocks.more([64, 64], 160), blocks.more([64] * 7, 1)) == (4, 2, -1)
    assert (blocks.more([160] * 4, 1), blocks.more([160] * 3, 160)) == (0, 1)


def test_a_prompt_of_the_whole_context_is_scored_and_nothing_more(vllm: VllmEngine, llama: Engine) -> None:
    full = [3 + place * 7 % 400 for place in range(CONTEXT)]
    scored = a_request("r", full, max_tokens=0, echo=True, top_logprobs=1)
    theirs, ours = run_one(vllm, scored), run_one(llama, scored)
    assert said(theirs) == said(ours)
    for one, other in zip(theirs.logprobs, ours.logprobs, strict=True):
        assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-4))
    for changes in (
        {"max_tokens": 0},
        {"max_tokens": 1},
        {"max_tokens": None},
        {"max_tokens": 0, "echo": True},
    ):
        request = a_request("r", full, **changes)
        assert said(run_one(vllm, request)) == said(run_one(llama, request)), changes
    fits = a_request("r", full[:-3], max_tokens=None)
    assert said(run_one(vllm, fits)) == said(run_one(llama, fits))
    assert len(run_one(vllm, fits).tokens) == 3


def test_what_a_tenants_prompts_begin_with_is_told_as_cached(vllm: VllmEngine) -> None:
    begin = [5 + place * 11 % 400 for place in range(140)]  # a block of vLLM's on CPUs has 128 tokens
    cached = []
    for tenant in ("one", "one", "two", "two", ""):
        request = replace(a_request("r", [*begin, 9], max_tokens=3), tenant=tenant)
        whole = run_one(vllm, request)
        assert whole.finish is not None
        cached.append(whole.finish.cached_tokens)
    assert cached == [0, 128, 0, 128, 0]
    for at_first in (0, 128):  # an attempt that goes on tells of the first one
        request = replace(a_request("r", [*begin, 9], max_tokens=3), tenant="three")
        begun = run_steps(vllm, request, 2)
        rest = run_one(vllm, request, begun.log)
        assert begun.tokens + rest.tokens == whole.tokens
        assert rest.finish is not None and rest.finish.cached_tokens == at_first
    told = run_one(
        vllm, replace(request, work=a_request("r", [*begin, 9], max_tokens=1, prompt_logprobs=1).work)
    )
    assert told.finish is not None and told.finish.cached_tokens == 0  # all of them were computed


@pytest.mark.parametrize("name", ["greedy", "warm", "penalised", "held", "spared", "structured"])
def test_a_stream_goes_on_from_its_log_wherever_it_was_cut(vllm: VllmEngine, name: str) -> None:
    request = a_request(name, PROMPT, **ASKED[name], stop=("a stop string that does not come",))
    whole = run_one(vllm, request)
    log = [segment for segment in whole.log if segment.finish is None]
    for start in range(0, len(log), SLOTS):  # as many as there are slots at once
        cuts = range(start + 1, min(start + SLOTS, len(log)) + 1)
        again = {f"{name}.{cut}": a_request(f"{name}.{cut}", PROMPT, **ASKED[name]) for cut in cuts}
        logs = {f"{name}.{cut}": log[:cut] for cut in cuts}
        results = run(vllm, list(again.values()), logs=logs)
        for cut in cuts:
            before = [token for segment in log[:cut] for token in segment.output.token_ids]
            assert before + results[f"{name}.{cut}"].tokens == whole.tokens, cut


def test_what_vllm_began_our_own_engine_ends_and_the_other_way_round(vllm: VllmEngine, llama: Engine) -> None:
    request = a_request("r", PROMPT, max_tokens=40, presence_penalty=0.5, top_logprobs=1, **WARM)
    whole = run_one(llama, request)
    for first, second in ((vllm, llama), (llama, vllm)):
        begun = run_steps(first, request, 12)
        rest = run_one(second, request, begun.log)
        assert begun.tokens + rest.tokens == whole.tokens
        assert begun.text + rest.text == whole.text


def test_a_stop_string_is_cut_and_its_tokens_count(vllm: VllmEngine) -> None:
    whole = run_one(vllm, a_request("r", PROMPT, max_tokens=40))
    stop = whole.text[12:17]
    result = run_one(vllm, a_request("r", PROMPT, max_tokens=40, stop=(stop,), top_logprobs=0))
    assert result.finish is not None
    assert (result.finish.reason, result.finish.stopped_by) == ("stop", stop)
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.finish.completion_tokens == len(result.tokens) < len(whole.tokens)
    assert [item.token_id for item in result.logprobs] == result.tokens


def test_the_metrics_of_vllm_keep_their_names(vllm: VllmEngine) -> None:
    def told(replica: str) -> str:
        labels = {"model_name": "m", "revision": "r", "replica": replica}
        return exposition([pack(vllm.own_metrics(labels))])

    def counted(text: str, name: str) -> float:
        (family,) = [one for one in text_string_to_metric_families(text) if one.name == name]
        (sample,) = [one for one in family.samples if one.name == f"{name}_total"]
        assert {**sample.labels, "engine": ""} == {
            "model_name": "m",
            "revision": "r",
            "replica": "a",
            "engine": "",
        }
        return sample.value

    before = counted(told("a"), "vllm:generation_tokens")
    run(vllm, [a_request(str(number), PROMPT, max_tokens=7) for number in range(3)])
    assert counted(told("a"), "vllm:generation_tokens") == before + 21
    several = exposition([pack(vllm.own_metrics({"replica": name})) for name in "ab"])
    assert several.count("# TYPE vllm:num_requests_running gauge\n") == 1
    assert several.count("\nvllm:num_requests_running{") == 2
    assert "python_info" not in several
    assert "vllm:time_to_first_token_seconds_bucket" in several


def test_who_is_aborted_leaves_its_slot_to_others_in_vllm_too(vllm: VllmEngine) -> None:
    for turn in range(3):
        for number in range(SLOTS):
            assert add(vllm, a_request(f"left.{turn}.{number}", PROMPT, max_tokens=200)) is None
        assert vllm.free_slots() == 0
        vllm.step()
        for number in range(SLOTS):
            vllm.abort(f"left.{turn}.{number}")
        assert vllm.free_slots() == SLOTS
    # vLLM takes as many at once as there are slots: had it kept one, these would wait for it.
    results = run(vllm, [a_request(f"r.{number}", PROMPT, max_tokens=6) for number in range(SLOTS)])
    assert all(len(result.log) == len(result.tokens) == 6 for result in results.values())
    assert not vllm.has_work()


@pytest.mark.skipif(HAS_PACKED_PRODUCT, reason="vLLM multiplies by packed weights here")
def test_packed_weights_are_refused_where_the_processor_has_no_product(
    start: Callable[..., VllmEngine], tmp_path: Path
) -> None:
    folder, _ = packed(tmp_path / "packed", tiny(tmp_path / "source", "llama"))
    with pytest.raises(EngineLoadError, match=r"without AVX-512: set engine.name to transformers") as told:
        start(folder, precision="bfloat16", quantization="gptq")
    assert told.value.reason == "UnsupportedModel"


@pytest.mark.skipif(not HAS_PACKED_PRODUCT, reason="vLLM has packed weights on processors with AVX-512")
def test_packed_weights_and_the_rules_of_a_checkpoint_and_a_killed_process(
    start: Callable[..., VllmEngine], tmp_path: Path
) -> None:
    source = tiny(tmp_path / "source", "llama")
    folder, twin = packed(tmp_path / "packed", source)
    (folder / "generation_config.json").write_text('{"no_repeat_ngram_size": 2, "eos_token_id": 2}')
    engine = start(folder, precision="bfloat16", quantization="gptq")
    request = a_request("r", PROMPT, max_tokens=30, top_logprobs=0, echo=True)
    whole = run_one(engine, request)
    grams = list(zip(whole.tokens, whole.tokens[1:], strict=False))
    assert len(grams) == len(set(grams)) == 29  # no pair of tokens comes twice
    scored = [item for item in whole.logprobs if item.logprob is not None]
    ids = torch.tensor([[item.token_id for item in whole.logprobs]])
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(ids).logits.log_softmax(-1)
    expected = plain[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1).tolist()
    difference = [abs((item.logprob or 0.0) - value) for item, value in zip(scored, expected, strict=True)]
    assert sum(difference) / len(difference) < 0.1

    begun = run_steps(engine, request, 9)
    assert add(engine, request, begun.log) is None
    engine.step()
    os.kill(pid(engine), signal.SIGKILL)
    with pytest.raises(Exception, match="its process ended with -9"):
        for _ in range(3):  # the step that was asked ahead may have come before
            engine.step()
    assert "ended with -9" in str(engine.health())
    other = start(folder, precision="bfloat16", quantization="gptq")
    assert begun.tokens + run_one(other, request, begun.log).tokens == whole.tokens

    os.kill(pid(other), signal.SIGKILL)  # with nothing to do
    wait_until(lambda: other.health() == "vLLM's process ended with -9.")


def test_the_process_ends_with_its_replica(start: Callable[..., VllmEngine]) -> None:
    process = VllmProcess(VllmArgs(threads=1))
    os.kill(process.pid, 0)
    process._lane.shutdown(socket.SHUT_RDWR)
    process._lane.close()
    assert process._process.wait(120) in (0, ENDED_WITH_REPLICA)
    assert not psutil.pid_exists(process.pid)


def test_a_checkpoint_that_vllm_does_not_serve_is_refused_with_the_reason(
    start: Callable[..., VllmEngine], tmp_path: Path
) -> None:
    with pytest.raises(EngineLoadError, match=r"with an encoder.*engine.name to transformers"):
        start(tiny(tmp_path / "t5", "t5"))
    with pytest.raises(EngineLoadError, match=r"does not serve this model.*GPTNeoFor") as told:
        start(tiny(tmp_path / "gpt_neo", "gpt_neo"))
    assert told.value.reason == "UnsupportedModel"


def test_too_little_memory_is_told(
    start: Callable[..., VllmEngine], checkpoints: Callable[[str], Path]
) -> None:
    with pytest.raises(EngineLoadError, match="vLLM has too little memory") as told:
        start(checkpoints("llama"), kv_cache_bytes=1 << 17)  # half of what one full context takes
    assert told.value.reason == "OutOfMemory"


def test_without_vllm_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[[str], Path]
) -> None:
    spec = EngineSpec("vllm", path=str(checkpoints("llama")), precision="float32")
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(EngineLoadError, match=f"vLLM is not installed here.*{PYTHON_VARIABLE}"):
        create_engine(spec).load()
    monkeypatch.setenv(PYTHON_VARIABLE, str(checkpoints("llama") / "config.json"))
    with pytest.raises(EngineLoadError, match=f"{PYTHON_VARIABLE} names .* no program"):
        create_engine(spec).load()


def test_wrong_arguments_are_refused_before_anything_starts() -> None:
    for args, said in (
        ({"tensor_parallel_size": 2}, "no tensor_parallel_size; known: threads, enforce_eager"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
    ):
        with pytest.raises(EngineLoadError, match=said) as told:
            create_engine(EngineSpec("vllm", path="/nowhere", args=args))
        assert told.value.reason == "InvalidEngineArgs"

"""Every decoder architecture: batches that rows join and leave give what `generate` gives for each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import DECODERS, EOS
from tests.engine_requests import Result, a_request, run, run_one, run_steps
from tidegate.engines.base import Engine

PROMPTS = (
    "The tide",
    "The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak for a while",
    "x",
    "Counting: 1, 2, 3, 4",
)
LENGTHS = (30, 8, 40, 16)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def generate(folder: Path, prompt: str, length: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    out = model.generate(
        **{name: ids[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
    )
    return [int(token) for token in out[0, ids["input_ids"].shape[1] :]]


@pytest.mark.parametrize("arch", sorted(DECODERS))
def test_rows_that_join_and_leave_equal_generate(
    arch: str, load: Callable[..., Engine], checkpoints: Callable[[str], Path]
) -> None:
    engine = load(arch)
    requests = [
        a_request(str(index), prompt, max_tokens=length)
        for index, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    results = run(engine, requests, apart=5)
    for index, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        assert results[str(index)].tokens == generate(checkpoints(arch), prompt, length)
    assert engine.free_slots() > 0
    assert not engine.has_work()


@pytest.mark.parametrize("arch", sorted(DECODERS))
def test_a_sampled_stream_continued_elsewhere_equals_the_undisturbed_one(
    arch: str, load: Callable[..., Engine]
) -> None:
    engine = load(arch)
    request = a_request("r", PROMPTS[0], temperature=0.9, top_p=0.95, frequency_penalty=0.4, max_tokens=24)
    whole = run_one(engine, request)
    begun = run_steps(engine, request, 9)
    rest = run_one(engine, request, begun.log)
    assert len(begun.tokens) == 9
    assert begun.tokens + rest.tokens == whole.tokens
    assert begun.text + rest.text == whole.text
    assert rest.finish == whole.finish


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_loads_and_generates(precision: str, load: Callable[..., Engine]) -> None:
    """Loading proves the batch within the precision's tolerance; here it has to run as well."""
    results = run(
        load("llama", precision=precision), [a_request(p, p, max_tokens=9) for p in PROMPTS], apart=2
    )
    assert all(len(result.tokens) == 9 for result in results.values())


def test_the_context_ends_a_request_at_its_last_position(llama: Engine) -> None:
    result: Result = run_one(llama, a_request("r", [5] * 250))
    assert result.finish is not None
    assert (result.finish.reason, len(result.tokens)) == ("length", 6)


def test_the_end_token_ends_an_answer_without_text(
    load: Callable[..., Engine], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """A model whose head always prefers the end token."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints("gpt_neox"), dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[EOS] = 1e-3
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.gpt_neox.final_layer_norm.bias.fill_(1.0)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoints("gpt_neox")).save_pretrained(tmp_path)
    result = run_one(load(tmp_path), a_request("r", "x", ignore_eos=False, max_tokens=9))
    assert result.finish is not None
    assert (result.tokens, result.text, result.finish.reason) == ([EOS], "", "stop")
    assert result.finish.completion_tokens == 1

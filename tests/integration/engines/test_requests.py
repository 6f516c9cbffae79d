"""What one request may ask for, in a batch where each asks for something else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import tiny
from tests.engine_requests import a_request, add, run, run_one, run_steps
from tidegate.engines.base import Engine
from tidegate.messages.work import Segment

PROMPT = "The gate opens when"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_each_request_of_a_batch_has_its_own_parameters(llama: Engine) -> None:
    requests = [
        a_request("greedy", PROMPT, max_tokens=20),
        a_request("warm", PROMPT, max_tokens=25, temperature=1.3, seed=1),
        a_request("other seed", PROMPT, max_tokens=25, temperature=1.3, seed=2),
        a_request("narrow", PROMPT, max_tokens=15, temperature=1.0, top_p=0.01),
        a_request("penalised", PROMPT, max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0),
        a_request("with logprobs", PROMPT, max_tokens=10, top_logprobs=3),
    ]
    together = run(llama, requests, apart=2)
    for request in requests:
        assert together[request.id].tokens == run_one(llama, request).tokens, request.id
    assert together["warm"].tokens != together["other seed"].tokens
    assert together["narrow"].tokens == together["greedy"].tokens[:15]
    assert len(set(together["penalised"].tokens)) > len(set(together["greedy"].tokens))


def test_logprobs_are_those_of_the_models_plain_forward_pass(
    llama: Engine, checkpoints: Callable[[str], Path]
) -> None:
    result = run_one(llama, a_request("r", PROMPT, max_tokens=6, echo=True, top_logprobs=2))
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(checkpoints("llama"))(PROMPT)["input_ids"]
    tokens = prompt + result.tokens
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)
    assert result.text.startswith(PROMPT)
    assert [item.token_id for item in result.logprobs] == tokens
    assert result.logprobs[0].logprob is None
    for place, item in enumerate(result.logprobs[1:]):
        assert item.logprob is not None
        assert math.isclose(item.logprob, float(expected[place, tokens[place + 1]]), abs_tol=1e-4)
        assert [other for other, *_ in item.top] == expected[place].topk(2).indices.tolist()
    assert b"".join(item.raw for item in result.logprobs).decode(errors="replace").startswith(PROMPT)


def test_echo_without_tokens_gives_the_prompt_and_its_logprobs(llama: Engine) -> None:
    scored = run_one(llama, a_request("r", PROMPT, max_tokens=0, echo=True, top_logprobs=0))
    plain = run_one(llama, a_request("r", PROMPT, max_tokens=0, echo=True))
    assert (scored.text, scored.tokens, plain.text, plain.tokens) == (PROMPT, [], PROMPT, [])
    assert len(scored.logprobs) == scored.prompt_tokens
    assert scored.finish is not None
    assert scored.finish.completion_tokens == 0


def test_a_stop_string_is_cut_and_its_tokens_count(llama: Engine) -> None:
    whole = run_one(llama, a_request("r", PROMPT, max_tokens=40))
    stop = whole.text[12:17]
    result = run_one(llama, a_request("r", PROMPT, max_tokens=40, stop=(stop,), top_logprobs=0))
    assert result.finish is not None
    assert result.finish.reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.finish.completion_tokens == len(result.tokens) < len(whole.tokens)
    assert [item.token_id for item in result.logprobs] == result.tokens


@pytest.mark.parametrize("steps", range(1, 12, 2))
def test_stop_strings_and_logprobs_survive_a_continuation(llama: Engine, steps: int) -> None:
    text = run_one(llama, a_request("r", PROMPT, max_tokens=30)).text
    # A stop string that the text nearly completes holds text (and log probabilities) back across the cut.
    request = a_request("r", PROMPT, max_tokens=14, stop=(text[:9] + "\0", text[4:14] + "\0"), top_logprobs=2)
    whole = run_one(llama, request)
    begun = run_steps(llama, request, steps)
    rest = run_one(llama, request, begun.log)
    assert begun.tokens + rest.tokens == whole.tokens
    assert begun.text + rest.text == whole.text
    assert [item.token_id for item in begun.logprobs + rest.logprobs] == whole.tokens
    for found, expected in zip(begun.logprobs + rest.logprobs, whole.logprobs, strict=True):
        assert found.logprob is not None and expected.logprob is not None
        assert math.isclose(found.logprob, expected.logprob, abs_tol=1e-4)


def test_a_log_that_is_complete_finishes_at_once(llama: Engine) -> None:
    request = a_request("r", PROMPT, max_tokens=5)
    done = run_one(llama, request)
    output = add(llama, request, done.log)
    assert output is not None
    assert (output.finish, output.output.token_ids) == (done.finish, [])
    assert not llama.has_work()


def test_abort_frees_the_slot_and_disturbs_nobody(llama: Engine) -> None:
    free = llama.free_slots()
    alone = run_one(llama, a_request("stays", PROMPT, max_tokens=20))
    for name in ("goes", "stays", "never starts"):
        assert add(llama, a_request(name, PROMPT if name == "stays" else "another", max_tokens=20)) is None
    llama.abort("never starts")
    tokens: list[int] = []
    for step in range(20):
        tokens += [
            token for out in llama.step() if out.request_id == "stays" for token in out.output.token_ids
        ]
        if step == 4:
            llama.abort("goes")
            assert llama.free_slots() == free - 1
    assert tokens == alone.tokens
    assert (llama.free_slots(), llama.has_work()) == (free, False)


def test_a_request_starts_at_the_step_after_its_arrival(llama: Engine) -> None:
    add(llama, a_request("first", PROMPT, max_tokens=8))
    llama.step()
    add(llama, a_request("second", "another one", max_tokens=3))
    assert {output.request_id for output in llama.step()} == {"first", "second"}
    llama.abort("first")
    llama.abort("second")


def test_chat_messages_go_through_the_checkpoints_template(llama: Engine) -> None:
    rendered = "<s>[user] hello\n[assistant] "
    chat = run_one(llama, a_request("c", [{"role": "user", "content": "hello"}], max_tokens=5))
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    in_parts = run_one(llama, a_request("p", parts, max_tokens=5))
    text = run_one(llama, a_request("t", rendered, max_tokens=5))
    assert chat.tokens == in_parts.tokens == text.tokens
    assert chat.prompt_tokens == text.prompt_tokens


def test_a_prompt_that_cannot_run_is_refused_alone(llama: Engine) -> None:
    outside = run_one(llama, a_request("r", [1, 512]))
    too_long = run_one(llama, a_request("r", [1] * 300))
    bad_chat = run_one(llama, a_request("r", [{"content": "no role"}], max_tokens=3))
    assert outside.finish is not None and too_long.finish is not None
    assert (outside.finish.code, outside.finish.message) == (
        "InvalidPrompt",
        "Token id 512 is outside the vocabulary of 512 tokens.",
    )
    assert too_long.finish.code == "ContextLengthExceeded"
    assert "300 tokens" in too_long.finish.message
    assert bad_chat.finish is not None
    assert not llama.has_work()


def test_a_missing_chat_template_is_named(load: Callable[..., Engine], tmp_path: Path) -> None:
    engine = load(tiny(tmp_path / "gpt2", "gpt2", with_template=False))
    refused = run_one(engine, a_request("r", [{"role": "user", "content": "hello"}])).finish
    assert refused is not None
    assert refused.code == "InvalidPrompt"
    assert "no chat template" in refused.message
    assert "spec.chatTemplate" in refused.message


def test_characters_are_never_broken(llama: Engine) -> None:
    """A random model's bytes are mostly no characters: what comes out is whole, and all of it in the end."""
    result = run_one(llama, a_request("r", "潮汐 🌊", max_tokens=60, temperature=1.5, top_logprobs=0))
    raw = b"".join(item.raw for item in result.logprobs)
    expected = raw.decode(errors="replace")
    assert expected in (result.text, result.text + "\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("cut", range(1, 10))
@pytest.mark.parametrize("echo", [False, True])
def test_an_answer_goes_on_inside_a_character_of_the_prompt(
    llama: Engine, checkpoints: Callable[[str], Path], cut: int, echo: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints("llama"))
    tokens = tokenizer("tide 潮汐 🌊")["input_ids"]
    begun, rest = tokens[:-cut], tokens[-cut:]
    log: list[Segment] = []
    whole = "" if echo else tokenizer.decode(begun).rstrip("\ufffd")
    for number, token in enumerate(rest):
        request = a_request("r", begun, max_tokens=99, echo=echo, logit_bias=((token, 100.0),))
        result = run_steps(llama, request, 1, log)
        whole += result.text
        log.append(Segment("r", number, None, result.log[0].output, len(begun)))
        assert result.tokens == [token]
    assert whole == "tide 潮汐 🌊"


def test_more_requests_than_fit_one_prefill_join_over_several_steps(load: Callable[..., Engine]) -> None:
    engine = load("llama", args={"prefill_tokens_per_step": 10})
    for index in range(4):
        add(engine, a_request(str(index), [5, 6, 7, 8], max_tokens=4))
    assert [len(engine.step()) for _ in range(2)] == [2, 4]


def test_token_ids_end_an_answer_but_not_before_min_tokens(llama: Engine) -> None:
    whole = run_one(llama, a_request("r", PROMPT, max_tokens=12))
    end = whole.tokens[2]
    first = whole.tokens.index(end)
    ended = run_one(llama, a_request("r", PROMPT, max_tokens=12, stop_token_ids=(end,)))
    assert ended.tokens == whole.tokens[: first + 1]
    assert ended.finish is not None and ended.finish.reason == "stop"
    later = run_one(llama, a_request("r", PROMPT, max_tokens=12, stop_token_ids=(end,), min_tokens=12))
    assert len(later.tokens) == 12 and end not in later.tokens
    # Another replica goes on as if never interrupted.
    asked = a_request("r", PROMPT, max_tokens=12, repetition_penalty=1.5, stop_token_ids=(end,), min_tokens=9)
    begun = run_steps(llama, asked, 5)
    assert begun.tokens + run_one(llama, asked, begun.log).tokens == run_one(llama, asked).tokens


def test_token_ids_outside_the_vocabulary_are_named(llama: Engine) -> None:
    for name, value in (("logit_bias", ((10**6, 1.0),)), ("stop_token_ids", (10**6,))):
        finish = run_one(llama, a_request("r", PROMPT, **{name: value})).finish
        assert finish is not None and finish.code == "InvalidPrompt"
        assert finish.message.startswith(f"{name}: token id 1000000 is outside the vocabulary")

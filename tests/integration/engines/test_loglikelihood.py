"""Log-likelihoods as evaluation suites ask for them: every token that counts has its entry."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine_requests import a_request, run, run_one
from tidegate import demo
from tidegate.engines.base import Engine
from tidegate.gateway.calls import build_requests
from tidegate.gateway.dialects.base import AnswerHead, count_usage
from tidegate.gateway.dialects.completions import Completions
from tidegate.messages.registry import Key

HEAD = AnswerHead("cmpl-1", 5, "m", "r1")
DEMO = Path(demo.__file__).with_name("weights") / "tide-demo"
QUESTIONS = [
    (f"Question {n}: is the gate open at {n} o'clock?", " yes, it is" * (n % 3 + 1)) for n in range(20)
]


@pytest.fixture(scope="module")
def ends_often(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which half of all tokens end the answer."""
    folder = Path(shutil.copytree(checkpoints("llama"), tmp_path_factory.mktemp("ends") / "llama"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"eos_token_id": list(range(2, 512, 2))})
    )
    return folder


def complete(engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
    """Take a body through dialect and engine, as gateway and replica do."""
    call = Completions().read(json.dumps({"model": "m", **body}).encode())
    requests = build_requests(
        call, HEAD, key=Key("k", "k", "t", 0.0), gateway="g", created=0.0, deadline=1e12, random_seed=1
    )
    results = run(engine, requests)
    finishes = [results[request.id].finish for request in requests]
    assert all(finish is not None and finish.reason in ("stop", "length") for finish in finishes)
    usage = count_usage([finish for finish in finishes if finish is not None], call.n)
    answer: dict[str, Any] = json.loads(
        call.answer(HEAD, [results[request.id].log for request in requests], usage)
    )
    return answer


def lm_eval_score(choice: dict[str, Any], context: int, last: int | None) -> tuple[float, bool]:
    """As lm-eval's `local-completions` reads a choice: from the end of the context to `last`."""
    chosen = choice["logprobs"]["token_logprobs"][context:last]
    top = choice["logprobs"]["top_logprobs"][context:last]
    return sum(chosen), all(value == max(best.values()) for value, best in zip(chosen, top, strict=True))


def plain_score(model: Any, tokens: Sequence[int], context: int) -> tuple[float, bool]:
    with torch.inference_mode():
        logits = torch.log_softmax(model(torch.tensor([tokens])).logits[0, context - 1 : -1], -1)
    answer = torch.tensor(tokens[context:])
    return float(logits.gather(1, answer[:, None]).sum()), bool((logits.argmax(-1) == answer).all())


@pytest.mark.parametrize("which", ["demo", "ends often"])
@pytest.mark.parametrize(("max_tokens", "last"), [(1, -1), (0, None)], ids=["newer", "older"])
def test_the_log_likelihood_of_answers_is_that_of_transformers(
    load: Callable[..., Engine], ends_often: Path, which: str, max_tokens: int, last: int | None
) -> None:
    folder = DEMO if which == "demo" else ends_often
    engine = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n" if which == "demo" else "{}"
    contexts = [tokenizer(asked.format(question))["input_ids"] for question, _ in QUESTIONS]
    answers = [tokenizer(answer)["input_ids"] for _, answer in QUESTIONS]
    for index in range(0, 20, 4):  # what the model itself would say is greedy
        said = run_one(engine, a_request("r", contexts[index], max_tokens=40)).tokens
        end = said.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in said else 3
        answers[index] = said[:end]
    prompts = [context + answer for context, answer in zip(contexts, answers, strict=True)]
    body = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    answer = complete(engine, {"prompt": prompts, **body})
    seen = set()
    for choice, prompt, context in zip(answer["choices"], prompts, map(len, contexts), strict=True):
        value, is_greedy = lm_eval_score(choice, context, last)
        expected, expected_greedy = plain_score(model, prompt, context)
        assert math.isclose(value, expected, abs_tol=1e-3)
        assert is_greedy == expected_greedy
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + max_tokens
        seen.add((is_greedy, choice["finish_reason"]))
    assert {greedy for greedy, _ in seen} == {True, False}
    assert {reason for _, reason in seen} == ({"stop", "length"} if max_tokens else {"length"})


@pytest.mark.parametrize("ending", ["end token", "stop token", "stop string", "length"])
@pytest.mark.parametrize("echo", [False, True])
def test_every_token_that_counts_has_its_log_probability(
    load: Callable[..., Engine], ends_often: Path, llama: Engine, ending: str, echo: bool
) -> None:
    prompt = "The gate opens when"
    whole = run_one(llama, a_request("r", prompt, max_tokens=12))
    endings: dict[str, dict[str, Any]] = {
        "stop token": {"stop_token_ids": [whole.tokens[3]]},
        "stop string": {"stop": [whole.text[5:8]]},
    }
    engine = load(ends_often) if ending == "end token" else llama
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 2, "echo": echo}
    answer = complete(engine, {**body, "ignore_eos": ending == "length", **endings.get(ending, {})})
    [choice] = answer["choices"]
    usage = answer["usage"]
    counted = usage["completion_tokens"] + (usage["prompt_tokens"] if echo else 0)
    for parallel in choice["logprobs"].values():
        assert len(parallel) == counted
    assert choice["finish_reason"] == ("length" if ending == "length" else "stop")
    assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])


def test_every_choice_of_every_prompt_repeats_with_its_seed(llama: Engine) -> None:
    body = {"prompt": ["The gate", "another", "The gate"], "n": 2, "max_tokens": 12, "temperature": 1.5}

    def texts(seed: int | None) -> list[str]:
        return [choice["text"] for choice in complete(llama, {**body, "seed": seed})["choices"]]

    first = texts(5)
    assert first == texts(5)
    assert first[:2] == first[4:]
    assert len(set(first[:4])) == 4
    assert len(set(texts(None))) == 6

"""A checkpoint without a chat template, and the one that its Model gives it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import tiny
from tests.engine_requests import a_request, run_one, run_steps
from tidegate.engines.base import Engine
from tidegate.engines.create import create_engine
from tidegate.engines.transformers.prompt_pool import PromptPool
from tidegate.engines.transformers.prompt_process import Task
from tidegate.engines.transformers.tokenizer import load_tokenizer
from tidegate.replica_args import EngineSpec

QUESTION = [{"role": "user", "content": "When does the gate open?"}]
BROKEN = {
    "{% if %}": "line 1: ",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "took more than 2 s",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("bare") / "llama", "llama", with_template=False)


@pytest.fixture(scope="module")
def vicuna(bare: Path) -> Iterator[Engine]:
    engine = create_engine(
        EngineSpec(
            "transformers",
            path=str(bare),
            precision="float32",
            device="cpu",
            args={"threads": 1},
            chat_template="vicuna-0",
        )
    )
    assert engine.load().notes == ()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mark(bare: Path) -> int:
    """The token whose third in a row is the format's stop string."""
    [token] = load_tokenizer(bare)("#")["input_ids"]
    return int(token)


def test_a_chat_ends_at_the_stop_string_of_its_format(vicuna: Engine, mark: int) -> None:
    asked = {"max_tokens": 9, "allowed_token_ids": (mark,), "ignore_eos": False}
    ended = run_one(vicuna, a_request("r", QUESTION, **asked))
    assert ended.finish is not None
    assert (ended.text, ended.tokens, ended.finish.reason) == ("", [mark] * 3, "stop")
    shown = run_one(vicuna, a_request("r", QUESTION, **asked, stop=("##",), includes_stop=True))
    assert (shown.text, len(shown.tokens)) == ("##", 2)
    for other in (
        a_request("r", QUESTION, **{**asked, "ignore_eos": True}),
        a_request("r", "When", **asked),
    ):
        assert run_one(vicuna, other).text == "#" * 9


def test_a_continued_chat_keeps_the_stops_of_its_format(vicuna: Engine, mark: int) -> None:
    request = a_request("r", QUESTION, max_tokens=9, allowed_token_ids=(mark,), ignore_eos=False)
    begun = run_steps(vicuna, request, 2)
    assert begun.text == ""
    rest = run_one(vicuna, request, begun.log)
    assert rest.finish is not None
    assert (rest.text, rest.tokens, rest.finish.reason) == ("", [mark], "stop")


def test_the_prompt_is_that_of_the_format(vicuna: Engine) -> None:
    tokenizer = vicuna._language._tokenizer  # type: ignore[attr-defined]
    form = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert form.endswith("\n### Human: When does the gate open?\n### Assistant:")
    chat = run_one(vicuna, a_request("r", QUESTION, max_tokens=4))
    text = run_one(vicuna, a_request("r", form, max_tokens=4))
    assert (chat.tokens, chat.prompt_tokens) == (text.tokens, text.prompt_tokens)


@pytest.mark.parametrize("template", BROKEN, ids=["syntax", "loop"])
def test_a_broken_template_of_a_model_is_noted_at_load_and_refuses_chat(bare: Path, template: str) -> None:
    pool = PromptPool(bare, 256, template)
    try:
        [note] = pool.wait_ready(512)
        assert BROKEN[template] in note
        assert "spec.chatTemplate" in note
        reply = asyncio.run(pool.prepare(Task("tiny", a_request("r", QUESTION).work, 512)))
    finally:
        pool.close()
    assert reply.finish is not None
    assert reply.finish.code in ("ChatTemplateInvalid", "PromptTooCostly")

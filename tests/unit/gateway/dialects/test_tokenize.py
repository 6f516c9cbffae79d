"""Prompts as tokens and tokens as text, without a model: what is asked, and how it is answered."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.errors import InvalidRequest
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.tokenize import DetokenizeDialect, TokenizeDialect
from tidegate.messages.work import (
    ChatPrompt,
    Detokenize,
    Segment,
    TextPrompt,
    Tokenize,
    TokenLogprob,
    TokenPrompt,
    Tokens,
)

HEAD = AnswerHead("tok-1", 5, "m", "r1", context_length=512)
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
MESSAGES = [{"role": "user", "content": "hi"}]


def asked(**fields: Any) -> Any:
    [ask] = TokenizeDialect().read(orjson.dumps(fields)).asks(7)
    return ask.work


@pytest.mark.parametrize(
    ("fields", "work"),
    [
        ({"prompt": "hi"}, Tokenize(TextPrompt("hi"))),
        ({"prompt": ""}, Tokenize(TextPrompt(""))),
        (
            {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True},
            Tokenize(TextPrompt("hi", add_special_tokens=False), has_strings=True),
        ),
        ({"messages": MESSAGES}, Tokenize(ChatPrompt(MESSAGES))),
        (
            {"messages": MESSAGES, "tools": [TOOL]},
            Tokenize(ChatPrompt(MESSAGES, tools=[TOOL], tool_choice="auto")),
        ),
        (
            {"messages": MESSAGES, "continue_final_message": True, "chat_template_kwargs": {"a": 1}},
            Tokenize(
                ChatPrompt(
                    MESSAGES,
                    add_generation_prompt=False,
                    continue_final_message=True,
                    template_args={"a": 1},
                )
            ),
        ),
    ],
)
def test_a_prompt_of_either_form(fields: dict[str, Any], work: Tokenize) -> None:
    assert asked(model="m", **fields) == work


@pytest.mark.parametrize("has_strings", [True, False])
def test_the_answer_is_vllms(has_strings: bool) -> None:
    call = TokenizeDialect().read(orjson.dumps({"prompt": "x", "return_token_strs": has_strings}))
    entries = [TokenLogprob(4, "▁a", None, b""), TokenLogprob(7, "<0x0A>", None, b"")]
    output = Tokens(prompt_ids=[4, 7], prompt_logprobs=entries if has_strings else [])
    answer = orjson.loads(call.answer(HEAD, [[Segment("x.0", 0, output=output)]], Usage(0, 0, 0)))
    assert answer == {
        "count": 2,
        "max_model_len": 512,
        "tokens": [4, 7],
        "token_strs": ["▁a", "<0x0A>"] if has_strings else None,
    }


def test_tokens_as_text() -> None:
    call = DetokenizeDialect().read(orjson.dumps({"model": "m", "tokens": [1, 2]}))
    [ask] = call.asks(7)
    assert ask.work == Detokenize(TokenPrompt([1, 2]))
    segments = [Segment("x.0", 0, output=Tokens(text="<s> hi"))]
    assert orjson.loads(call.answer(HEAD, [segments], Usage(0, 0, 0))) == {"prompt": "<s> hi"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": MESSAGES}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt": "x" * ((1 << 20) + 1)}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "bot"}]}, "messages[0].role"),
        ({"prompt": "x", "chat_template": "{{ x }}"}, "chat_template"),
        (
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ({"prompt": "x", "stream": True}, "stream"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        TokenizeDialect().read(orjson.dumps(fields))
    assert refused.value.param == param


@pytest.mark.parametrize("tokens", [None, "x", [-1], [1 << 31], ["a"], [0] * ((1 << 18) + 1)])
def test_what_are_no_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        DetokenizeDialect().read(orjson.dumps({"tokens": tokens}))
    assert (refused.value.param or "").startswith("tokens")

"""`POST /tokenize` and `POST /detokenize`, as vLLM's: a prompt as its tokens, and tokens as their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, NoReturn

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import BodyReader, RequestBody, Rule, refusal, says
from tidegate.gateway.dialects.base import AnswerHead, Ask, Free, Usage
from tidegate.gateway.dialects.chat import (
    MESSAGES,
    ONE_END,
    TEMPLATE_ARGS,
    Messages,
    OtherTemplate,
    TemplateArgs,
    chat_messages,
    chat_prompt,
)
from tidegate.gateway.dialects.openai import Flag, VocabularyId, encode, whole_text
from tidegate.gateway.dialects.tools import Tools, asked_tools
from tidegate.gateway.dialects.wire import OPENAI
from tidegate.messages.work import Detokenize, Prompt, Segment, TextPrompt, Tokenize, TokenPrompt

MOST_CHARACTERS = 1 << 20
MOST_TOKENS = 1 << 18
ModelOrNone = Annotated[
    Annotated[str, Meta(min_length=1, max_length=256)] | None,
    says("the name of a model that GET /v1/models lists; may be left out where there is one"),
]


def _check_prompt(body: TokenizeBody) -> None:
    if (body.prompt is None) == (body.messages is None):
        found = "neither" if body.prompt is None else "both"
        raise refusal("prompt", found, "send either prompt or messages")


_ONE_PROMPT = Rule(
    _check_prompt,
    {
        "anyOf": [
            {
                "required": [one],
                "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}},
            }
            for one, other in (("prompt", "messages"), ("messages", "prompt"))
        ]
    },
)


class TokenizeBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /tokenize`: either `prompt` or `messages`."""

    RULES: ClassVar[tuple[Rule, ...]] = (_ONE_PROMPT, ONE_END, TEMPLATE_ARGS)

    model: ModelOrNone = None
    prompt: Annotated[
        Annotated[str, Meta(max_length=MOST_CHARACTERS)] | None,
        says(f"a text of at most {MOST_CHARACTERS} characters"),
    ] = None
    messages: Annotated[Messages | None, says(MESSAGES)] = None
    tools: Tools = None
    add_special_tokens: Flag = None
    return_token_strs: Flag = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    chat_template: OtherTemplate = None
    chat_template_kwargs: TemplateArgs = None


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /detokenize`."""

    model: ModelOrNone = None
    tokens: Annotated[
        Annotated[list[VocabularyId], Meta(max_length=MOST_TOKENS)],
        says(f"a list of at most {MOST_TOKENS} token ids"),
    ]


class Detokenized(msgspec.Struct):
    prompt: str


class TokenizeDialect:
    path = "/tokenize"
    task = ""
    id_prefix = "tok-"
    may_stream = False
    wire = OPENAI
    operation_id, summary = "tokenize", "Show a prompt as the model's tokens"
    body, answer = TokenizeBody, Tokenized
    answer_description = "The tokens"
    _reader = BodyReader(TokenizeBody)

    def read(self, raw: bytes) -> TokenizeCall:
        return TokenizeCall(self._reader.read(raw))


class DetokenizeDialect:
    path = "/detokenize"
    task = ""
    id_prefix = "detok-"
    may_stream = False
    wire = OPENAI
    operation_id, summary = "detokenize", "Show the text of the model's tokens"
    body, answer = DetokenizeBody, Detokenized
    answer_description = "The text"
    _reader = BodyReader(DetokenizeBody)

    def read(self, raw: bytes) -> DetokenizeCall:
        return DetokenizeCall(self._reader.read(raw))


class _WholeAnswer(Free):
    """A call of one sequence, which the tokenizer alone answers."""

    n = 1
    is_streamed = False
    user = ""

    def events(self, head: AnswerHead) -> NoReturn:
        raise AssertionError(f"{head.call_id} is not streamed")


class TokenizeCall(_WholeAnswer):
    def __init__(self, body: TokenizeBody) -> None:
        self.model = body.model or ""
        self.prompt_field = "prompt" if body.messages is None else "messages"
        self._has_strings = bool(body.return_token_strs)
        self._prompt: Prompt
        if body.messages is None:
            self._prompt = TextPrompt(body.prompt or "", body.add_special_tokens is not False)
        else:
            args = body.chat_template_kwargs or {}
            tools = asked_tools(body.tools or (), None, None)
            self._prompt = chat_prompt(body, chat_messages(body.messages), args, tools)

    def asks(self, random_seed: int) -> list[Ask]:  # noqa: ARG002 - nothing is drawn
        # The prompt may be large, and the call lives as long as its answer.
        prompt, self._prompt = self._prompt, TextPrompt("")
        return [Ask(Tokenize(prompt, self._has_strings), cost=1)]

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        output = choices[0][-1].output
        strings = [entry.token for entry in output.prompt_logprobs] if self._has_strings else None
        ids = output.prompt_ids
        return encode(Tokenized(len(ids), head.context_length, ids, strings))


class DetokenizeCall(_WholeAnswer):
    prompt_field = "tokens"

    def __init__(self, body: DetokenizeBody) -> None:
        self.model = body.model or ""
        self._tokens = TokenPrompt(body.tokens)

    def asks(self, random_seed: int) -> list[Ask]:  # noqa: ARG002 - nothing is drawn
        return [Ask(Detokenize(self._tokens), cost=1)]

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        return encode(Detokenized(whole_text(choices[0])))

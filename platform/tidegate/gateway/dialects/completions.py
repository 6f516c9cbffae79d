"""`POST /v1/completions`."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import BodyReader, Rule, documented, not_honoured, refusal, says
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.openai import (
    MAX_TOKEN_ID,
    MAX_TOKENS,
    Chunks,
    FinishReason,
    Flag,
    TextBody,
    TextCall,
    VocabularyId,
    all_logprobs,
    encode,
    finish_reason,
    finite,
    whole_text,
)
from tidegate.gateway.sse import text_json
from tidegate.messages.work import Prompt, Segment, TextPrompt, TokenLogprob, TokenPrompt

MAX_SEQUENCES = 1024  # prompts x n of one call
DEFAULT_MAX_TOKENS = 16  # OpenAI's default
PROMPT = "a text, a list of texts, a list of token ids, or a list of lists of token ids"
_utf8 = codecs.getincrementaldecoder("utf-8")
_TOKEN_IDS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
}
_PROMPT_FORMS = [
    {"type": "string"},
    {"type": "array", "minItems": 1, "items": {"type": "string"}},
    _TOKEN_IDS,
    {"type": "array", "minItems": 1, "items": _TOKEN_IDS},
]


def _check_echo(body: CompletionBody) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise refusal("max_tokens", 0, "0 is for echo: true only; use 1 or more")


_ZERO_NEEDS_ECHO = Rule(
    _check_echo,
    {
        "anyOf": [
            {"properties": {"max_tokens": {"anyOf": [{"type": "null"}, {"minimum": 1}]}}},
            {"properties": {"echo": {"const": True}}, "required": ["echo"]},
        ]
    },
)


class CompletionBody(TextBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`. `prompt`: a text, texts, token ids, or lists of token ids."""

    RULES: ClassVar[tuple[Rule, ...]] = (*TextBody.RULES, _ZERO_NEEDS_ECHO)

    prompt: Annotated[
        str | Annotated[list[str | VocabularyId | list[VocabularyId]], Meta(min_length=1)],
        documented(PROMPT, {"anyOf": _PROMPT_FORMS}),
    ]
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None, says("a whole number of tokens to generate at most")
    ] = None
    logprobs: Annotated[Annotated[int, Meta(ge=0, le=5)] | None, says("a whole number from 0 to 5")] = None
    echo: Flag = None
    best_of: Annotated[Any, not_honoured("choices are not ranked; use n and choose yourself", 1)] = None
    add_special_tokens: Annotated[
        Any, not_honoured("the tokenizer decides; send token ids instead, or leave it out", True)
    ] = None
    suffix: Annotated[Any, not_honoured("insertion is not supported; leave it out", "")] = None


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one entry a token. `text_offset` counts characters from the start of `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class Completions:
    path = "/v1/completions"
    id_prefix = "cmpl-"
    prompt_field = "prompt"
    operation_id, summary = "create_completion", "Continue a text"
    body, answer = CompletionBody, Completion
    answer_description = "The continuation, or its events where stream is true"
    _reader = BodyReader(CompletionBody)

    def read(self, raw: bytes) -> CompletionCall:
        return CompletionCall(self._reader.read(raw))


class CompletionCall(TextCall):
    __slots__ = ("_choices",)
    answer_type, answer_object = Completion, "text_completion"

    def __init__(self, body: CompletionBody) -> None:
        prompts = prompt_list(body.prompt)
        self._choices = len(prompts) * (body.n or 1)
        if self._choices > MAX_SEQUENCES:
            raise refusal(
                "prompt" if len(prompts) > (body.n or 1) else "n",
                self._choices,
                f"prompts x n is at most {MAX_SEQUENCES}; send several calls",
            )
        super().__init__(
            body,
            prompts,
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            top_logprobs=body.logprobs,
            echo=bool(body.echo),
        )

    def events(self, head: AnswerHead) -> CompletionEvents:
        return CompletionEvents(head, has_usage=self.has_usage, top=self.top_logprobs, choices=self._choices)

    def choice(self, index: int, segments: Sequence[Segment]) -> CompletionChoice:
        top = self.top_logprobs
        logprobs = None if top is None else TextOffsets().logprobs(all_logprobs(segments), top)
        return CompletionChoice(index, whole_text(segments), logprobs, finish_reason(segments[-1].finish))


class CompletionEvents(Chunks):
    """`text_completion` chunks; the last one of a choice carries its finish reason."""

    __slots__ = ("_offsets", "_top")

    def __init__(self, head: AnswerHead, *, has_usage: bool, top: int | None, choices: int) -> None:
        super().__init__(head, b"text_completion", has_usage=has_usage)
        self._top = top
        self._offsets = [TextOffsets() for _ in range(choices if top is not None else 0)]

    def render(self, index: int, segment: Segment) -> bytes:
        finish = segment.finish
        output = segment.output
        if not output.text and not output.logprobs and finish is None:
            return b""
        logprobs = b"null"
        if self._top is not None and output.logprobs:
            logprobs = encode(self._offsets[index].logprobs(output.logprobs, self._top))
        reason = b"null" if finish is None else b'"%b"' % finish_reason(finish).encode()
        return self.chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (index, text_json(output.text), logprobs, reason)
        )


class TextOffsets:
    """Turns tokens into completions logprobs and counts the characters before each, over a whole choice.

    A token may hold part of a character. A character is counted once it is complete, so a token that begins
    inside one has that character's offset.
    """

    __slots__ = ("_characters", "_decode")

    def __init__(self) -> None:
        self._characters = 0
        self._decode = _utf8("replace").decode

    def logprobs(self, tokens: Iterable[TokenLogprob], top: int) -> CompletionLogprobs:
        result = CompletionLogprobs([], [], [] if top else None, [])
        for token in tokens:
            result.text_offset.append(self._characters)
            self._characters += len(self._decode(token.raw))
            name = _token_name(token.token, token.raw)
            result.tokens.append(name)
            result.token_logprobs.append(None if token.logprob is None else finite(token.logprob))
            if result.top_logprobs is None:
                continue
            if token.logprob is None:
                result.top_logprobs.append(None)
                continue
            best: dict[str, float] = {}
            for text, value, raw in [
                *(item[1:] for item in token.top),
                (token.token, token.logprob, token.raw),
            ]:
                best.setdefault(_token_name(text, raw), finite(value))  # two tokens may have one name
            result.top_logprobs.append(best)
        return result


def prompt_list(prompt: str | list[Any]) -> list[Prompt]:
    """The prompts of a body: all texts, or all lists of token ids. Raises `InvalidRequest`."""
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [TokenPrompt(prompt)]
    if kinds == {str}:
        return [TextPrompt(text) for text in prompt]
    if kinds != {list}:
        raise refusal("prompt", prompt, f"it mixes kinds; use {PROMPT}")
    if [] in prompt:
        raise refusal(f"prompt[{prompt.index([])}]", [], "a prompt of token ids needs at least one")
    return [TokenPrompt(token_ids) for token_ids in prompt]


def _token_name(text: str, raw: bytes) -> str:
    """OpenAI's form for a token that is no whole character; keeps different ones apart."""
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

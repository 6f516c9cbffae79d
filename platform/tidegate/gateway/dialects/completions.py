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
    MAX_CHOICES,
    MAX_TOKEN_ID,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    Choices,
    Chunks,
    FinishReason,
    Flag,
    PromptLogprobs,
    Shown,
    TextBody,
    TextCall,
    TopLogprobs,
    VocabularyId,
    all_logprobs,
    encode,
    finish_reason,
    finite,
    whole_text,
)
from tidegate.gateway.dialects.wire import OPENAI
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


def _check_best_of(body: CompletionBody) -> None:
    best_of, n = body.best_of, body.n or 1
    if best_of is not None and best_of < n:
        raise refusal("best_of", best_of, f"it is at least n, which is {n}")
    if best_of is not None and best_of > n and body.stream:
        raise refusal("best_of", best_of, "only whole answers can be ranked; use stream: false")


# That it is at least n, a schema cannot say.
_RANKED_WHOLE = Rule(
    _check_best_of,
    {
        "anyOf": [
            {"properties": {"best_of": {"type": "null"}}},
            {"properties": {"stream": {"enum": [False, None]}, "n": {"enum": [1, None]}}},
        ]
    },
)


class CompletionBody(TextBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`. `prompt`: a text, texts, token ids, or lists of token ids."""

    RULES: ClassVar[tuple[Rule, ...]] = (*TextBody.RULES, _ZERO_NEEDS_ECHO, _RANKED_WHOLE)

    prompt: Annotated[
        str | Annotated[list[str | VocabularyId | list[VocabularyId]], Meta(min_length=1)],
        documented(PROMPT, {"anyOf": _PROMPT_FORMS}),
    ]
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None, says("a whole number of tokens to generate at most")
    ] = None
    logprobs: Annotated[TopLogprobs | None, says(f"a whole number from 0 to {MAX_TOP_LOGPROBS}")] = None
    echo: Flag = None
    best_of: Annotated[
        Choices | None,
        says(f"choices to make, of which the n likeliest by token are the answer: n to {MAX_CHOICES}"),
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
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


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
    task = "generate"
    id_prefix = "cmpl-"
    may_stream = True
    wire = OPENAI
    operation_id, summary = "create_completion", "Continue a text"
    body, answer = CompletionBody, Completion
    answer_description = "The continuation, or its events where stream is true"
    _reader = BodyReader(CompletionBody)

    def read(self, raw: bytes) -> CompletionCall:
        return CompletionCall(self._reader.read(raw))


class CompletionCall(TextCall):
    __slots__ = ("_choices", "_echo", "_wanted")
    prompt_field = "prompt"
    answer_type, answer_object, has_one_prompt = Completion, "text_completion", False

    def __init__(self, body: CompletionBody) -> None:
        prompts = prompt_list(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        self._wanted = body.n or 1
        made = body.best_of or self._wanted
        self._choices = len(prompts) * made
        if self._choices > MAX_SEQUENCES:
            raise refusal(
                "prompt" if len(prompts) > made else "best_of" if made > self._wanted else "n",
                self._choices,
                f"prompts x choices is at most {MAX_SEQUENCES}; send several calls",
            )
        super().__init__(
            body,
            prompts,
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            top_logprobs=body.logprobs,
            echo=bool(body.echo),
            is_ranked=made > self._wanted,
        )
        self.n = made
        self._echo = bool(body.echo)

    def events(self, head: AnswerHead) -> CompletionEvents:
        return CompletionEvents(head, self.shown, top=self.top_logprobs, choices=self._choices)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        if self.n > self._wanted:
            prompts = [choices[first : first + self.n] for first in range(0, len(choices), self.n)]
            choices = [
                best for made in prompts for best in sorted(made, key=self._likelihood)[-self._wanted :][::-1]
            ]
        return super().answer(head, choices, usage)

    def _likelihood(self, segments: Sequence[Segment]) -> float:
        """The mean log probability of a choice's own tokens."""
        entries, finish = all_logprobs(segments), segments[-1].finish
        own = entries[finish.prompt_tokens if self._echo and finish is not None else 0 :]
        return sum(finite(entry.logprob) for entry in own) / max(1, len(own))

    def choice(self, index: int, segments: Sequence[Segment]) -> CompletionChoice:
        top = self.top_logprobs
        entries = self.shown.entries(all_logprobs(segments))
        logprobs = None if top is None else TextOffsets().logprobs(entries, top)
        more = self.token_ids(segments) | self.prompt_parts(segments)
        reason = finish_reason(segments[-1].finish)
        return CompletionChoice(index, whole_text(segments), logprobs, reason, **more)


class CompletionEvents(Chunks):
    """`text_completion` chunks; the last one of a choice carries its finish reason.

    As vLLM's, tokens without text (special ones, parts of a character) have a chunk: benchmarks time each.
    """

    __slots__ = ("_offsets", "_top")

    def __init__(self, head: AnswerHead, shown: Shown, *, top: int | None, choices: int) -> None:
        super().__init__(head, b"text_completion", shown)
        self._top = top
        self._offsets = [TextOffsets() for _ in range(choices if top is not None else 0)]

    def render(self, index: int, segment: Segment) -> bytes:
        if self._shown.has_running_usage:
            self.count(index, segment)
        finish = segment.finish
        output = segment.output
        more = b""
        if self._shown.has_token_ids:
            more = self.token_ids(output.token_ids) + self.token_ids(output.prompt_ids, b"prompt_token_ids")
        if finish is None and not (output.token_ids or output.text or output.logprobs or more):
            return b""
        logprobs = b"null"
        if self._top is not None and output.logprobs:
            logprobs = encode(self._offsets[index].logprobs(self._shown.entries(output.logprobs), self._top))
        reason = b"null" if finish is None else b'"%b"' % finish_reason(finish).encode()
        return self.chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}'
            % (index, text_json(output.text), logprobs, reason, more)
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


def prompt_list(prompt: str | list[Any], *, add_special_tokens: bool = True) -> list[Prompt]:
    """The prompts of a body: all texts, or all lists of token ids. Raises `InvalidRequest`."""
    if isinstance(prompt, str):
        return [TextPrompt(prompt, add_special_tokens)]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [TokenPrompt(prompt)]
    if kinds == {str}:
        return [TextPrompt(text, add_special_tokens) for text in prompt]
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

"""OpenAI's two text endpoints share this: sampling fields, the parts of a call, chunks, logprobs.

Every field of OpenAI's schema is declared, here or in the endpoint's own module, in one of three groups:

- honoured: acts;
- advisory: taken and not acted on (`user`, `metadata`, `store: false`, ...);
- not honoured: refused unless null or a value that means the same as leaving it out.

A field that is in none of them is unknown and refused by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import RequestBody, Rule, documented, needs, not_honoured, refusal, says
from tidegate.gateway.dialects.base import AnswerHead, Ask, Usage
from tidegate.gateway.dialects.generate import generate_asks
from tidegate.gateway.sse import text_json
from tidegate.messages.work import Finish, Prompt, Sampling, Segment, TokenLogprob

MAX_CHOICES = 128
MAX_STOP = 4
MAX_STOP_TOKENS = 256
MAX_TOKENS = 1 << 24
MAX_TOKEN_ID = (1 << 31) - 1
INT64 = 1 << 63
UNLIKELY_LOGPROB = -9999.0  # what OpenAI sends for "very unlikely"; JSON has no infinity

Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=-INT64, le=INT64 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
VocabularyId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
LogitBias = Annotated[dict[VocabularyId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
_LOGIT_BIAS = {
    "type": "object",
    "maxProperties": 1024,
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
Limit = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Flag = Annotated[bool | None, says("true or false")]
Penalty = Annotated[Annotated[float, Meta(ge=-2, le=2)] | None, says("a number from -2 to 2; left out: 0")]
Advisory = Annotated[
    Annotated[str, Meta(max_length=1024)] | None,
    says("a text of at most 1024 characters (advisory: not acted on)"),
]
FinishReason = Literal["stop", "length"]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers that nobody reads: none is sent
    continuous_usage_stats: Literal[False] | None = None


def _check_min_tokens(body: TextBody) -> None:
    if body.min_tokens and body.stop:
        raise refusal(
            "min_tokens", body.min_tokens, "it is not honoured together with stop; send one of them"
        )


_NO_STOP_BEFORE = Rule(
    _check_min_tokens,
    {
        "anyOf": [
            {"properties": {"min_tokens": {"anyOf": [{"type": "null"}, {"const": 0}]}}},
            {"properties": {"stop": {"type": "null"}}},
        ]
    },
)


class TextBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """Chat completions and completions share these fields."""

    RULES: ClassVar[tuple[Rule, ...]] = (needs("stream_options", "stream"), _NO_STOP_BEFORE)

    model: Annotated[
        str, Meta(min_length=1, max_length=256, description="the name of a model that GET /v1/models lists")
    ]
    stream: Flag = None
    stream_options: Annotated[
        StreamOptions | None, says('{"include_usage": true} together with stream: true')
    ] = None
    n: Annotated[Choices | None, says(f"a whole number from 1 to {MAX_CHOICES}")] = None
    temperature: Annotated[Temperature | None, says("a number from 0 (greedy) to 2; left out: 1")] = None
    top_p: Annotated[Share | None, says("a number from 0 to 1; left out: 1")] = None
    seed: Annotated[
        Seed | None,
        says("a 64-bit whole number; choice k of a prompt uses seed + k; left out: drawn at random"),
    ] = None
    stop: Annotated[
        StopString | StopStrings | None, says(f"a non-empty text, or a list of at most {MAX_STOP} of them")
    ] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    user: Advisory = None
    metadata: Annotated[Metadata | None, says("at most 16 pairs of texts (advisory: not acted on)")] = None
    safety_identifier: Advisory = None
    prompt_cache_key: Advisory = None
    store: Annotated[Any, not_honoured("answers are not stored; use false or leave it out", False)] = None
    service_tier: Annotated[
        Any, not_honoured("there is one tier; use auto or leave it out", "auto", "default")
    ] = None
    logit_bias: Annotated[
        LogitBias | None,
        documented(
            "at most 1024 token ids, each with a number from -100 to 100 that is added to its logit",
            {"anyOf": [{"type": "null"}, _LOGIT_BIAS]},
        ),
    ] = None
    # The fields below are vLLM's.
    top_k: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_TOKEN_ID)] | None,
        says("the likeliest tokens to choose among, a whole number; -1, 0 or left out: all"),
    ] = None
    min_p: Annotated[
        Share | None, says("the least probability of a token against the likeliest, from 0 to 1; left out: 0")
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(gt=0, le=100)] | None,
        says("a number above 0, over prompt and answer; above 1 makes repetition less likely; left out: 1"),
    ] = None
    min_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None,
        says("tokens before an end token or one of stop_token_ids may come; not together with stop"),
    ] = None
    ignore_eos: Flag = None
    stop_token_ids: Annotated[
        Annotated[list[VocabularyId], Meta(max_length=MAX_STOP_TOKENS)] | None,
        says(f"at most {MAX_STOP_TOKENS} token ids that end the answer; they are not part of its text"),
    ] = None
    include_stop_str_in_output: Annotated[
        Any, not_honoured("stop strings are cut; use false or leave it out", False)
    ] = None
    skip_special_tokens: Annotated[
        Any, not_honoured("special tokens are never shown; use true or leave it out", True)
    ] = None
    spaces_between_special_tokens: Annotated[
        Any, not_honoured("special tokens are never shown; leave it out", True, False)
    ] = None
    use_beam_search: Annotated[
        Any, not_honoured("beam search is not supported; use n and temperature", False)
    ] = None
    length_penalty: Annotated[Any, not_honoured("beam search is not supported; leave it out", 1, 1.0)] = None
    early_stopping: Annotated[Any, not_honoured("beam search is not supported; leave it out", False)] = None
    prompt_logprobs: Annotated[
        Any, not_honoured("use echo and logprobs of /v1/completions, or leave it out")
    ] = None
    truncate_prompt_tokens: Annotated[
        Any, not_honoured("prompts are not cut; send a shorter one and leave it out")
    ] = None
    return_token_ids: Annotated[Any, not_honoured("token ids are not returned; leave it out", False)] = None
    priority: Annotated[Any, not_honoured("calls wait in the order they come; leave it out", 0)] = None


class TextCall(ABC):
    """A call of either endpoint. `top_logprobs`: alternatives per token; None: no logprobs."""

    __slots__ = ("_prompts", "_sampling", "_seed", "has_usage", "is_streamed", "model", "n", "top_logprobs")
    answer_type: ClassVar[Callable[..., msgspec.Struct]]
    answer_object: ClassVar[str]

    def __init__(
        self,
        body: TextBody,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None,
        top_logprobs: int | None,
        echo: bool = False,
    ) -> None:
        stop, options = body.stop, body.stream_options
        self.model = body.model
        self.n = body.n or 1
        self.is_streamed = bool(body.stream)
        self.has_usage = options is not None and bool(options.include_usage)
        self.top_logprobs = top_logprobs
        self._prompts = prompts
        self._seed = body.seed
        self._sampling = Sampling(
            seed=0,  # each sequence gets its own
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            stop=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            top_logprobs=top_logprobs,
            echo=echo,
            ignore_eos=bool(body.ignore_eos),
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logit_bias=tuple((body.logit_bias or {}).items()),
        )

    def asks(self, random_seed: int) -> list[Ask]:
        return generate_asks(self._prompts, self.n, self._sampling, self._seed, random_seed)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        made = [self.choice(index, segments) for index, segments in enumerate(choices)]
        about = (head.call_id, self.answer_object, head.created, head.model)
        return encode(self.answer_type(*about, made, usage, head.revision))

    @abstractmethod
    def choice(self, index: int, segments: Sequence[Segment]) -> msgspec.Struct: ...


class Chunks:
    """The events of one answer, each a chunk as JSON, after `id: {call id}/{k}` (k counts up) for who asks.

    Everything that stays the same over a stream is joined once; a token costs one JSON escape and one join.
    """

    __slots__ = ("_event", "_has_ids", "_has_usage", "_head", "_sent", "_tail")

    def __init__(self, head: AnswerHead, kind: bytes, *, has_usage: bool) -> None:
        self._sent = 0
        self._has_usage = has_usage
        self._has_ids = head.has_event_ids
        self._event = b"id: " + head.call_id.encode() + b"/"
        self._head = (
            b'data: {"id":"%b","object":"%b","created":%d,"model":%b,"system_fingerprint":%b,"choices":['
            % (head.call_id.encode(), kind, head.created, text_json(head.model), text_json(head.revision))
        )
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def chunk(self, choice: bytes) -> bytes:
        return b"%b%b%b%b" % (self._id_line(), self._head, choice, self._tail)

    def end(self, usage: Usage) -> bytes:
        if not self._has_usage:
            return DONE
        return b'%b%b],"usage":%b}\n\n%b' % (self._id_line(), self._head, encode(usage), DONE)

    def _id_line(self) -> bytes:
        if not self._has_ids:
            return b""
        self._sent += 1
        return b"%b%d\n" % (self._event, self._sent)


DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


def whole_text(segments: Sequence[Segment]) -> str:
    return "".join([segment.output.text for segment in segments])


def all_logprobs(segments: Sequence[Segment]) -> Iterable[TokenLogprob]:
    return [token for segment in segments for token in segment.output.logprobs]


def finish_reason(finish: Finish | None) -> FinishReason:
    return "length" if finish is not None and finish.reason == "length" else "stop"


def finite(logprob: float | None) -> float:
    """JSON holds neither infinity nor NaN."""
    if logprob is None or math.isnan(logprob):
        return UNLIKELY_LOGPROB
    return max(logprob, UNLIKELY_LOGPROB)

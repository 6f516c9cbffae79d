"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, Anthropic's, which coding agents speak.

What tells a server of Anthropic's how to cache, bill or place a call is taken and not acted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta

from tidegate.errors import RequestError
from tidegate.gateway.bodies import BodyReader, RequestBody, not_honoured, says
from tidegate.gateway.dialects.base import AnswerHead, Ask, Usage
from tidegate.gateway.dialects.generate import OneAnswer
from tidegate.gateway.dialects.openai import Flag, Limit, Share, StopString, Temperature, whole_text
from tidegate.gateway.dialects.wire import Wire, encode, shown_message
from tidegate.gateway.sse import text_json
from tidegate.messages.work import (
    MODEL_DEFAULTS,
    ChatPrompt,
    Finish,
    Sampling,
    Segment,
    TextPrompt,
    Tokenize,
)

MOST_STOPS = 16
_MESSAGES = "a list of at least one message with role and content: a text, or a list of text blocks"
_NO_TOOLS = "tools are not supported; leave it out"
_UNREAD = says("(advisory: not acted on)")


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    type: Literal["error"]
    error: AnthropicErrorDetail


_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicWire(Wire):
    error_body = AnthropicError

    def error(self, error: RequestError) -> bytes:
        otherwise = "api_error" if error.status >= 500 else "invalid_request_error"
        kind = _ERROR_TYPES.get(error.status, otherwise)
        return encode(AnthropicError("error", AnthropicErrorDetail(kind, shown_message(error))))

    def error_event(self, error: RequestError) -> bytes:
        return _event(b"error", self.error(error))


ANTHROPIC: Wire = AnthropicWire()


class TextBlock(msgspec.Struct, tag="text", tag_field="type"):
    """`cache_control` and `citations` are not read."""

    text: str


class ThinkingBlock(msgspec.Struct, tag="thinking", tag_field="type"):
    """Part of an answer that is sent back; its signature is not read."""

    thinking: str


class RedactedThinkingBlock(msgspec.Struct, tag="redacted_thinking", tag_field="type"):
    """Part of another server's answer that is sent back; not read."""


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock


class InputMessage(msgspec.Struct):
    role: Annotated[Literal["user", "assistant", "system"], says("one of user, assistant, system")]
    content: Annotated[str | list[Block], says(_MESSAGES)]


class ThinkingConfig(msgspec.Struct):
    """The model's chat template may act on it. There is no budget."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class RequestMetadata(msgspec.Struct):
    user_id: Annotated[str, Meta(max_length=1024)] | None = None


class PromptBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """Messages and the count of their tokens share these fields."""

    model: Annotated[
        str, Meta(min_length=1, max_length=256, description="the name of a model that GET /v1/models lists")
    ]
    messages: Annotated[Annotated[list[InputMessage], Meta(min_length=1)], says(_MESSAGES)]
    system: Annotated[str | list[TextBlock] | None, says("a text, or a list of text blocks")] = None
    thinking: Annotated[
        ThinkingConfig | None,
        says('{"type": "enabled"} or {"type": "disabled"}; the model\'s chat template may act on it'),
    ] = None
    tools: Annotated[Any, not_honoured(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, not_honoured(_NO_TOOLS)] = None
    output_config: Annotated[Any, not_honoured("output is not steered; leave it out", {})] = None
    output_format: Annotated[Any, not_honoured("output is not steered; leave it out")] = None
    container: Annotated[Any, not_honoured("no code runs here; leave it out")] = None
    mcp_servers: Annotated[Any, not_honoured("no server is asked; leave it out", [])] = None
    cache_control: Annotated[Any, _UNREAD] = None
    context_management: Annotated[Any, _UNREAD] = None
    betas: Annotated[Any, _UNREAD] = None
    speed: Annotated[Any, _UNREAD] = None


class MessagesBody(PromptBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/messages`."""

    max_tokens: Annotated[
        Limit, says("tokens to generate at most; where the context has less room, as many as it has")
    ]
    stream: Flag = None
    stop_sequences: Annotated[
        Annotated[list[StopString], Meta(max_length=MOST_STOPS)] | None,
        says(f"at most {MOST_STOPS} non-empty texts that end the answer"),
    ] = None
    temperature: Annotated[Temperature | None, says("a number from 0 (greedy) to 2")] = None
    top_p: Annotated[Share | None, says("a number from 0 to 1")] = None
    top_k: Annotated[
        Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None,
        says("the likeliest tokens to choose among; 0: all"),
    ] = None
    metadata: Annotated[
        RequestMetadata | None,
        says('{"user_id": ...}: while a model changes, one user\'s calls stay on one revision'),
    ] = None
    service_tier: Annotated[Any, _UNREAD] = None
    inference_geo: Annotated[Any, _UNREAD] = None
    diagnostics: Annotated[Any, _UNREAD] = None


class CountBody(PromptBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/messages/count_tokens`."""


class MessageUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class AnswerBlock(msgspec.Struct, tag="text", tag_field="type"):
    text: str
    citations: None = None


StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class AnthropicMessage(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    input_tokens: int


class Messages:
    path = "/v1/messages"
    id_prefix = "msg_"
    may_stream = True
    wire = ANTHROPIC
    operation_id, summary = "create_message", "Answer a conversation, as Anthropic's API"
    body, answer = MessagesBody, AnthropicMessage
    answer_description = "The answer, or its events where stream is true"
    _reader = BodyReader(MessagesBody)

    def read(self, raw: bytes) -> MessagesCall:
        return MessagesCall(self._reader.read(raw))


class CountTokens:
    path = "/v1/messages/count_tokens"
    id_prefix = "count_"
    may_stream = False
    wire = ANTHROPIC
    operation_id, summary = "count_message_tokens", "Count the tokens of a conversation, as Anthropic's API"
    body, answer = CountBody, TokenCount
    answer_description = "The count"
    _reader = BodyReader(CountBody)

    def read(self, raw: bytes) -> CountCall:
        return CountCall(self._reader.read(raw))


class MessagesCall(OneAnswer):
    def __init__(self, body: MessagesBody) -> None:
        self._stops = tuple(body.stop_sequences or ())
        sampling = Sampling(
            seed=0,
            max_tokens=body.max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            stop=self._stops,
            left_out=tuple(name for name in MODEL_DEFAULTS if getattr(body, name, None) is None),
            clips_limit=True,
        )
        super().__init__(body.model, _prompt(body), sampling, seed=None, is_streamed=bool(body.stream))
        self.user = (body.metadata and body.metadata.user_id) or ""

    def events(self, head: AnswerHead) -> MessageEvents:
        return MessageEvents(head, self._stops)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        segments = choices[0]
        text = whole_text(segments)
        return encode(
            AnthropicMessage(
                head.call_id,
                "message",
                "assistant",
                head.model,
                [AnswerBlock(text)] if text else [],
                *_stop(segments[-1].finish, self._stops),
                MessageUsage(usage.prompt_tokens, usage.completion_tokens),
            )
        )


class MessageEvents:
    """`message_start`, one content block after the other, `message_delta` with the end, `message_stop`."""

    __slots__ = ("_has_begun", "_head", "_place", "_stop", "_stops")

    def __init__(self, head: AnswerHead, stops: Sequence[str]) -> None:
        self._head = head
        self._stops = stops
        self._stop: tuple[StopReason, str | None] = ("end_turn", None)
        self._has_begun = False
        self._place = -1  # of the block that is open

    def render(self, index: int, segment: Segment) -> bytes:  # noqa: ARG002 - there is one choice
        out, text = b"", segment.output.text
        if not self._has_begun:
            self._has_begun = True
            head = self._head
            used = MessageUsage(segment.prompt_tokens, 0)
            begun = AnthropicMessage(head.call_id, "message", "assistant", head.model, [], None, None, used)
            out = _event(b"message_start", b'{"type":"message_start","message":%b}' % encode(begun))
            out += _PING
        if text:
            if self._place < 0:
                self._place = 0
                out += _TEXT_BEGINS % self._place
            out += _TEXT % (self._place, text_json(text))
        if segment.finish is not None:
            self._stop = _stop(segment.finish, self._stops)
        return out

    def end(self, usage: Usage) -> bytes:
        out = b"" if self._place < 0 else _BLOCK_ENDS % self._place
        reason, stop = self._stop
        used = MessageUsage(usage.prompt_tokens, usage.completion_tokens)
        delta = b'{"type":"message_delta","delta":{"stop_reason":"%b","stop_sequence":%b},"usage":%b}' % (
            reason.encode(),
            b"null" if stop is None else text_json(stop),
            encode(used),
        )
        return out + _event(b"message_delta", delta) + _event(b"message_stop", b'{"type":"message_stop"}')


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)


_PING = _event(b"ping", b'{"type":"ping"}')
_TEXT_BEGINS = _event(
    b"content_block_start",
    b'{"type":"content_block_start","index":%d,"content_block":{"type":"text","text":""}}',
)
_TEXT = _event(
    b"content_block_delta",
    b'{"type":"content_block_delta","index":%d,"delta":{"type":"text_delta","text":%b}}',
)
_BLOCK_ENDS = _event(b"content_block_stop", b'{"type":"content_block_stop","index":%d}')


class CountCall:
    n = 1
    is_streamed = False
    user = ""
    prompt_field = "messages"

    def __init__(self, body: CountBody) -> None:
        self.model = body.model
        self._prompt: ChatPrompt | TextPrompt = _prompt(body)

    def asks(self, random_seed: int) -> list[Ask]:  # noqa: ARG002 - nothing is drawn
        prompt, self._prompt = self._prompt, TextPrompt("")
        return [Ask(Tokenize(prompt), cost=1)]

    def events(self, head: AnswerHead) -> NoReturn:
        raise AssertionError(f"{head.call_id} is not streamed")

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        return encode(TokenCount(len(choices[0][-1].output.prompt_ids)))


def _prompt(body: PromptBody) -> ChatPrompt:
    """The system's text is the first message, neighbouring messages of one role are one turn, and the answer
    goes on from a last message of the assistant's."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        text = _text(message.content)
        if messages and messages[-1]["role"] == message.role:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": message.role, "content": text})
    goes_on = messages[-1]["role"] == "assistant"
    args = {} if body.thinking is None else {"enable_thinking": body.thinking.type != "disabled"}
    return ChatPrompt(
        messages, add_generation_prompt=not goes_on, continue_final_message=goes_on, template_args=args
    )


def _text(content: str | Sequence[Block]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join([block.text for block in content if isinstance(block, TextBlock)])


def _stop(finish: Finish | None, stops: Sequence[str]) -> tuple[StopReason, str | None]:
    if finish is not None and finish.reason == "length":
        return "max_tokens", None
    if finish is not None and finish.stopped_by in stops:
        return "stop_sequence", finish.stopped_by
    return "end_turn", None

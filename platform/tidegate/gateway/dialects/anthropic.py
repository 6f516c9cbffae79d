"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, Anthropic's, which coding agents speak.

What tells a server of Anthropic's how to cache, bill or place a call is taken and not acted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta

from tidegate.errors import RequestError
from tidegate.gateway.bodies import UNREAD, BodyReader, RequestBody, documented, not_honoured, refusal, says
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.base import AnswerHead, Ask, Free, Usage
from tidegate.gateway.dialects.chat import whole_reasoning
from tidegate.gateway.dialects.generate import MOST_STOPS, OneAnswer
from tidegate.gateway.dialects.openai import Flag, Limit, Share, StopString, Temperature, whole_text
from tidegate.gateway.dialects.tools import (
    MAX_TOOLS,
    NO_TOOLS,
    PARAMETERS,
    Asked,
    FunctionDefinition,
    asked,
    called,
    checked,
    whole_calls,
)
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

_MESSAGES = "a list of at least one message with role and content: a text, or a list of blocks"
CallId = Annotated[str, Meta(min_length=1, max_length=256)]


class UnsupportedThread(msgspec.Struct):
    """Anthropic's clients go on without a thread, sending all messages, where an error has this."""

    error_code: Literal["thread_unsupported_request"] = "thread_unsupported_request"
    unsupported: tuple[str, ...] = ("thread",)


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str
    details: UnsupportedThread | msgspec.UnsetType = msgspec.UNSET


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
        details = UnsupportedThread() if error.param == "thread" else msgspec.UNSET
        return encode(AnthropicError("error", AnthropicErrorDetail(kind, shown_message(error), details)))

    def error_event(self, error: RequestError) -> bytes:
        return _event(b"error", self.error(error))


ANTHROPIC: Wire = AnthropicWire()


class TextBlock(msgspec.Struct, tag="text", tag_field="type"):
    """`cache_control` and `citations` are not read."""

    text: str


class ThinkingBlock(msgspec.Struct, tag="thinking", tag_field="type"):
    """Part of an answer that is sent back; the model's chat template may show it. Signatures are not read."""

    thinking: str


class RedactedThinkingBlock(msgspec.Struct, tag="redacted_thinking", tag_field="type"):
    """Part of another server's answer that is sent back; not read."""


class ToolUseBlock(msgspec.Struct, tag="tool_use", tag_field="type"):
    """A call in an assistant's answer."""

    id: CallId
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, tag="tool_result", tag_field="type"):
    """What came of a call of an answer before it, in a user's message. `is_error` is not read."""

    tool_use_id: CallId
    content: str | list[TextBlock] | None = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class InputMessage(msgspec.Struct):
    role: Annotated[Literal["user", "assistant", "system"], says("one of user, assistant, system")]
    content: Annotated[str | list[Block], says(_MESSAGES)]


class ThinkingConfig(msgspec.Struct):
    """The model's chat template may act on it, and the answer shows what was thought, unless it is disabled.
    There is no budget."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class JsonOutput(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: Annotated[dict[str, Any], says("a JSON schema, which the answer's text is valid for")]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: JsonOutput | None = None
    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max"] | None,
        says("low, medium, high, xhigh or max; the model's chat template may act on it"),
    ] = None


class AnthropicTool(msgspec.Struct, kw_only=True):
    """A function of the client's. `cache_control` and the like are not read."""

    type: Annotated[
        Literal["custom"] | None,
        says("custom, which is also the default: tools that a server runs are not supported"),
    ] = None
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,128}$"), says("1 to 128 letters, digits, _, - or .")]
    description: Annotated[str | None, says("what it does, for the model")] = None
    input_schema: Annotated[dict[str, Any], documented("a JSON schema of type object", PARAMETERS)]
    strict: Annotated[bool | None, says("true: what of the schema cannot be enforced is refused")] = None


class AnthropicToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Annotated[Literal["auto", "any", "tool", "none"], says("auto, any, tool or none")]
    name: Annotated[str | None, says("of the tool, with type: tool")] = None
    disable_parallel_tool_use: Annotated[bool | None, says("true: one call at most")] = None


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
    tools: Annotated[
        Annotated[list[AnthropicTool], Meta(max_length=MAX_TOOLS)] | None,
        says(f'at most {MAX_TOOLS} of {{"name": ..., "description": ..., "input_schema": ...}}'),
    ] = None
    tool_choice: Annotated[
        AnthropicToolChoice | None,
        says('{"type": "auto", "any" or "none"} or {"type": "tool", "name": ...}; left out: auto'),
    ] = None
    output_config: Annotated[
        OutputConfig | None, says('{"format": {"type": "json_schema", "schema": ...}, "effort": ...}')
    ] = None
    output_format: Annotated[
        JsonOutput | None, says("the older name of output_config.format; send one of them")
    ] = None
    container: Annotated[Any, not_honoured("no code runs here; leave it out")] = None
    mcp_servers: Annotated[Any, not_honoured("no server is asked; leave it out", [])] = None
    thread: Annotated[Any, not_honoured("no conversation is kept; send all messages", False)] = None
    cache_control: Annotated[Any, UNREAD] = None
    context_management: Annotated[Any, UNREAD] = None
    betas: Annotated[Any, UNREAD] = None
    speed: Annotated[Any, UNREAD] = None


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
    service_tier: Annotated[Any, UNREAD] = None
    inference_geo: Annotated[Any, UNREAD] = None
    diagnostics: Annotated[Any, UNREAD] = None


class CountBody(PromptBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/messages/count_tokens`."""


class MessageUsage(msgspec.Struct):
    input_tokens: int  # of the prompt, those that were not read from the cache
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class AnswerBlock(msgspec.Struct, tag="text", tag_field="type"):
    text: str
    citations: None = None


class ThoughtBlock(msgspec.Struct, tag="thinking", tag_field="type"):
    thinking: str
    signature: str = ""


class CallBlock(msgspec.Struct, tag="tool_use", tag_field="type"):
    id: str
    name: str
    input: dict[str, Any]


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicMessage(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock | ThoughtBlock | CallBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    input_tokens: int


class Messages:
    path = "/v1/messages"
    task = "generate"
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
    task = ""
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
        self._shows_thinking = body.thinking is not None and body.thinking.type != "disabled"
        tools = _asked(body)
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
        super().__init__(
            body.model,
            _prompt(body, tools),
            sampling,
            seed=None,
            is_streamed=bool(body.stream),
            constraint=_constraint(body),
            schemas=tools.schemas,
        )
        self.user = (body.metadata and body.metadata.user_id) or ""

    def events(self, head: AnswerHead) -> MessageEvents:
        return MessageEvents(head, self._stops, shows_thinking=self._shows_thinking)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        segments = choices[0]
        blocks: list[AnswerBlock | ThoughtBlock | CallBlock] = []
        if self._shows_thinking and (thought := whole_reasoning(segments)):
            blocks.append(ThoughtBlock(thought))
        if text := whole_text(segments):
            blocks.append(AnswerBlock(text))
        calls = whole_calls(segments)
        for call in calls:
            made = called(call.function.name, call.function.arguments, call.id)
            blocks.append(CallBlock(call.id, call.function.name, made["function"]["arguments"]))
        return encode(
            AnthropicMessage(
                head.call_id,
                "message",
                "assistant",
                head.model,
                blocks,
                *_stop(segments[-1].finish, self._stops, has_calls=bool(calls)),
                _used(usage),
            )
        )


class MessageEvents:
    """`message_start`, one content block after the other, `message_delta` with the end, `message_stop`."""

    __slots__ = ("_has_begun", "_has_calls", "_head", "_kind", "_place", "_shows_thinking", "_stop", "_stops")

    def __init__(self, head: AnswerHead, stops: Sequence[str], *, shows_thinking: bool) -> None:
        self._head = head
        self._stops = stops
        self._shows_thinking = shows_thinking
        self._has_calls = False
        self._kind = b""  # of the block that is open
        self._stop: tuple[StopReason, str | None] = ("end_turn", None)
        self._has_begun = False
        self._place = -1  # of the last block

    def render(self, index: int, segment: Segment) -> bytes:  # noqa: ARG002 - there is one choice
        out, output = b"", segment.output
        if not self._has_begun:
            self._has_begun = True
            head = self._head
            used = MessageUsage(segment.prompt_tokens, 0)
            begun = AnthropicMessage(head.call_id, "message", "assistant", head.model, [], None, None, used)
            out = _event(b"message_start", b'{"type":"message_start","message":%b}' % encode(begun))
            out += _PING
        if output.reasoning and self._shows_thinking:
            out += self._in_block(b"thinking", _THINKING)
            out += _DELTA % (self._place, b"thinking_delta", b"thinking", text_json(output.reasoning))
        if output.text:
            out += self._in_block(b"text", _TEXT)
            out += _DELTA % (self._place, b"text_delta", b"text", text_json(output.text))
        for part in output.calls:
            if part.name:
                self._has_calls = True
                out += self._close()
                out += self._in_block(b"tool_use", encode(CallBlock(part.id, part.name, {})))
            if part.arguments:
                piece = text_json(part.arguments)
                out += _DELTA % (self._place, b"input_json_delta", b"partial_json", piece)
        if segment.finish is not None:
            self._stop = _stop(segment.finish, self._stops, has_calls=self._has_calls)
        return out

    def _in_block(self, kind: bytes, begun: bytes) -> bytes:
        """The events that lead to a block of this kind; `begun`: an empty one."""
        if self._kind == kind:
            return b""
        out = self._close()
        self._kind = kind
        self._place += 1
        return out + _BLOCK_BEGINS % (self._place, begun)

    def _close(self) -> bytes:
        out = _BLOCK_ENDS % self._place if self._kind else b""
        self._kind = b""
        return out

    def end(self, usage: Usage) -> bytes:
        out = self._close()
        reason, stop = self._stop
        delta = b'{"type":"message_delta","delta":{"stop_reason":"%b","stop_sequence":%b},"usage":%b}' % (
            reason.encode(),
            b"null" if stop is None else text_json(stop),
            encode(_used(usage)),
        )
        return out + _event(b"message_delta", delta) + _event(b"message_stop", b'{"type":"message_stop"}')


def _used(usage: Usage) -> MessageUsage:
    cached = usage.cached_tokens
    return MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cache_read_input_tokens=cached)


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)


_PING = _event(b"ping", b'{"type":"ping"}')
_BLOCK_BEGINS = _event(
    b"content_block_start", b'{"type":"content_block_start","index":%d,"content_block":%b}'
)
_TEXT, _THINKING = encode(AnswerBlock("")), encode(ThoughtBlock(""))
_DELTA = _event(
    b"content_block_delta", b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}'
)
_BLOCK_ENDS = _event(b"content_block_stop", b'{"type":"content_block_stop","index":%d}')


class CountCall(Free):
    n = 1
    is_streamed = False
    user = ""
    prompt_field = "messages"

    def __init__(self, body: CountBody) -> None:
        self.model = body.model
        self._prompt: ChatPrompt | TextPrompt = _prompt(body, _asked(body))

    def asks(self, random_seed: int) -> list[Ask]:  # noqa: ARG002 - nothing is drawn
        prompt, self._prompt = self._prompt, TextPrompt("")
        return [Ask(Tokenize(prompt), cost=1)]

    def events(self, head: AnswerHead) -> NoReturn:
        raise AssertionError(f"{head.call_id} is not streamed")

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        return encode(TokenCount(len(choices[0][-1].output.prompt_ids)))


def _prompt(body: PromptBody, tools: Asked) -> ChatPrompt:
    """The system's text is the first message, neighbouring messages of one role are one turn, and the answer
    goes on from a last message of the assistant's."""
    calls: dict[str, str] = {}  # ids of those so far, and whom they call
    messages = [{"role": "system", "content": _text(body.system)}] if body.system else []
    messages += _joined(
        turn
        for place, message in enumerate(body.messages)
        for turn in _turns(f"messages[{place}]", message, calls)
    )
    last = messages[-1]
    goes_on = last["role"] == "assistant"
    if goes_on and "tool_calls" in last:
        raise refusal(
            f"messages[{len(body.messages) - 1}].content",
            "given",
            "a tool_use needs its tool_result after it",
        )
    args: dict[str, Any] = {}
    if body.thinking is not None:
        args["enable_thinking"] = body.thinking.type != "disabled"
    if body.output_config is not None and body.output_config.effort is not None:
        args["reasoning_effort"] = body.output_config.effort
    return ChatPrompt(
        messages,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        template_args=args,
        tools=tools.tools,
        tool_choice=tools.choice,
        parallel_tool_calls=tools.is_parallel,
    )


def _constraint(body: PromptBody) -> Constraint | None:
    asked = body.output_config.format if body.output_config is not None else None
    if asked is not None and body.output_format is not None:
        raise refusal("output_format", "given", "output_config.format says it already; send one of them")
    if asked is not None:
        return Constraint("json", asked.schema, "output_config.format.schema")
    if body.output_format is not None:
        return Constraint("json", body.output_format.schema, "output_format.schema")
    return None


def _turns(where: str, message: InputMessage, calls: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A message as a chat template takes it: each result of a call is one of its own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    made: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    found = []
    for place, block in enumerate(message.content):
        if isinstance(block, ToolResultBlock):
            asked = block.tool_use_id
            if message.role != "user":
                raise refusal(f"{where}.content[{place}].type", "tool_result", "send it with role user")
            if asked not in calls:
                raise refusal(
                    f"{where}.content[{place}].tool_use_id",
                    asked,
                    "no answer before it has a call with that id",
                )
            result = _text(block.content or "")
            yield {"role": "tool", "tool_call_id": asked, "name": calls[asked], "content": result}
        elif isinstance(block, ToolUseBlock):
            if message.role != "assistant":
                raise refusal(f"{where}.content[{place}].type", "tool_use", "send it with role assistant")
            calls[block.id] = block.name
            arguments = checked(block.input, f"{where}.content[{place}].input")
            function = {"name": block.name, "arguments": arguments}
            found.append({"id": block.id, "type": "function", "function": function})
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    if thoughts and message.role == "assistant":
        made["reasoning_content"] = "\n".join(thoughts)
    if found:
        made["tool_calls"] = found
    if (
        made["content"]
        or found
        or thoughts
        or not any(isinstance(b, ToolResultBlock) for b in message.content)
    ):
        yield made


def _joined(turns: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Neighbouring turns of one role are one, but for results of calls."""
    for role, run in groupby(turns, itemgetter("role")):
        if role == "tool":
            yield from run
            continue
        first, *more = run
        one, both = dict(first), [first, *more]
        for name in ("content", "reasoning_content"):
            if texts := [turn[name] for turn in both if turn.get(name)]:
                one[name] = "\n".join(texts)
        if called := [call for turn in both for call in turn.get("tool_calls", ())]:
            one["tool_calls"] = called
        yield one


def _asked(body: PromptBody) -> Asked:
    """The tools of a body, and its `tool_choice` against them."""
    choice = body.tool_choice or AnthropicToolChoice(type="auto")
    if not body.tools:
        if choice.type in ("any", "tool"):
            raise refusal("tool_choice.type", choice.type, "it needs tools")
        return NO_TOOLS
    definitions = [
        FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
        for tool in body.tools
    ]
    kind = {"any": "required", "tool": choice.name}.get(choice.type, choice.type)
    if choice.type == "tool" and choice.name not in [tool.name for tool in body.tools]:
        raise refusal("tool_choice.name", choice.name, "it is none of tools; name one of them")
    is_named = choice.type == "tool"
    is_parallel = not is_named and not choice.disable_parallel_tool_use
    where = "tools[{}].input_schema"
    return asked(definitions, kind or "", where, is_parallel=is_parallel, is_named=is_named)


def _text(content: str | Sequence[Block]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join([block.text for block in content if isinstance(block, TextBlock)])


def _stop(finish: Finish | None, stops: Sequence[str], *, has_calls: bool) -> tuple[StopReason, str | None]:
    if finish is not None and finish.reason == "length":
        return "max_tokens", None
    if finish is not None and finish.stopped_by in stops:
        return "stop_sequence", finish.stopped_by
    return "tool_use" if has_calls else "end_turn", None

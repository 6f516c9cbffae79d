"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import (
    BodyReader,
    Rule,
    documented,
    needs,
    not_honoured,
    reference,
    refusal,
    says,
)
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.openai import (
    MAX_TOP_LOGPROBS,
    Advisory,
    Chunks,
    Flag,
    Limit,
    PromptLogprobs,
    Shown,
    TextBody,
    TextCall,
    TopLogprobs,
    all_logprobs,
    encode,
    finish_reason,
    finite,
    whole_text,
)
from tidegate.gateway.dialects.tools import (
    MAX_TOOLS,
    NO_TOOLS,
    AnswerCall,
    AnswerFunction,
    Asked,
    CalledFunction,
    FunctionChoice,
    Functions,
    NamedFunction,
    ToolCall,
    ToolChoice,
    Tools,
    asked_functions,
    asked_tools,
    call_deltas,
    called,
    function_deltas,
    is_deep,
    whole_calls,
)
from tidegate.gateway.dialects.wire import OPENAI
from tidegate.gateway.sse import text_json
from tidegate.messages.work import ChatPrompt, Finish, Segment, TokenLogprob, Tokens

CallsAs = Literal["tool_calls", "function_call"]
ROLES = "one of system, developer, user, assistant, tool"
CONTENT = 'a text, or a list of parts {"type": "text", "text": ...}'
_PARTS = {"type": "array", "minItems": 1, "items": reference("ContentPart")}
_TEXT_ONLY = "only text goes in and out; leave it out"
_FROM_AN_ANSWER = says("part of an answer that is sent back (not read)")
_THOUGHT = says("what an assistant thought, a text; the model's chat template may show it")


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message's content. Other types than text are refused by name."""

    type: Annotated[str, documented(None, {"const": "text"})]
    text: Annotated[str | None, documented(None, {"type": "string"}, is_required=True)] = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of an answer that is sent back unknown fields are not read: servers put what they like into answers."""

    UNKNOWN: ClassVar[bool] = True
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @staticmethod
    def reads_no_more(message: Mapping[str, Any]) -> bool:
        return message.get("role") == "assistant"

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        says(ROLES),
    ]
    content: Annotated[
        str | list[ContentPart] | None,
        documented(CONTENT, {"anyOf": [{"type": "null"}, {"type": "string"}, _PARTS]}),
    ] = None
    name: Annotated[
        Annotated[str, Meta(max_length=1024)] | None,
        says("who speaks; the model's chat template may show it"),
    ] = None
    refusal: Annotated[str | None, says("what an assistant said in place of content")] = None
    annotations: Annotated[Any, _FROM_AN_ANSWER] = None
    parsed: Annotated[Any, _FROM_AN_ANSWER] = None
    reasoning: Annotated[Any, _THOUGHT] = None
    reasoning_content: Annotated[Any, _THOUGHT] = None
    reasoning_details: Annotated[Any, _FROM_AN_ANSWER] = None
    thinking_blocks: Annotated[Any, _FROM_AN_ANSWER] = None
    provider_specific_fields: Annotated[Any, _FROM_AN_ANSWER] = None
    audio: Annotated[Any, not_honoured("leave it out", [])] = None
    tool_calls: Annotated[
        Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None,
        says("the calls of an assistant's answer, as it had them"),
    ] = None
    function_call: Annotated[CalledFunction | None, says("the older form of one of tool_calls")] = None
    tool_call_id: Annotated[
        Annotated[str, Meta(min_length=1, max_length=256)] | None,
        says("the id of the call that a message of role tool answers"),
    ] = None


_NO_UNKNOWN_BUT_IN_ANSWERS = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {
            "properties": {name: {} for name in Message.__struct_fields__},
            "additionalProperties": {"type": "null"},
        },
    ]
}
_HAS_TEXT = {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}}
_IS_ANSWER = {"properties": {"role": {"const": "assistant"}}}
_OF_ANSWERS_ALONE = {
    "properties": {"tool_calls": {"enum": [None, []]}, "function_call": {"type": "null"}},
}
_NAMES_CALL = {
    "required": ["tool_call_id"],
    "properties": {"role": {"const": "tool"}, "tool_call_id": {"type": "string"}},
}
_NAMES_FUNCTION = {
    "required": ["name"],
    "properties": {
        "role": {"const": "function"},
        "name": {"type": "string", "minLength": 1},
        "tool_call_id": {"type": "null"},
    },
}
_NAMES_NONE = {
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "tool_call_id": {"type": "null"},
    }
}
# What `chat_messages` checks, but for what a message says of those before it.
Message.RULES = tuple(
    Rule(lambda _: None, schema)
    for schema in (
        _NO_UNKNOWN_BUT_IN_ANSWERS,
        {"anyOf": [_IS_ANSWER, _HAS_TEXT]},
        {"anyOf": [_IS_ANSWER, _OF_ANSWERS_ALONE]},
        {"anyOf": [_NAMES_CALL, _NAMES_FUNCTION, _NAMES_NONE]},
    )
)

Messages = Annotated[list[Message], Meta(min_length=1)]
MESSAGES = "a list of at least one message with role and content"


def _check_limits(body: ChatBody) -> None:
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise refusal(
            "max_tokens",
            body.max_tokens,
            f"max_completion_tokens says {body.max_completion_tokens}; send only max_completion_tokens",
        )


# Both limits may be sent where they agree, which a schema cannot say.
_ONE_LIMIT = Rule(
    _check_limits,
    {
        "anyOf": [
            {"properties": {"max_tokens": {"type": "null"}}},
            {"properties": {"max_completion_tokens": {"type": "null"}}},
        ]
    },
)


def _check_end(body: Templated) -> None:
    if body.continue_final_message and body.add_generation_prompt:
        raise refusal(
            "continue_final_message", True, "it excludes add_generation_prompt: true; send one of them"
        )


ONE_END = Rule(
    _check_end,
    {
        "anyOf": [
            {"properties": {name: {"enum": [False, None]}}}
            for name in ("continue_final_message", "add_generation_prompt")
        ]
    },
)


def _check_template_args(body: Any) -> None:
    args = body.chat_template_kwargs or {}
    if name := next((name for name in args if name in NOT_VARIABLES), None):
        raise refusal(
            f"chat_template_kwargs.{name}", args[name], "it is no variable of a template; leave it out"
        )
    if args and not _is_small(args):
        raise refusal(
            "chat_template_kwargs", "given", f"it has at most {_MOST_ARGS_BYTES} bytes and 16 levels"
        )


def _is_small(args: dict[str, Any]) -> bool:
    return not is_deep(args, _MOST_ARGS_DEPTH) and len(encode(args)) <= _MOST_ARGS_BYTES


TemplateArgs = Annotated[
    Annotated[dict[Annotated[str, Meta(max_length=64)], Any], Meta(max_length=32)] | None,
    says("at most 32 variables of the model's chat template, such as enable_thinking"),
]
OtherTemplate = Annotated[Any, not_honoured("the model's own is used; leave it out")]
_MOST_ARGS_BYTES, _MOST_ARGS_DEPTH = 1 << 14, 16
# What a request says elsewhere, or what the call that renders a template takes for itself.
NOT_VARIABLES = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)
# The size of it all the document leaves out.
TEMPLATE_ARGS = Rule(
    _check_template_args,
    {
        "properties": {
            "chat_template_kwargs": {"propertyNames": {"not": {"enum": sorted(NOT_VARIABLES)}}},
        }
    },
)


def _check_tools(body: ChatBody) -> None:
    if body.tools and body.functions:
        raise refusal("functions", "given", "tools are given; send only tools")
    choice = body.tool_choice
    if not body.tools and choice is not None and choice not in ("none", "auto"):
        raise refusal("tool_choice", choice, "it needs tools")
    if not body.functions and isinstance(body.function_call, NamedFunction):
        raise refusal("function_call", body.function_call, "it needs functions")


# The document leaves them out: with one more choice between schemas no tool can make bodies from it.
_TOOLS = Rule(_check_tools, {})


class ChatBody(TextBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        *TextBody.RULES,
        needs("top_logprobs", "logprobs"),
        _ONE_LIMIT,
        ONE_END,
        TEMPLATE_ARGS,
        _TOOLS,
    )

    messages: Annotated[Messages, says(MESSAGES)]
    max_tokens: Annotated[Limit | None, says("a whole number of tokens to generate at most")] = None
    max_completion_tokens: Annotated[
        Limit | None, says("tokens to generate at most, a whole number; left out: up to the context length")
    ] = None
    logprobs: Flag = None
    top_logprobs: Annotated[
        TopLogprobs | None,
        says(f"a whole number from 0 to {MAX_TOP_LOGPROBS}, together with logprobs: true"),
    ] = None
    audio: Annotated[Any, not_honoured(_TEXT_ONLY)] = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: Annotated[
        bool | None, says("false: an answer has one call at most; left out: true")
    ] = None
    functions: Functions = None
    function_call: FunctionChoice = None
    modalities: Annotated[Any, not_honoured(_TEXT_ONLY, ["text"])] = None
    moderation: Annotated[Any, not_honoured("moderation is not supported; leave it out")] = None
    # The fields below are vLLM's.
    echo: Flag = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    documents: Annotated[
        Annotated[list[dict[str, str]], Meta(max_length=256)] | None,
        says("at most 256 objects of texts, which the model's chat template may show"),
    ] = None
    chat_template: OtherTemplate = None
    chat_template_kwargs: TemplateArgs = None
    include_reasoning: Annotated[
        bool | None, says("false: what the model thinks is left out of the answer; left out: true")
    ] = None
    prediction: Annotated[Any, says("a guess at the answer (advisory: not acted on)")] = None
    prompt_cache_options: Annotated[Any, says("(advisory: not acted on)")] = None
    prompt_cache_retention: Advisory = None
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        says("none, minimal, low, medium, high, xhigh or max; the model's chat template may act on it"),
    ] = None
    verbosity: Annotated[Any, not_honoured("verbosity is not steered; leave it out", "medium")] = None
    web_search_options: Annotated[Any, not_honoured("web search is not supported; leave it out")] = None


ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob] | None
    refusal: None = None


class ChatAnswerMessage(msgspec.Struct):
    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[AnswerCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: AnswerFunction | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Chat:
    path = "/v1/chat/completions"
    task = "generate"
    id_prefix = "chatcmpl-"
    may_stream = True
    wire = OPENAI
    operation_id, summary = "create_chat_completion", "Answer a conversation"
    body, answer = ChatBody, ChatCompletion
    answer_description = "The answer, or its events where stream is true"
    _reader = BodyReader(ChatBody)

    def read(self, raw: bytes) -> ChatCall:
        return ChatCall(self._reader.read(raw))


class ChatCall(TextCall):
    __slots__ = ("_calls_as", "_echoed", "_role", "_shows_reasoning")
    prompt_field = "messages"
    answer_type, answer_object, has_one_prompt = ChatCompletion, "chat.completion", True

    def __init__(self, body: ChatBody) -> None:
        messages = chat_messages(body.messages)
        last = messages[-1]
        self._role = "assistant" if begins_turn(body) else last["role"]
        self._echoed = last["content"] if body.echo and last["role"] == self._role else ""
        self._shows_reasoning = body.include_reasoning is not False
        self._calls_as: CallsAs = "function_call" if body.functions else "tool_calls"
        if body.functions:
            tools = asked_functions(body.functions, body.function_call)
        else:
            tools = asked_tools(body.tools or (), body.tool_choice, body.parallel_tool_calls)
        super().__init__(
            body,
            [chat_prompt(body, messages, _template_args(body), tools)],
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        self.schemas = tools.schemas

    def events(self, head: AnswerHead) -> ChatEvents:
        has_logprobs = self.top_logprobs is not None
        return ChatEvents(
            head,
            self.shown,
            has_logprobs=has_logprobs,
            role=self._role,
            echoed=self._echoed,
            calls_as=self._calls_as,
            shows_reasoning=self._shows_reasoning,
        )

    def choice(self, index: int, segments: Sequence[Segment]) -> ChatChoice:
        message = ChatAnswerMessage(self._role, self._echoed + whole_text(segments))
        if self._shows_reasoning and (reasoning := whole_reasoning(segments)):
            message.reasoning_content = reasoning
        if calls := whole_calls(segments):
            message.content = message.content or None
            if self._calls_as == "tool_calls":
                message.tool_calls = calls
            else:
                message.function_call = calls[0].function
        logprobs = None
        if self.top_logprobs is not None:
            logprobs = ChatLogprobs(chat_logprobs(self.shown.entries(all_logprobs(segments))))
        reason = chat_finish_reason(segments[-1].finish, self._calls_as if calls else None)
        return ChatChoice(index, message, logprobs, reason, **self.token_ids(segments))


def chat_finish_reason(finish: Finish | None, calls_as: CallsAs | None) -> ChatFinishReason:
    """`calls_as`: the form of the calls in an answer that has some."""
    reason = finish_reason(finish)
    return calls_as if calls_as is not None and reason == "stop" else reason


def whole_reasoning(segments: Sequence[Segment]) -> str:
    return "".join([segment.output.reasoning for segment in segments])


def _template_args(body: ChatBody) -> dict[str, Any]:
    args = dict(body.chat_template_kwargs or {})
    if body.documents is not None:
        args["documents"] = body.documents
    if (effort := body.reasoning_effort) is not None:
        args = {"enable_thinking": effort != "none", **args, "reasoning_effort": effort}
    return args


class Templated(Protocol):
    """The fields of a body that say how messages are written."""

    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def add_special_tokens(self) -> bool | None: ...


def begins_turn(body: Templated) -> bool:
    if body.add_generation_prompt is None:
        return not body.continue_final_message
    return body.add_generation_prompt


def chat_prompt(
    body: Templated, messages: list[dict[str, Any]], args: dict[str, Any], tools: Asked = NO_TOOLS
) -> ChatPrompt:
    return ChatPrompt(
        messages,
        add_generation_prompt=begins_turn(body),
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        template_args=args,
        tools=tools.tools,
        tool_choice=tools.choice,
        parallel_tool_calls=tools.is_parallel,
    )


class ChatEvents(Chunks):
    """`chat.completion.chunk`: the role first, then text, then an empty delta with the finish reason.

    As vLLM's, tokens without text (special ones, parts of a character) have a chunk: benchmarks time each.
    """

    __slots__ = (
        "_begun",
        "_called",
        "_calls_as",
        "_echoed",
        "_has_logprobs",
        "_role",
        "_shows_reasoning",
    )

    def __init__(
        self,
        head: AnswerHead,
        shown: Shown,
        *,
        has_logprobs: bool,
        role: str = "assistant",
        echoed: str = "",
        calls_as: CallsAs = "tool_calls",
        shows_reasoning: bool = True,
    ) -> None:
        super().__init__(head, b"chat.completion.chunk", shown)
        self._begun: set[int] = set()
        self._has_logprobs = has_logprobs
        self._role = b'{"role":%b,"content":"","refusal":null}' % text_json(role)
        self._echoed = echoed
        self._calls_as: CallsAs = calls_as
        self._called: set[int] = set()  # choices that have calls
        self._shows_reasoning = shows_reasoning

    def render(self, index: int, segment: Segment) -> bytes:
        if self._shown.has_running_usage:
            self.count(index, segment)
        out, output = b"", segment.output
        if index not in self._begun:
            self._begun.add(index)
            prompt_ids = self.token_ids(output.prompt_ids, b"prompt_token_ids")
            out = self.chunk(_choice(index, self._role), prompt_ids)
            if self._echoed:
                out += self.chunk(_choice(index, b'{"content":%b}' % text_json(self._echoed)))
        text, token_ids, logprobs = output.text, b"", b"null"
        if self._shown.has_token_ids:
            token_ids = self.token_ids(output.token_ids)
        if self._has_logprobs and output.logprobs:
            entries = encode(chat_logprobs(self._shown.entries(output.logprobs)))
            logprobs = b'{"content":%b,"refusal":null}' % entries
        if output.calls or output.reasoning:
            for delta in self._deltas(index, output):
                out += self.chunk(_choice(index, delta, logprobs, more=token_ids))
                token_ids, logprobs = b"", b"null"
        elif text or output.token_ids or logprobs != b"null":
            delta = b'{"content":%b}' % text_json(text)
            out += self.chunk(_choice(index, delta, logprobs, more=token_ids))
        if segment.finish is not None:
            calls_as = self._calls_as if index in self._called else None
            reason = b'"%b"' % chat_finish_reason(segment.finish, calls_as).encode()
            out += self.chunk(_choice(index, b"{}", reason=reason))
        return out

    def _deltas(self, index: int, output: Tokens) -> list[bytes]:
        """What a step adds beside or instead of content: at least one delta."""
        deltas = []
        if output.reasoning and self._shows_reasoning:
            deltas.append(b'{"reasoning_content":%b}' % text_json(output.reasoning))
        if output.text:
            deltas.append(b'{"content":%b}' % text_json(output.text))
        if output.calls:
            self._called.add(index)
            as_deltas = call_deltas if self._calls_as == "tool_calls" else function_deltas
            deltas += as_deltas(output.calls)
        return deltas or [b'{"content":""}']


def _choice(
    index: int, delta: bytes, logprobs: bytes = b"null", reason: bytes = b"null", more: bytes = b""
) -> bytes:
    return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b}' % (
        index,
        delta,
        logprobs,
        reason,
        more,
    )


class _Calls(NamedTuple):
    """Those of the messages so far."""

    functions: dict[str, str]  # by id, whom it calls
    last: dict[str, str]  # by function, the id of its last one

    def add(self, call_id: str, function: str) -> None:
        self.functions[call_id] = function
        self.last[function] = call_id


def chat_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them.

    `developer` becomes `system`; text parts are joined with a newline; the arguments of calls become objects.
    Raises `InvalidRequest`, also for what answers no call.
    """
    calls = _Calls({}, {})
    return [_message(f"messages[{index}]", message, calls) for index, message in enumerate(messages)]


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[ChatTokenLogprob]:
    return [
        ChatTokenLogprob(
            token.token,
            finite(token.logprob),
            list(token.raw),
            [TopLogprob(text, finite(value), list(raw)) for _, text, value, raw in token.top],
        )
        for token in tokens
    ]


def _message(where: str, message: Message, calls: _Calls) -> dict[str, Any]:
    role, content = message.role, message.content
    if message.audio:
        raise refusal(f"{where}.audio", message.audio, "it is not honoured; leave it out")
    if content is None and role == "assistant":
        content = message.refusal or ""
    if not content:
        if content != "":
            raise refusal(f"{where}.content", content, f"use {CONTENT}")
    elif not isinstance(content, str):
        content = "\n".join(_texts(f"{where}.content", content))
    made: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if message.name:
        made["name"] = message.name
    if role in ("tool", "function"):
        return made | _answers(where, message, calls)
    if message.tool_call_id is not None:
        raise refusal(f"{where}.tool_call_id", message.tool_call_id, "only a message of role tool has it")
    if role == "assistant":
        return made | _answered(message, calls)
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise refusal(f"{where}.{name}", "given", "only a message of role assistant has it")
    return made


def _answered(message: Message, calls: _Calls) -> dict[str, Any]:
    """What an answer that is sent back had beside content; its calls are taken up."""
    made: dict[str, Any] = {}
    thought = message.reasoning_content or message.reasoning
    if thought and isinstance(thought, str):
        made["reasoning_content"] = thought
    found = [
        called(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ()
    ]
    if (function := message.function_call) is not None and not found:
        # The older form has no ids; templates may want such as they would have given.
        found = [called(function.name, function.arguments, f"call{len(calls.functions):05}")]
    if found:
        made["tool_calls"] = found
        for call in found:
            calls.add(call["id"], call["function"]["name"])
    return made


def _answers(where: str, message: Message, calls: _Calls) -> dict[str, Any]:
    """Whom a result is of. Templates may want the name of what was called."""
    asked = message.tool_call_id
    if message.role == "function":
        if asked is not None:
            raise refusal(f"{where}.tool_call_id", asked, "only a message of role tool has it")
        if not message.name:
            raise refusal(f"{where}.name", message.name, "send the name of the function that this is from")
        asked = calls.last.get(message.name)
        if asked is None:
            raise refusal(f"{where}.name", message.name, "no answer before it calls that function")
    elif asked is None:
        raise refusal(f"{where}.tool_call_id", None, "send the id of the call that this answers")
    elif asked not in calls.functions:
        raise refusal(f"{where}.tool_call_id", asked, "no answer before it has a call with that id")
    return {"role": "tool", "tool_call_id": asked, "name": message.name or calls.functions[asked]}


def _texts(where: str, parts: list[ContentPart]) -> list[str]:
    texts = []
    for index, part in enumerate(parts):
        if part.type != "text":
            raise refusal(
                f"{where}[{index}].type", part.type, f"only text parts are supported; use {CONTENT}"
            )
        if part.text is None:
            raise refusal(f"{where}[{index}].text", None, "a text part needs text")
        texts.append(part.text)
    return texts

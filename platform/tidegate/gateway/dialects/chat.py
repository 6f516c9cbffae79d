"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Protocol

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import (
    BodyReader,
    Rule,
    documented,
    needs,
    not_honoured,
    not_honoured_fields,
    reference,
    refusal,
    says,
)
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.openai import (
    MAX_TOP_LOGPROBS,
    Advisory,
    Chunks,
    FinishReason,
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
from tidegate.gateway.dialects.wire import OPENAI
from tidegate.gateway.sse import text_json
from tidegate.messages.work import ChatPrompt, Segment, TokenLogprob

ROLES = "one of system, developer, user, assistant"
CONTENT = 'a text, or a list of parts {"type": "text", "text": ...}'
_PARTS = {"type": "array", "minItems": 1, "items": reference("ContentPart")}
_NO_TOOLS = "tools and functions are not supported; leave it out"
_TEXT_ONLY = "only text goes in and out; leave it out"
_IN_A_MESSAGE = not_honoured("leave it out", [])
_FROM_AN_ANSWER = says("part of an answer that is sent back (not read)")


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
        documented(ROLES, {"enum": ["system", "developer", "user", "assistant"]}),
    ]
    content: Annotated[
        str | list[ContentPart] | None,
        documented(CONTENT, {"anyOf": [{"type": "string"}, _PARTS]}, is_required=True),
    ] = None
    name: Annotated[
        Annotated[str, Meta(max_length=1024)] | None,
        says("who speaks; the model's chat template may show it"),
    ] = None
    refusal: Annotated[str | None, says("what an assistant said in place of content")] = None
    annotations: Annotated[Any, _FROM_AN_ANSWER] = None
    parsed: Annotated[Any, _FROM_AN_ANSWER] = None
    reasoning: Annotated[Any, _FROM_AN_ANSWER] = None
    reasoning_content: Annotated[Any, _FROM_AN_ANSWER] = None
    reasoning_details: Annotated[Any, _FROM_AN_ANSWER] = None
    thinking_blocks: Annotated[Any, _FROM_AN_ANSWER] = None
    provider_specific_fields: Annotated[Any, _FROM_AN_ANSWER] = None
    audio: Annotated[Any, _IN_A_MESSAGE] = None
    tool_calls: Annotated[Any, _IN_A_MESSAGE] = None
    function_call: Annotated[Any, _IN_A_MESSAGE] = None
    tool_call_id: Annotated[Any, _IN_A_MESSAGE] = None


_NO_UNKNOWN_BUT_IN_ANSWERS = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {
            "properties": {name: {} for name in Message.__struct_fields__},
            "additionalProperties": {"type": "null"},
        },
    ]
}
Message.RULES = (Rule(lambda _: None, _NO_UNKNOWN_BUT_IN_ANSWERS),)

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
    depth, level = 0, list[Any]([args])
    while level and depth <= 16:
        children = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for child in children for item in child if isinstance(item, (dict, list))]
        depth += 1
    return not level and len(encode(args)) <= _MOST_ARGS_BYTES


TemplateArgs = Annotated[
    Annotated[dict[Annotated[str, Meta(max_length=64)], Any], Meta(max_length=32)] | None,
    says("at most 32 variables of the model's chat template, such as enable_thinking"),
]
OtherTemplate = Annotated[Any, not_honoured("the model's own is used; leave it out")]
_MOST_ARGS_BYTES = 1 << 14
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


class ChatBody(TextBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        *TextBody.RULES,
        needs("top_logprobs", "logprobs"),
        _ONE_LIMIT,
        ONE_END,
        TEMPLATE_ARGS,
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
    function_call: Annotated[Any, not_honoured(_NO_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, not_honoured(_NO_TOOLS, [])] = None
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
        Any, not_honoured("reasoning is part of the text; use true or leave it out", True)
    ] = None
    parallel_tool_calls: Annotated[Any, not_honoured(_NO_TOOLS, True)] = None
    prediction: Annotated[Any, says("a guess at the answer (advisory: not acted on)")] = None
    prompt_cache_options: Annotated[Any, says("(advisory: not acted on)")] = None
    prompt_cache_retention: Advisory = None
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        says("none, minimal, low, medium, high, xhigh or max; the model's chat template may act on it"),
    ] = None
    response_format: Annotated[
        Any, not_honoured('only {"type": "text"} is supported; leave it out', {"type": "text"})
    ] = None
    tool_choice: Annotated[Any, not_honoured(_NO_TOOLS, "none", "auto")] = None
    tools: Annotated[Any, not_honoured(_NO_TOOLS, [])] = None
    verbosity: Annotated[Any, not_honoured("verbosity is not steered; leave it out", "medium")] = None
    web_search_options: Annotated[Any, not_honoured("web search is not supported; leave it out")] = None


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


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
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
    __slots__ = ("_echoed", "_role")
    prompt_field = "messages"
    answer_type, answer_object, has_one_prompt = ChatCompletion, "chat.completion", True

    def __init__(self, body: ChatBody) -> None:
        messages = chat_messages(body.messages)
        last = messages[-1]
        self._role = "assistant" if begins_turn(body) else last["role"]
        self._echoed = last["content"] if body.echo and last["role"] == self._role else ""
        super().__init__(
            body,
            [chat_prompt(body, messages, _template_args(body))],
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    def events(self, head: AnswerHead) -> ChatEvents:
        has_logprobs = self.top_logprobs is not None
        return ChatEvents(head, self.shown, has_logprobs=has_logprobs, role=self._role, echoed=self._echoed)

    def choice(self, index: int, segments: Sequence[Segment]) -> ChatChoice:
        message = ChatAnswerMessage(self._role, self._echoed + whole_text(segments))
        logprobs = None
        if self.top_logprobs is not None:
            logprobs = ChatLogprobs(chat_logprobs(self.shown.entries(all_logprobs(segments))))
        reason = finish_reason(segments[-1].finish)
        return ChatChoice(index, message, logprobs, reason, **self.token_ids(segments))


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


def chat_prompt(body: Templated, messages: list[dict[str, Any]], args: dict[str, Any]) -> ChatPrompt:
    return ChatPrompt(
        messages,
        add_generation_prompt=begins_turn(body),
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        template_args=args,
    )


class ChatEvents(Chunks):
    """`chat.completion.chunk`: the role first, then text, then an empty delta with the finish reason.

    As vLLM's, tokens without text (special ones, parts of a character) have a chunk: benchmarks time each.
    """

    __slots__ = ("_begun", "_echoed", "_has_logprobs", "_role")

    def __init__(
        self, head: AnswerHead, shown: Shown, *, has_logprobs: bool, role: str = "assistant", echoed: str = ""
    ) -> None:
        super().__init__(head, b"chat.completion.chunk", shown)
        self._begun: set[int] = set()
        self._has_logprobs = has_logprobs
        self._role = b'{"role":%b,"content":"","refusal":null}' % text_json(role)
        self._echoed = echoed

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
        if text or output.token_ids or logprobs != b"null":
            delta = b'{"content":%b}' % text_json(text)
            out += self.chunk(_choice(index, delta, logprobs, more=token_ids))
        if segment.finish is not None:
            reason = b'"%b"' % finish_reason(segment.finish).encode()
            out += self.chunk(_choice(index, b"{}", reason=reason))
        return out


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


def chat_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Plain role and content pairs for a chat template.

    `developer` becomes `system`; text parts are joined with a newline. Raises `InvalidRequest`.
    """
    return [_message(index, message) for index, message in enumerate(messages)]


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


_UNUSED = tuple(not_honoured_fields(Message))
_unused_values = attrgetter(*_UNUSED)
_UNUSED_ABSENT = (None,) * len(_UNUSED)


def _message(index: int, message: Message) -> dict[str, Any]:
    role, content = message.role, message.content
    if role in ("tool", "function"):
        raise refusal(f"messages[{index}].role", role, f"tools are not supported; use {ROLES}")
    if _unused_values(message) != _UNUSED_ABSENT:
        for name, value in zip(_UNUSED, _unused_values(message), strict=True):
            if value is not None and value != []:
                raise refusal(f"messages[{index}].{name}", value, "it is not honoured; leave it out")
    if content is None and role == "assistant":
        content = message.refusal or ""
    if not content:
        if content != "":
            raise refusal(f"messages[{index}].content", content, f"use {CONTENT}")
    elif not isinstance(content, str):
        content = "\n".join(_texts(f"messages[{index}].content", content))
    made = {"role": "system" if role == "developer" else role, "content": content}
    if message.name:
        made["name"] = message.name
    return made


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

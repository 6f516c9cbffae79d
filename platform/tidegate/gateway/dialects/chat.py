"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

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
    Chunks,
    FinishReason,
    Flag,
    Limit,
    TextBody,
    TextCall,
    all_logprobs,
    encode,
    finish_reason,
    finite,
    whole_text,
)
from tidegate.gateway.sse import text_json
from tidegate.messages.work import ChatPrompt, Segment, TokenLogprob

ROLES = "one of system, developer, user, assistant"
CONTENT = 'a text, or a list of parts {"type": "text", "text": ...}'
_PARTS = {"type": "array", "minItems": 1, "items": reference("ContentPart")}
_NO_TOOLS = "tools and functions are not supported; leave it out"
_TEXT_ONLY = "only text goes in and out; leave it out"
_NOT_CACHED = "prompts are not cached; leave it out"
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


class ChatBody(TextBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    RULES: ClassVar[tuple[Rule, ...]] = (*TextBody.RULES, needs("top_logprobs", "logprobs"), _ONE_LIMIT)

    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1)],
        says("a list of at least one message with role and content"),
    ]
    max_tokens: Annotated[Limit | None, says("a whole number of tokens to generate at most")] = None
    max_completion_tokens: Annotated[
        Limit | None, says("tokens to generate at most, a whole number; left out: up to the context length")
    ] = None
    logprobs: Flag = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        says("a whole number from 0 to 20, together with logprobs: true"),
    ] = None
    audio: Annotated[Any, not_honoured(_TEXT_ONLY)] = None
    function_call: Annotated[Any, not_honoured(_NO_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, not_honoured(_NO_TOOLS, [])] = None
    modalities: Annotated[Any, not_honoured(_TEXT_ONLY, ["text"])] = None
    moderation: Annotated[Any, not_honoured("moderation is not supported; leave it out")] = None
    add_generation_prompt: Annotated[
        Any, not_honoured("the answer is always the assistant's next turn; leave it out", True)
    ] = None
    add_special_tokens: Annotated[
        Any, not_honoured("the chat template writes them; use false or leave it out", False)
    ] = None
    chat_template: Annotated[Any, not_honoured("the model's own is used; leave it out")] = None
    chat_template_kwargs: Annotated[
        Any, not_honoured("the template takes no arguments here; leave it out", {})
    ] = None
    continue_final_message: Annotated[
        Any, not_honoured("the answer is always a new message; leave it out", False)
    ] = None
    parallel_tool_calls: Annotated[Any, not_honoured(_NO_TOOLS, True)] = None
    prediction: Annotated[Any, not_honoured("predicted outputs are not supported; leave it out")] = None
    prompt_cache_options: Annotated[Any, not_honoured(_NOT_CACHED)] = None
    prompt_cache_retention: Annotated[Any, not_honoured(_NOT_CACHED, "in_memory")] = None
    reasoning_effort: Annotated[Any, not_honoured("reasoning is not steered; leave it out", "none")] = None
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
    role: Literal["assistant"]
    content: str | None
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class Chat:
    path = "/v1/chat/completions"
    id_prefix = "chatcmpl-"
    prompt_field = "messages"
    operation_id, summary = "create_chat_completion", "Answer a conversation"
    body, answer = ChatBody, ChatCompletion
    answer_description = "The answer, or its events where stream is true"
    _reader = BodyReader(ChatBody)

    def read(self, raw: bytes) -> ChatCall:
        return ChatCall(self._reader.read(raw))


class ChatCall(TextCall):
    __slots__ = ()
    answer_type, answer_object = ChatCompletion, "chat.completion"

    def __init__(self, body: ChatBody) -> None:
        super().__init__(
            body,
            [ChatPrompt(chat_messages(body.messages))],
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )

    def events(self, head: AnswerHead) -> ChatEvents:
        return ChatEvents(head, has_usage=self.has_usage, has_logprobs=self.top_logprobs is not None)

    def choice(self, index: int, segments: Sequence[Segment]) -> ChatChoice:
        message = ChatAnswerMessage("assistant", whole_text(segments))
        has_logprobs = self.top_logprobs is not None
        logprobs = ChatLogprobs(chat_logprobs(all_logprobs(segments))) if has_logprobs else None
        return ChatChoice(index, message, logprobs, finish_reason(segments[-1].finish))


class ChatEvents(Chunks):
    """`chat.completion.chunk`: the role first, then text, then an empty delta with the finish reason."""

    __slots__ = ("_begun", "_has_logprobs")

    def __init__(self, head: AnswerHead, *, has_usage: bool, has_logprobs: bool) -> None:
        super().__init__(head, b"chat.completion.chunk", has_usage=has_usage)
        self._begun: set[int] = set()
        self._has_logprobs = has_logprobs

    def render(self, index: int, segment: Segment) -> bytes:
        out = b""
        chunk = self.chunk
        if index not in self._begun:
            self._begun.add(index)
            out = chunk(b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}' % (index, _ROLE))
        text, logprobs = segment.output.text, segment.output.logprobs
        if self._has_logprobs and logprobs:
            out += chunk(
                b'{"index":%d,"delta":{"content":%b},"logprobs":{"content":%b,"refusal":null},"finish_reason":null}'
                % (index, text_json(text), encode(chat_logprobs(logprobs)))
            )
        elif text:
            out += chunk(
                b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
                % (index, text_json(text))
            )
        if segment.finish is not None:
            reason = finish_reason(segment.finish).encode()
            out += chunk(b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}' % (index, reason))
        return out


_ROLE = b'{"role":"assistant","content":"","refusal":null}'


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

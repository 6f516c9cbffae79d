"""`POST /v1/responses`: OpenAI's Responses API, and the objects and events of its other endpoints.

A response is one item of text. Whatever shows one (the answer, the events that carry it,
`GET /v1/responses/{id}`) makes it of the call's body and its segments, so every gateway shows the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from tidegate.gateway.bodies import (
    BodyReader,
    RequestBody,
    Rule,
    documented,
    needs,
    not_honoured,
    reference,
    refusal,
    says,
)
from tidegate.gateway.dialects.base import AnswerHead, Ask, Usage
from tidegate.gateway.dialects.chat import ChatTokenLogprob, chat_logprobs
from tidegate.gateway.dialects.generate import generate_asks
from tidegate.gateway.dialects.openai import (
    MAX_TOP_LOGPROBS,
    Advisory,
    Flag,
    Limit,
    Metadata,
    Penalty,
    Share,
    Temperature,
    TopLogprobs,
    encode,
)
from tidegate.gateway.dialects.structured import JsonSchema
from tidegate.gateway.dialects.wire import OPENAI
from tidegate.gateway.grammars import Constraint
from tidegate.gateway.sse import text_json
from tidegate.messages.work import MODEL_DEFAULTS, ChatPrompt, Finish, Sampling, Segment

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
CONTENT = 'a text, or a list of parts {"type": "input_text", "text": ...}'
INPUT = "a text, or a list of messages with role and content"
MOST_ITEMS = 4096
_NO_TOOLS = "tools are not supported; leave it out"
LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputPart(msgspec.Struct, kw_only=True):
    """One part of a message's content. Other than texts are refused by name."""

    type: Annotated[str, documented(None, {"enum": [*TEXT_PARTS, "refusal"]})]
    text: Annotated[str | None, documented(None, {"type": "string"}, is_required=True)] = None
    refusal: Annotated[str | None, says("what an assistant said in place of text")] = None


class InputItem(msgspec.Struct, kw_only=True):
    """A message, of the client or of an answer that is sent back. Other items are refused by name."""

    type: Annotated[str | None, documented(None, {"enum": ["message", None]})] = None
    role: Annotated[str | None, documented("who speaks", {"enum": list(ROLES)}, is_required=True)] = None
    content: Annotated[
        str | list[InputPart] | None,
        documented(
            CONTENT,
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": reference("InputPart")},
                ]
            },
            is_required=True,
        ),
    ] = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None  # padding against eavesdroppers: none is sent


class FreeText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """The model says what it likes."""


class JsonObject(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"
):
    """Any JSON object."""


class JsonOfSchema(JsonSchema, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """As `json_schema` of chat completions, but flat."""


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`text`: how the text of an answer is made."""

    format: Annotated[
        FreeText | JsonObject | JsonOfSchema | None,
        says(
            '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "name": ..., "schema": ...}'
        ),
    ] = None
    verbosity: Annotated[Any, documented("verbosity is not steered", {"enum": [None, "medium"]})] = None


class ReasoningConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`reasoning`: the model's chat template may act on the effort."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # there is nothing to sum up
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


def _check_background(body: ResponsesBody) -> None:
    if body.background and body.store is False:
        raise refusal("background", True, "its answer has to be stored; leave store out")


def _check_text(body: ResponsesBody) -> None:
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise refusal("text.verbosity", body.text.verbosity, "verbosity is not steered; leave it out")


_STORED = Rule(
    _check_background,
    {
        "anyOf": [
            {"properties": {"background": {"enum": [False, None]}}},
            {"properties": {"store": {"enum": [True, None]}}},
        ]
    },
)


class ResponsesBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/responses`."""

    RULES: ClassVar[tuple[Rule, ...]] = (needs("stream_options", "stream"), _STORED, Rule(_check_text, {}))

    model: Annotated[
        str, Meta(min_length=1, max_length=256, description="the name of a model that GET /v1/models lists")
    ]
    input: Annotated[
        str | Annotated[list[InputItem], Meta(min_length=1, max_length=MOST_ITEMS)],
        documented(
            INPUT,
            {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": MOST_ITEMS,
                        "items": reference("InputItem"),
                    },
                ]
            },
        ),
    ]
    instructions: Annotated[
        str | None, says("a system message before everything else, for this answer alone")
    ] = None
    previous_response_id: Annotated[
        Annotated[str, Meta(min_length=1, max_length=128)] | None,
        says("the id of a stored response, whose conversation goes on"),
    ] = None
    store: Annotated[
        bool | None,
        says(
            "whether the response can be read again and gone on from; left out: where what is kept has room"
        ),
    ] = None
    background: Annotated[
        bool | None, says("true: answered at once, and made whether or not somebody waits")
    ] = None
    stream: Flag = None
    stream_options: Annotated[
        ResponseStreamOptions | None, says('{"include_obfuscation": false} together with stream: true')
    ] = None
    max_output_tokens: Annotated[
        Limit | None, says("tokens to generate at most, a whole number; left out: up to the context length")
    ] = None
    temperature: Annotated[Temperature | None, says("a number from 0 (greedy) to 2; left out: 1")] = None
    top_p: Annotated[Share | None, says("a number from 0 to 1; left out: 1")] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    top_logprobs: Annotated[
        TopLogprobs | None, says(f"alternatives for each token, a whole number from 0 to {MAX_TOP_LOGPROBS}")
    ] = None
    include: Annotated[
        Annotated[list[Include], Meta(max_length=16)] | None,
        says(f"{LOGPROBS}: log probabilities; the others name what no answer here has"),
    ] = None
    text: Annotated[TextConfig | None, says('{"format": ...}: how the text of the answer is formed')] = None
    reasoning: Annotated[
        ReasoningConfig | None, says('{"effort": ...}: the model\'s chat template may act on it')
    ] = None
    metadata: Annotated[Metadata | None, says("at most 16 pairs of texts, which the response shows")] = None
    user: Annotated[
        Annotated[str, Meta(max_length=1024)] | None,
        says(
            "a text of at most 1024 characters: while a model changes, one user's calls stay on one revision"
        ),
    ] = None
    safety_identifier: Advisory = None
    prompt_cache_key: Advisory = None
    prompt_cache_retention: Advisory = None
    prompt_cache_options: Annotated[Any, says("(advisory: not acted on)")] = None
    service_tier: Annotated[
        Any, not_honoured("there is one tier; use auto or leave it out", "auto", "default")
    ] = None
    truncation: Annotated[
        Any, not_honoured("a conversation is not cut; use disabled or leave it out", "disabled")
    ] = None
    tools: Annotated[Any, not_honoured(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, not_honoured(_NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[Any, not_honoured(_NO_TOOLS, True, False)] = None
    max_tool_calls: Annotated[Any, not_honoured(_NO_TOOLS)] = None
    conversation: Annotated[
        Any, not_honoured("conversations are not kept by name; use previous_response_id")
    ] = None
    prompt: Annotated[Any, not_honoured("prompts are not kept; send instructions and input")] = None
    context_management: Annotated[Any, not_honoured("a conversation is not shortened; leave it out", [])] = (
        None
    )
    moderation: Annotated[Any, not_honoured("moderation is not supported; leave it out")] = None


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class ResponseError(msgspec.Struct):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens"]


class TextShown(msgspec.Struct):
    format: Any


class ReasoningShown(msgspec.Struct):
    effort: str | None
    summary: str | None


class InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens_details: OutputDetails = OutputDetails()


class Response(msgspec.Struct, kw_only=True):
    """OpenAI's object. What was left out of the body shows what that means."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningShown | None
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextShown
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


class Responses:
    path = "/v1/responses"
    task = "generate"
    id_prefix = "resp_"
    may_stream = True
    wire = OPENAI
    operation_id, summary = "create_response", "Answer, and remember the answer"
    body, answer = ResponsesBody, Response
    answer_description = "The response, or its events where stream is true; in the background: as it begins"
    _reader = BodyReader(ResponsesBody)

    def read(self, raw: bytes) -> ResponseCall:
        return ResponseCall(self._reader.read(raw))


class ResponseCall:
    __slots__ = (
        "_messages",
        "_sampling",
        "body",
        "constraint",
        "is_stored",
        "is_streamed",
        "model",
        "n",
        "previous",
        "user",
    )
    prompt_field = "input"

    def __init__(self, body: ResponsesBody) -> None:
        self.body = body
        self.constraint = _constraint(body)
        self.model, self.n = body.model, 1
        self.is_streamed = bool(body.stream)
        self.user = body.user or ""
        self.is_stored = body.store is not False  # until it turns out that there is no room
        self.previous: list[dict[str, Any]] = []  # messages of the conversation before
        self._messages = input_messages(body.input)
        has_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or ())
        self._sampling = Sampling(
            seed=0,  # its own
            max_tokens=body.max_output_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            top_logprobs=body.top_logprobs or 0 if has_logprobs else None,
            left_out=tuple(name for name in MODEL_DEFAULTS if getattr(body, name, None) is None),
        )

    def conversation(self) -> list[dict[str, Any]]:
        """What a later response that goes on from this one has before it, without the answer."""
        return [*self.previous, *self._messages]

    def follow(self, grammar: str) -> None:
        self._sampling = replace(self._sampling, grammar=grammar)

    def asks(self, random_seed: int) -> list[Ask]:
        messages = self.conversation()
        if self.body.instructions:
            messages.insert(0, {"role": "system", "content": self.body.instructions})
        self._messages = []
        args: dict[str, Any] = {}
        if self.body.reasoning is not None and (effort := self.body.reasoning.effort) is not None:
            args = {"enable_thinking": effort != "none", "reasoning_effort": effort}
        return generate_asks([ChatPrompt(messages, template_args=args)], 1, self._sampling, None, random_seed)

    def events(self, head: AnswerHead) -> ResponseEvents:
        return ResponseEvents(head, self)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        return encode(self.response(head, choices[0]))

    def response(
        self,
        head: AnswerHead,
        segments: Sequence[Segment],
        *,
        status: Status | None = None,
        error: ResponseError | None = None,
    ) -> Response:
        """The response as it is with these segments; `status`, where they do not say it."""
        body, finish = self.body, segments[-1].finish if segments else None
        is_cut = finish is not None and finish.reason == "length"
        status = status or ("incomplete" if is_cut else "completed" if finish else "in_progress")
        has_ended = status not in ("queued", "in_progress")
        is_whole = status in ("completed", "incomplete")
        reasoning = body.reasoning
        return Response(
            id=head.call_id,
            created_at=head.created,
            completed_at=(head.ended or int(time.time())) if status == "completed" else None,
            status=status,
            background=bool(body.background),
            error=error,
            incomplete_details=IncompleteDetails("max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=head.model,
            output=[self.item(head, segments, has_ended=has_ended)] if segments or is_whole else [],
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            reasoning=None if reasoning is None else ReasoningShown(reasoning.effort, reasoning.summary),
            safety_identifier=body.safety_identifier,
            store=self.is_stored,
            temperature=self._sampling.temperature,
            text=TextShown(_format(body)),
            top_logprobs=body.top_logprobs or 0,
            top_p=self._sampling.top_p,
            presence_penalty=self._sampling.presence_penalty,
            frequency_penalty=self._sampling.frequency_penalty,
            usage=_usage(finish) if finish is not None and is_whole else None,
            user=body.user,
            metadata=body.metadata or {},
        )

    def item(self, head: AnswerHead, segments: Sequence[Segment], *, has_ended: bool = True) -> OutputMessage:
        finish = segments[-1].finish if segments else None
        is_complete = finish is not None and finish.reason == "stop"
        status: ItemStatus = "completed" if is_complete else "incomplete" if has_ended else "in_progress"
        text = "".join([segment.output.text for segment in segments])
        return OutputMessage(
            item_id(head.call_id), status, [OutputText(text, logprobs=self.logprobs(segments))]
        )

    def logprobs(self, segments: Sequence[Segment]) -> list[ChatTokenLogprob]:
        if self._sampling.top_logprobs is None:
            return []
        return chat_logprobs([token for segment in segments for token in segment.output.logprobs])


def _constraint(body: ResponsesBody) -> Constraint | None:
    match _format(body):
        case JsonObject():
            return Constraint("json", {"type": "object"}, "text.format")
        case JsonOfSchema(schema=schema, strict=strict):
            value = {"type": "object"} if schema is None else schema
            return Constraint("json", value, "text.format.schema", bool(strict))
    return None


def _format(body: ResponsesBody) -> FreeText | JsonObject | JsonOfSchema:
    return FreeText() if body.text is None or body.text.format is None else body.text.format


def _usage(finish: Finish) -> ResponseUsage:
    prompt, completion = finish.prompt_tokens, finish.completion_tokens
    return ResponseUsage(prompt, completion, prompt + completion)


def item_id(call_id: str) -> str:
    return "msg_" + call_id.removeprefix(Responses.id_prefix)


class ResponseEvents:
    """OpenAI's events. `sequence_number` counts them from 0; a token costs one JSON escape and one join."""

    __slots__ = ("_call", "_has_begun", "_head", "_place", "_segments", "_sent")

    def __init__(self, head: AnswerHead, call: ResponseCall) -> None:
        self._head = head
        self._call = call
        self._sent = 0
        self._has_begun = False
        self._segments: list[Segment] = []
        self._place = b'"item_id":"%b","output_index":0,"content_index":0' % item_id(head.call_id).encode()

    def begin(self) -> bytes:
        """Before anything is known of the answer; the first render does it where nobody did."""
        if self._has_begun:
            return b""
        self._has_begun = True
        begun = self._call.response(self._head, [], status="in_progress")
        if not self._call.body.background:
            return self._of_response("created", begun) + self._of_response("in_progress", begun)
        queued = self._call.response(self._head, [], status="queued")
        return b"".join(
            [
                self._of_response("created", queued),
                self._of_response("queued", queued),
                self._of_response("in_progress", begun),
            ]
        )

    def render(self, index: int, segment: Segment) -> bytes:  # noqa: ARG002 - there is one
        out = self.begin()
        if not self._segments:
            out += self._added()
        self._segments.append(segment)
        output = segment.output
        if output.text or output.logprobs:
            logprobs = encode(self._call.logprobs([segment])) if output.logprobs else b"[]"
            out += self._event(
                b"response.output_text.delta",
                b'%b,"delta":%b,"logprobs":%b' % (self._place, text_json(output.text), logprobs),
            )
        if segment.finish is not None:
            out += self._done()
        return out

    def end(self, usage: Usage) -> bytes:  # noqa: ARG002 - the response has its own
        response = self._call.response(self._head, self._segments)
        return self._of_response(response.status, response)

    def failed(self, status: Literal["failed", "cancelled"], error: ResponseError) -> bytes:
        """End a stream whose answer failed."""
        out = self.begin()
        response = self._call.response(self._head, self._segments, status=status, error=error)
        return out + self._of_response("failed", response)

    def broke(self, error: ResponseError) -> bytes:
        """End a stream for what is not the answer's fault: it may go on elsewhere."""
        made = b'"code":%b,"message":%b,"param":null' % (text_json(error.code), text_json(error.message))
        return self._event(b"error", made)

    def _added(self) -> bytes:
        item = self._call.item(self._head, [], has_ended=False)
        item.content = []
        out = self._event(b"response.output_item.added", b'"output_index":0,"item":%b' % encode(item))
        return out + self._event(
            b"response.content_part.added", b'%b,"part":%b' % (self._place, encode(OutputText("")))
        )

    def _done(self) -> bytes:
        item = self._call.item(self._head, self._segments)
        part = item.content[0]
        whole = b'%b,"text":%b,"logprobs":%b' % (self._place, text_json(part.text), encode(part.logprobs))
        out = self._event(b"response.output_text.done", whole)
        out += self._event(b"response.content_part.done", b'%b,"part":%b' % (self._place, encode(part)))
        return out + self._event(b"response.output_item.done", b'"output_index":0,"item":%b' % encode(item))

    def _of_response(self, name: str, response: Response) -> bytes:
        return self._event(b"response." + name.encode(), b'"response":%b' % encode(response))

    def _event(self, kind: bytes, fields: bytes) -> bytes:
        number, self._sent = self._sent, self._sent + 1
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (kind, kind, number, fields)


def input_messages(given: str | list[InputItem]) -> list[dict[str, Any]]:
    """Plain role and content pairs for a chat template. Raises `InvalidRequest`."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [_message(f"input[{index}]", item) for index, item in enumerate(given)]


def _message(where: str, item: InputItem) -> dict[str, Any]:
    if item.type not in (None, "message"):
        raise refusal(f"{where}.type", item.type, "only messages are supported; leave the item out")
    if item.role not in ROLES:
        raise refusal(f"{where}.role", item.role, f"one of {', '.join(ROLES)}")
    content = item.content
    if content is None or content == []:
        raise refusal(f"{where}.content", content, f"use {CONTENT}")
    if not isinstance(content, str):
        content = "\n".join([_text(f"{where}.content[{place}]", part) for place, part in enumerate(content)])
    return {"role": "system" if item.role == "developer" else item.role, "content": content}


def _text(where: str, part: InputPart) -> str:
    if part.type not in (*TEXT_PARTS, "refusal"):
        raise refusal(f"{where}.type", part.type, f"only texts are supported; use {CONTENT}")
    text = part.refusal if part.type == "refusal" and part.text is None else part.text
    if text is None:
        raise refusal(f"{where}.text", None, "a text part needs text")
    return text


class InputText(msgspec.Struct, tag_field="type", tag="input_text"):
    text: str


class InputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    role: str
    content: list[InputText | OutputText]
    status: ItemStatus = "completed"


def input_items(call_id: str, body: ResponsesBody) -> list[InputMessage]:
    """What the body sent, each item under an id of its own."""
    given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    items = []
    for index, item in enumerate(given):
        parts = [InputPart(type="text", text=item.content)] if isinstance(item.content, str) else item.content
        texts = [_text("content", part) for part in parts or ()]
        kind = OutputText if item.role == "assistant" else InputText
        items.append(
            InputMessage(f"{item_id(call_id)}_{index}", item.role or "user", [kind(text) for text in texts])
        )
    return items

"""`POST /v1/responses`: OpenAI's Responses API, and the objects and events of its other endpoints.

Whatever shows a response (the answer, the events that carry it, `GET /v1/responses/{id}`) makes it of the
call's body and its segments (`response_output`), so every gateway shows the same.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from tidegate.errors import InvalidRequest
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
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.base import AnswerHead, Ask, Usage
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
from tidegate.gateway.dialects.response_objects import (
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    IncompleteDetails,
    InputDetails,
    InputText,
    Item,
    MessageItem,
    OutputDetails,
    OutputText,
    ReasoningItem,
    ReasoningShown,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
    Status,
    TextShown,
)
from tidegate.gateway.dialects.response_output import ID_PREFIX, Drafts, ResponseEvents, drafts_of, item_id
from tidegate.gateway.dialects.structured import JsonSchema
from tidegate.gateway.dialects.tools import (
    MAX_TOOLS,
    NO_TOOLS,
    PARAMETERS,
    Allowed,
    AllowedTools,
    Asked,
    FunctionDefinition,
    FunctionName,
    NamedFunction,
    NamedTool,
    NamedToolInList,
    Tool,
    asked_tools,
    called,
)
from tidegate.gateway.dialects.wire import OPENAI
from tidegate.messages.work import MODEL_DEFAULTS, ChatPrompt, Finish, Sampling, Segment

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
CONTENT = 'a text, or a list of parts {"type": "input_text", "text": ...}'
INPUT = "a text, or a list of messages, calls, their outputs and reasoning"
MOST_ITEMS = 4096
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
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


class InputPart(msgspec.Struct, kw_only=True):
    """One part of a message's content. Other than texts are refused by name."""

    type: Annotated[str, documented(None, {"enum": [*TEXT_PARTS, "refusal"]})]
    text: Annotated[str | None, documented(None, {"type": "string"}, is_required=True)] = None
    refusal: Annotated[str | None, says("what an assistant said in place of text")] = None


Content = Annotated[
    str | list[InputPart] | None,
    documented(
        CONTENT,
        {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": reference("InputPart")}]},
    ),
]
CallId = Annotated[
    Annotated[str, Meta(min_length=1, max_length=256)] | None,
    documented(None, {"type": "string", "minLength": 1, "maxLength": 256}),
]


class InputItem(msgspec.Struct, kw_only=True):
    """A message, a call and its output, or what a model thought: of the client, or of an answer that is sent
    back. Other items are refused by name."""

    type: Annotated[str | None, documented(None, {"enum": [*ITEMS, None]})] = None
    role: Annotated[str | None, documented("who speaks", {"enum": list(ROLES)})] = None
    content: Content = None
    call_id: CallId = None
    name: Annotated[
        str | None, documented("of the function that is called", {"type": "string", "minLength": 1})
    ] = None
    arguments: Annotated[str | None, documented("JSON text, as it was in the answer", {"type": "string"})] = (
        None
    )
    output: Annotated[Content, says("what the function gave")] = None


def _item(kind: str, *required: str) -> dict[str, Any]:
    types = {"enum": ["message", None]} if kind == "message" else {"const": kind}
    return {"required": [*(() if kind == "message" else ("type",)), *required], "properties": {"type": types}}


InputItem.RULES = (  # type: ignore[attr-defined]
    Rule(
        lambda _: None,
        {
            "anyOf": [
                _item("message", "role", "content"),
                _item("function_call", "call_id", "name", "arguments"),
                _item("function_call_output", "call_id", "output"),
            ]
        },
    ),
)


class ResponsesTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function, as in the tools of chat completions but flat."""

    type: Literal["function"]
    name: FunctionName
    description: Annotated[str | None, says("what it does, for the model")] = None
    parameters: Annotated[
        dict[str, Any] | None,
        documented(
            "a JSON schema of type object; left out: it has none", {"anyOf": [{"type": "null"}, PARAMETERS]}
        ),
    ] = None
    strict: Annotated[bool | None, says("true: what of the schema cannot be enforced is refused")] = None


class FunctionChosen(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    name: FunctionName


class ToolNamed(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: FunctionName


class ToolsAllowed(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """Fewer than all of `tools`."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolNamed], Meta(min_length=1, max_length=MAX_TOOLS)]


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
    tools: Annotated[
        Annotated[list[ResponsesTool], Meta(max_length=MAX_TOOLS)] | None,
        says(f'at most {MAX_TOOLS} of {{"type": "function", "name": ..., "parameters": ...}}'),
    ] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | FunctionChosen | ToolsAllowed | None,
        says(
            'none, auto, required, {"type": "function", "name": ...}, or {"type": "allowed_tools", "mode": '
            '"auto" or "required", "tools": [...]}; left out: auto'
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, says("false: an answer has one call at most; left out: true")
    ] = None
    max_tool_calls: Annotated[Any, not_honoured("there are no tools of our own; leave it out")] = None
    conversation: Annotated[
        Any, not_honoured("conversations are not kept by name; use previous_response_id")
    ] = None
    prompt: Annotated[Any, not_honoured("prompts are not kept; send instructions and input")] = None
    context_management: Annotated[Any, not_honoured("a conversation is not shortened; leave it out", [])] = (
        None
    )
    moderation: Annotated[Any, not_honoured("moderation is not supported; leave it out")] = None


class Responses:
    path = "/v1/responses"
    task = "generate"
    id_prefix = ID_PREFIX
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
        "_asked",
        "_input",
        "_sampling",
        "body",
        "constraint",
        "is_stored",
        "is_streamed",
        "model",
        "n",
        "previous",
        "schemas",
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
        self._input = input_messages(body.input)
        self._asked = _asked(body)
        self.schemas = self._asked.schemas
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
        """All messages before the answer but the instructions. Raises `InvalidRequest` for outputs of calls
        that no answer before has."""
        messages = joined([*self.previous, *self._input])
        names: dict[str, str] = {}
        for message in messages:
            names.update({call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())})
            if message["role"] == "tool":
                if (asked := message["tool_call_id"]) not in names:
                    raise refusal("input", asked, "no answer before this output has a call with that call_id")
                message["name"] = names[asked]
        return messages

    def follow(self, grammar: str) -> None:
        self._sampling = replace(self._sampling, grammar=grammar)

    def asks(self, random_seed: int) -> list[Ask]:
        messages = self.conversation()
        if self.body.instructions:
            messages.insert(0, {"role": "system", "content": self.body.instructions})
        args: dict[str, Any] = {}
        if self.body.reasoning is not None and (effort := self.body.reasoning.effort) is not None:
            args = {"enable_thinking": effort != "none", "reasoning_effort": effort}
        prompt = ChatPrompt(
            messages,
            template_args=args,
            tools=self._asked.tools,
            tool_choice=self._asked.choice,
            parallel_tool_calls=self._asked.is_parallel,
        )
        return generate_asks([prompt], 1, self._sampling, None, random_seed)

    def events(self, head: AnswerHead) -> ResponseEvents:
        return ResponseEvents(
            head, functools.partial(self.response, head), is_background=bool(self.body.background)
        )

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        return encode(self.response(head, drafts_of(head.call_id, choices[0])))

    def response(
        self,
        head: AnswerHead,
        drafts: Drafts,
        status: Status | None = None,
        error: ResponseError | None = None,
    ) -> Response:
        """The response as it is with these items; `status`, where they do not say it."""
        body, finish = self.body, drafts.finish
        is_cut = finish is not None and finish.reason == "length"
        status = status or ("incomplete" if is_cut else "completed" if finish else "in_progress")
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
            output=drafts.items(has_ended=status not in ("queued", "in_progress")),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            reasoning=None if reasoning is None else ReasoningShown(reasoning.effort, reasoning.summary),
            safety_identifier=body.safety_identifier,
            store=self.is_stored,
            temperature=self._sampling.temperature,
            text=TextShown(_format(body)),
            tool_choice=body.tool_choice or "auto",
            tools=[
                FunctionTool(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.parameters,
                    strict=tool.strict,
                )
                for tool in body.tools or ()
            ],
            top_logprobs=body.top_logprobs or 0,
            top_p=self._sampling.top_p,
            presence_penalty=self._sampling.presence_penalty,
            frequency_penalty=self._sampling.frequency_penalty,
            usage=_usage(finish, drafts)
            if finish is not None and status in ("completed", "incomplete")
            else None,
            user=body.user,
            metadata=body.metadata or {},
        )


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


def _usage(finish: Finish, drafts: Drafts) -> ResponseUsage:
    prompt, completion = finish.prompt_tokens, finish.completion_tokens
    details = OutputDetails(drafts.reasoning_tokens), InputDetails(finish.cached_tokens)
    return ResponseUsage(prompt, completion, prompt + completion, *details)


def _asked(body: ResponsesBody) -> Asked:
    """The tools as those of chat completions."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise refusal("tool_choice", "given", "it needs tools")
        return NO_TOOLS
    tools = [
        Tool(
            type="function",
            function=FunctionDefinition(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            ),
        )
        for tool in body.tools
    ]
    choice: str | NamedTool | AllowedTools | None
    match body.tool_choice:
        case FunctionChosen(name=name):
            choice = NamedTool(function=NamedFunction(name=name))
        case ToolsAllowed(mode=mode, tools=named):
            listed = [
                NamedToolInList(type="function", function=NamedFunction(name=tool.name)) for tool in named
            ]
            choice = AllowedTools(allowed_tools=Allowed(mode=mode, tools=listed))
        case said:
            choice = said
    try:
        return asked_tools(tools, choice, body.parallel_tool_calls, "tools[{}].parameters")
    except InvalidRequest as error:  # which names the fields of chat completions
        param = _flat(error.param or "tools")
        raise InvalidRequest(_flat(error.message), param=param, code=error.error_code) from None


def _flat(text: str) -> str:
    return text.replace(".function", "").replace(".allowed_tools", "")


def input_messages(given: str | list[InputItem]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them, one for each item that says something (see `joined`). Raises
    `InvalidRequest`."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = [_message(f"input[{index}]", item) for index, item in enumerate(given)]
    return [message for message in messages if message is not None]


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What follows each other of an assistant is one message: what it thought, said, and whom it called. Two
    answers in a row stay two."""
    made: list[dict[str, Any]] = []
    run: list[dict[str, Any]] = []
    has_content = False
    for message in messages:
        goes_on = message["role"] == "assistant" and not (has_content and message["content"])
        if run and not goes_on:
            made.append(_one_of(run))
            run, has_content = [], False
        if message["role"] == "assistant":
            run.append(message)
            has_content = has_content or bool(message["content"])
        else:
            made.append(dict(message))
    return [*made, _one_of(run)] if run else made


def _one_of(run: list[dict[str, Any]]) -> dict[str, Any]:
    one = {**run[0], "content": "".join([message["content"] for message in run])}
    if thoughts := [message["reasoning_content"] for message in run if "reasoning_content" in message]:
        one["reasoning_content"] = "".join(thoughts)
    if calls := [call for message in run for call in message.get("tool_calls", ())]:
        one["tool_calls"] = calls
    return one


def answer_messages(drafts: Drafts) -> list[dict[str, Any]]:
    """An answer as the history of what goes on from it."""
    messages = []
    for draft in drafts.drafts:
        text = "".join(draft.pieces)
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if draft.kind == "message":
            messages.append(message | {"content": text})
        elif draft.kind == "reasoning":
            messages.append(message | {"reasoning_content": text})
        else:
            messages.append(message | {"tool_calls": [called(draft.name, text, draft.call_id)]})
    return messages


def _message(where: str, item: InputItem) -> dict[str, Any] | None:
    answer: dict[str, Any] = {"role": "assistant", "content": ""}
    match item.type:
        case None | "message":
            if item.role not in ROLES:
                raise refusal(f"{where}.role", item.role, f"one of {', '.join(ROLES)}")
            text = _text(f"{where}.content", item.content)
            return {"role": "system" if item.role == "developer" else item.role, "content": text}
        case "function_call":
            for name in ("call_id", "name", "arguments"):
                if getattr(item, name) is None:
                    raise refusal(f"{where}.{name}", None, "a function_call has call_id, name and arguments")
            return answer | {
                "tool_calls": [called(item.name or "", item.arguments or "", item.call_id or "")]
            }
        case "function_call_output":
            if item.call_id is None:
                raise refusal(f"{where}.call_id", None, "send the call_id of the call that this answers")
            text = _text(f"{where}.output", item.output)
            return {"role": "tool", "tool_call_id": item.call_id, "content": text}
        case "reasoning":
            thought = _text(f"{where}.content", item.content) if item.content else ""
            return answer | {"reasoning_content": thought} if thought else None
    raise refusal(f"{where}.type", item.type, f"send one of {', '.join(ITEMS)}, or leave the item out")


def _text(where: str, content: str | list[InputPart] | None) -> str:
    if content is None or content == []:
        raise refusal(where, content, f"use {CONTENT}")
    if isinstance(content, str):
        return content
    return "\n".join([_part(f"{where}[{place}]", part) for place, part in enumerate(content)])


def _part(where: str, part: InputPart) -> str:
    if part.type not in (*TEXT_PARTS, "refusal", "reasoning_text"):
        raise refusal(f"{where}.type", part.type, f"only texts are supported; use {CONTENT}")
    text = part.refusal if part.type == "refusal" and part.text is None else part.text
    if text is None:
        raise refusal(f"{where}.text", None, "a text part needs text")
    return text


def input_items(call_id: str, body: ResponsesBody) -> list[Item]:
    """What the body sent, each item under an id of its own."""
    given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    return [_shown(call_id, index, item) for index, item in enumerate(given)]


def _shown(call_id: str, index: int, item: InputItem) -> Item:
    kind = item.type or "message"
    own_id = item_id(call_id, kind, f"in{index}")
    if kind == "function_call":
        return FunctionCallItem(
            own_id, "completed", item.call_id or "", item.name or "", item.arguments or ""
        )
    if kind == "function_call_output":
        return FunctionOutputItem(own_id, "completed", item.call_id or "", _text("output", item.output))
    parts = [InputPart(type="text", text=item.content)] if isinstance(item.content, str) else item.content
    texts = [_part("content", part) for part in parts or ()]
    if kind == "reasoning":
        return ReasoningItem(own_id, "completed", [ReasoningText(text) for text in texts])
    made = OutputText if item.role == "assistant" else InputText
    return MessageItem(own_id, item.role or "user", "completed", [made(text) for text in texts])

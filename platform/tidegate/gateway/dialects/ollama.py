"""Ollama's `POST /api/chat` and `POST /api/generate`: a JSON object a line, unless `stream` is false.

What tells Ollama where and how to run a model is taken and not acted on: here its own resource says that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from tidegate.errors import RequestError
from tidegate.gateway.bodies import (
    UNREAD,
    BodyReader,
    RequestBody,
    Rule,
    documented,
    not_honoured,
    not_honoured_fields,
    refusal,
    refuse_not_honoured,
    says,
)
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.base import AnswerHead, Ask, Usage
from tidegate.gateway.dialects.chat import whole_reasoning
from tidegate.gateway.dialects.generate import MOST_STOPS, OneAnswer
from tidegate.gateway.dialects.openai import (
    MAX_TOKENS,
    Penalty,
    Seed,
    Share,
    StopString,
    Temperature,
    finish_reason,
    whole_text,
)
from tidegate.gateway.dialects.tools import (
    MAX_TOOLS,
    NO_TOOLS,
    Asked,
    Tools,
    asked_tools,
    called,
    checked,
    whole_calls,
)
from tidegate.gateway.dialects.wire import Wire, encode, shown_message
from tidegate.gateway.sse import on_one_line, text_json
from tidegate.messages.work import (
    MODEL_DEFAULTS,
    ChatPrompt,
    Prompt,
    Sampling,
    Segment,
    TextPrompt,
    Tokenize,
)

LATEST = ":latest"  # the tag that Ollama's clients give a name without one
_MESSAGES = "a list of messages with role (system, user, assistant or tool) and content, a text"


class OllamaError(msgspec.Struct):
    error: str


class OllamaWire(Wire):
    """`begin` and `end` stand around the empty text of a line that says only that the call is alive."""

    media_type = "application/x-ndjson"
    can_resume = False  # a line has no id
    error_body = OllamaError

    def __init__(self, empty: bytes) -> None:
        self._empty = empty

    def error(self, error: RequestError) -> bytes:
        return on_one_line(encode(OllamaError(shown_message(error))))

    def error_event(self, error: RequestError) -> bytes:
        return self.error(error) + b"\n"

    def comment(self, comment: bytes) -> bytes:  # noqa: ARG002 - clients read every line as an answer's
        return b""

    def heartbeat(self, model: str) -> bytes:
        return _line(model, self._empty)


_NO_MESSAGE = b'"message":{"role":"assistant","content":""}'
_NO_RESPONSE = b'"response":""'
OLLAMA: Wire = OllamaWire(_NO_MESSAGE)


class OllamaOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    num_predict: Annotated[
        Annotated[int, Meta(ge=-2, le=MAX_TOKENS)] | None,
        documented(
            "tokens to generate at most; -1, -2 or left out: up to the context length",
            {"anyOf": [{"enum": [-2, -1, None]}, {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS}]},
        ),
    ] = None
    temperature: Annotated[Temperature | None, says("a number from 0 (greedy) to 2")] = None
    top_k: Annotated[Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None, says("0 or -1: all")] = None
    top_p: Annotated[Share | None, says("a number from 0 to 1")] = None
    min_p: Annotated[Share | None, says("a number from 0 to 1")] = None
    seed: Annotated[Seed | None, says("a 64-bit whole number; left out: drawn at random")] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Meta(max_length=MOST_STOPS)] | None,
        says(f"a non-empty text, or at most {MOST_STOPS} of them, that end the answer"),
    ] = None
    repeat_penalty: Annotated[
        Annotated[float, Meta(gt=0, le=100)] | None, says("a number above 0, over prompt and answer")
    ] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    mirostat: Annotated[Any, not_honoured("use temperature and top_p, or leave it out", 0)] = None
    tfs_z: Annotated[Any, not_honoured("use top_p, or leave it out", 1, 1.0)] = None
    typical_p: Annotated[Any, not_honoured("use top_p, or leave it out", 1, 1.0)] = None
    mirostat_tau: Annotated[Any, UNREAD] = None
    mirostat_eta: Annotated[Any, UNREAD] = None
    repeat_last_n: Annotated[Any, UNREAD] = None
    penalize_newline: Annotated[Any, UNREAD] = None
    num_ctx: Annotated[Any, UNREAD] = None
    num_keep: Annotated[Any, UNREAD] = None
    num_batch: Annotated[Any, UNREAD] = None
    num_gpu: Annotated[Any, UNREAD] = None
    num_thread: Annotated[Any, UNREAD] = None
    main_gpu: Annotated[Any, UNREAD] = None
    numa: Annotated[Any, UNREAD] = None
    low_vram: Annotated[Any, UNREAD] = None
    f16_kv: Annotated[Any, UNREAD] = None
    logits_all: Annotated[Any, UNREAD] = None
    vocab_only: Annotated[Any, UNREAD] = None
    use_mmap: Annotated[Any, UNREAD] = None
    use_mlock: Annotated[Any, UNREAD] = None
    embedding_only: Annotated[Any, UNREAD] = None


_NOT_HONOURED = not_honoured_fields(OllamaOptions)


def _check_options(body: OllamaBody) -> None:
    if body.options is not None:
        refuse_not_honoured(body.options, _NOT_HONOURED, "options.")
        if body.options.num_predict == 0:
            raise refusal("options.num_predict", 0, "use 1 or more, or leave it out")


class OllamaBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/chat` and `POST /api/generate` share these fields."""

    RULES: ClassVar[tuple[Rule, ...]] = (Rule(_check_options, {}),)

    model: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=256,
            description="the name of a model that GET /api/tags lists, with :latest or without",
        ),
    ]
    stream: Annotated[bool | None, says("true or false; left out: true")] = None
    options: Annotated[OllamaOptions | None, says("an object of options")] = None
    think: Annotated[
        bool | Literal["low", "medium", "high", "max"] | None,
        says("true, false, low, medium, high or max; the model's chat template may act on it"),
    ] = None
    format: Annotated[
        Literal["", "json"] | dict[str, Any] | None, says("json: a JSON object; or a JSON schema")
    ] = None
    keep_alive: Annotated[Any, UNREAD] = None
    truncate: Annotated[Any, not_honoured("a prompt is not cut; use true or leave it out", True)] = None
    shift: Annotated[Any, not_honoured("a context is not shifted; leave it out", False)] = None
    logprobs: Annotated[Any, not_honoured("use /v1/chat/completions, or leave it out", False)] = None
    top_logprobs: Annotated[Any, not_honoured("use /v1/chat/completions, or leave it out", 0)] = None


class OllamaFunction(msgspec.Struct, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: dict[str, Any] = {}


class OllamaCall(msgspec.Struct, kw_only=True):
    """A call in an answer that is sent back."""

    function: OllamaFunction
    id: Annotated[str | None, says("left out: the calls are told apart by their order")] = None


class OllamaMessage(msgspec.Struct, kw_only=True):
    """Of an answer that is sent back what is not listed is not read."""

    role: Annotated[
        Literal["system", "user", "assistant", "tool"], says("one of system, user, assistant, tool")
    ]
    content: str | None = ""
    thinking: Annotated[
        str | None, says("what an assistant thought; the model's chat template may show it")
    ] = None
    images: Annotated[Any, not_honoured("only text goes in; leave it out", [])] = None
    tool_calls: Annotated[
        Annotated[list[OllamaCall], Meta(max_length=MAX_TOOLS)] | None,
        says("the calls of an assistant's answer, as it had them"),
    ] = None
    tool_name: Annotated[str | None, says("whose result a message of role tool is")] = None
    tool_call_id: Annotated[str | None, says("the same by the id of the call")] = None


_NOT_HONOURED_OF_MESSAGE = not_honoured_fields(OllamaMessage)


def _check_messages(body: OllamaChatBody) -> None:
    for place, message in enumerate(body.messages or ()):
        refuse_not_honoured(message, _NOT_HONOURED_OF_MESSAGE, f"messages[{place}].")


class OllamaChatBody(OllamaBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/chat`. Without messages the model is loaded, and nothing asked."""

    RULES: ClassVar[tuple[Rule, ...]] = (*OllamaBody.RULES, Rule(_check_messages, {}))

    messages: Annotated[list[OllamaMessage] | None, says(_MESSAGES)] = None
    tools: Tools = None


class OllamaGenerateBody(OllamaBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/generate`. Without a prompt the model is loaded, and nothing asked."""

    prompt: Annotated[str | None, says("a text, which the model's chat template writes as a user's")] = None
    system: Annotated[str | None, says("a text, which comes before the prompt")] = None
    raw: Annotated[bool | None, says("true: the prompt as it is, without system and the chat template")] = (
        None
    )
    suffix: Annotated[Any, not_honoured("insertion is not supported; leave it out", "")] = None
    images: Annotated[Any, not_honoured("only text goes in; leave it out", [])] = None
    template: Annotated[Any, not_honoured("the model's own is used; leave it out", "")] = None
    context: Annotated[Any, not_honoured("send messages to /api/chat, or leave it out", [])] = None


class AnsweredFunction(msgspec.Struct):
    index: int
    name: str
    arguments: dict[str, Any]


class AnsweredCall(msgspec.Struct):
    id: str
    function: AnsweredFunction


class AnsweredMessage(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"]
    content: str
    thinking: str = ""
    tool_calls: list[AnsweredCall] = []


class Ended(msgspec.Struct, kw_only=True):
    """The last line, or the whole answer. Durations are nanoseconds, as this gateway saw them; that of the
    prompt has the wait in the queue."""

    model: str
    created_at: str
    done: bool = True
    done_reason: Literal["stop", "length", "load"]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class OllamaChatAnswer(Ended, kw_only=True):
    message: AnsweredMessage


class OllamaGenerateAnswer(Ended, kw_only=True):
    response: str
    thinking: str | msgspec.UnsetType = msgspec.UNSET


class OllamaChat:
    path = "/api/chat"
    task = "generate"
    id_prefix = "ollama-"
    may_stream = True
    wire = OLLAMA
    operation_id, summary = "ollama_chat", "Answer a conversation, as Ollama"
    body, answer = OllamaChatBody, OllamaChatAnswer
    answer_description = "Lines that end with the answer's end, or the whole answer where stream is false"
    _reader = BodyReader(OllamaChatBody)

    def read(self, raw: bytes) -> OllamaAsked:
        body = self._reader.read(raw)
        messages = _messages(body.messages or ())
        tools = asked_tools(body.tools or (), None, None)
        prompt = _chat(body, messages, tools) if messages else None
        return OllamaAsked(body, prompt, "messages", tools.schemas)


class OllamaGenerate:
    path = "/api/generate"
    task = "generate"
    id_prefix = "ollama-"
    may_stream = True
    wire: Wire = OllamaWire(_NO_RESPONSE)
    operation_id, summary = "ollama_generate", "Answer a text, as Ollama"
    body, answer = OllamaGenerateBody, OllamaGenerateAnswer
    answer_description = "Lines that end with the answer's end, or the whole answer where stream is false"
    _reader = BodyReader(OllamaGenerateBody)

    def read(self, raw: bytes) -> OllamaAsked:
        body = self._reader.read(raw)
        prompt: Prompt | None = None
        if body.prompt and body.raw:
            prompt = TextPrompt(body.prompt)
        elif body.prompt:
            system = [{"role": "system", "content": body.system}] if body.system else []
            prompt = _chat(body, [*system, {"role": "user", "content": body.prompt}])
        return OllamaAsked(body, prompt, "prompt")


class OllamaAsked(OneAnswer):
    """`prompt` None: the model is loaded, and nothing asked."""

    def __init__(
        self,
        body: OllamaBody,
        prompt: Prompt | None,
        prompt_field: str,
        schemas: Sequence[Constraint] = (),
    ) -> None:
        self.prompt_field = prompt_field
        self.is_chat = prompt_field == "messages"
        self.began = time.perf_counter_ns()
        self.shows_thinking = body.think is not False
        self._is_load = prompt is None
        super().__init__(
            body.model.removesuffix(LATEST),
            prompt or TextPrompt(""),
            _sampling(body.options or OllamaOptions()),
            seed=None if body.options is None else body.options.seed,
            is_streamed=prompt is not None and body.stream is not False,
            constraint=_constraint(body.format) if prompt is not None else None,
            schemas=schemas if prompt is not None else (),
        )

    def asks(self, random_seed: int) -> list[Ask]:
        if self._is_load:  # the least that has to wait for the model
            return [Ask(Tokenize(TextPrompt("")), cost=1)]
        return super().asks(random_seed)

    def events(self, head: AnswerHead) -> OllamaEvents:
        return OllamaEvents(self, head)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        segments = choices[0]
        message = AnsweredMessage("assistant", whole_text(segments), tool_calls=_whole_calls(segments))
        if self.shows_thinking:
            message.thinking = whole_reasoning(segments)
        reason: Any = "load" if self._is_load else finish_reason(segments[-1].finish)
        return encode(self.ended(head, message, reason, usage, self.began))

    def ended(
        self, head: AnswerHead, message: AnsweredMessage, reason: Any, usage: Usage, first_token: int
    ) -> OllamaChatAnswer | OllamaGenerateAnswer:
        """`first_token`: when it came, as `began`."""
        now = time.perf_counter_ns()
        end = Ended(
            model=head.model,
            created_at=_now(),
            done_reason=reason,
            total_duration=now - self.began,
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=first_token - self.began,
            eval_count=usage.completion_tokens,
            eval_duration=now - first_token,
        )
        fields = msgspec.structs.asdict(end)
        if self.is_chat:
            return OllamaChatAnswer(**fields, message=message)
        thinking = message.thinking or msgspec.UNSET
        return OllamaGenerateAnswer(**fields, response=message.content, thinking=thinking)


class OllamaEvents:
    """A line for each text, one for each call of a tool, which is whole, and a last one with the counts."""

    __slots__ = ("_call", "_first_token", "_head", "_pending", "_reason")

    def __init__(self, call: OllamaAsked, head: AnswerHead) -> None:
        self._call = call
        self._pending: list[Segment] = []  # that hold calls: their parts may be still to come
        self._head = head
        self._first_token = 0
        self._reason = "stop"

    def render(self, index: int, segment: Segment) -> bytes:  # noqa: ARG002 - there is one choice
        self._first_token = self._first_token or time.perf_counter_ns()
        if segment.finish is not None:
            self._reason = finish_reason(segment.finish)
        output = segment.output
        if output.calls:
            self._pending.append(segment)
        out = b""
        if output.reasoning and self._call.shows_thinking:
            thought = text_json(output.reasoning)
            out = self._part(b'"content":"","thinking":%b', b'"response":"","thinking":%b', thought)
        if output.text:
            out += self._part(b'"content":%b', b'"response":%b', text_json(output.text))
        return out

    def _part(self, of_message: bytes, of_response: bytes, value: bytes) -> bytes:
        if self._call.is_chat:
            return _line(self._head.model, b'"message":{"role":"assistant",%b}' % (of_message % value))
        return _line(self._head.model, of_response % value)

    def end(self, usage: Usage) -> bytes:
        out = b""
        for call in _whole_calls(self._pending):
            message = encode(AnsweredMessage("assistant", "", tool_calls=[call]))
            out += _line(self._head.model, b'"message":%b' % on_one_line(message))
        nothing = AnsweredMessage("assistant", "")
        end = self._call.ended(self._head, nothing, self._reason, usage, self._first_token)
        return out + encode(end) + b"\n"


def _line(model: str, part: bytes) -> bytes:
    return b'{"model":%b,"created_at":"%b",%b,"done":false}\n' % (text_json(model), _now().encode(), part)


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _messages(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them. A result that names neither call nor function is that of the
    first call before it that has none."""
    made: list[dict[str, Any]] = []
    open_calls: dict[str, str] = {}  # ids of those without a result, and whom they call
    given: set[str] = set()  # clients (LiteLLM) drop a call's id and keep its result's
    count = 0
    for place, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "assistant":
            if message.thinking:
                turn["reasoning_content"] = message.thinking
            for index, call in enumerate(message.tool_calls or ()):
                where = f"messages[{place}].tool_calls[{index}].function.arguments"
                call_id = call.id
                if call_id and call_id not in open_calls:
                    given.add(call_id)
                else:
                    call_id = f"call{count:05}"
                    count += 1
                open_calls[call_id] = call.function.name
                if len(open_calls) > MAX_TOOLS:
                    most = f"at most {MAX_TOOLS} calls may be without a result"
                    raise refusal(f"messages[{place}].tool_calls", len(open_calls), most)
                arguments = checked(call.function.arguments, where)
                function = {"name": call.function.name, "arguments": arguments}
                turn.setdefault("tool_calls", []).append(
                    {"id": call_id, "type": "function", "function": function}
                )
        elif message.tool_calls:
            raise refusal(f"messages[{place}].tool_calls", "given", "only a message of role assistant has it")
        elif message.role == "tool":
            wanted = [
                call_id
                for call_id, name in open_calls.items()
                if message.tool_name in (None, name)
                and (message.tool_call_id in (None, call_id) or call_id not in given)
            ]
            if not wanted:
                named = "tool_name" if message.tool_name is not None else "tool_call_id"
                value = message.tool_name or message.tool_call_id
                raise refusal(f"messages[{place}].{named}", value, "no answer before it has a call of it")
            call_id = message.tool_call_id if message.tool_call_id in wanted else wanted[0]
            turn |= {"tool_call_id": call_id, "name": open_calls.pop(call_id)}
        made.append(turn)
    if made and "tool_calls" in made[-1]:
        raise refusal(f"messages[{len(made) - 1}].tool_calls", "given", "a call needs its result after it")
    return made


def _whole_calls(segments: Sequence[Segment]) -> list[AnsweredCall]:
    found = []
    for place, call in enumerate(whole_calls(segments)):
        made = called(call.function.name, call.function.arguments, call.id)["function"]
        found.append(AnsweredCall(call.id, AnsweredFunction(place, made["name"], made["arguments"])))
    return found


def _chat(body: OllamaBody, messages: list[dict[str, Any]], tools: Asked = NO_TOOLS) -> ChatPrompt:
    """The answer goes on from a last message of the assistant's, as Ollama's does."""
    goes_on = messages[-1]["role"] == "assistant"
    args: dict[str, Any] = {}
    if body.think is not None:
        args["enable_thinking"] = body.think is not False
        if isinstance(body.think, str):
            args["reasoning_effort"] = body.think
    return ChatPrompt(
        messages,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        template_args=args,
        tools=tools.tools,
        tool_choice=tools.choice,
        parallel_tool_calls=tools.is_parallel,
    )


def _constraint(asked: str | dict[str, Any] | None) -> Constraint | None:
    if not asked and not isinstance(asked, dict):
        return None
    return Constraint("json", asked if isinstance(asked, dict) else {"type": "object"}, "format")


def _sampling(asked: OllamaOptions) -> Sampling:
    stop = asked.stop
    found = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": None if asked.top_k is None else max(asked.top_k, 0),
        "min_p": asked.min_p,
        "repetition_penalty": asked.repeat_penalty,
    }
    given: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    sampling = Sampling(
        seed=0,
        max_tokens=asked.num_predict if (asked.num_predict or -1) > 0 else None,
        clips_limit=True,
        stop=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        left_out=tuple(name for name in MODEL_DEFAULTS if name not in given),
    )
    return replace(sampling, **given)

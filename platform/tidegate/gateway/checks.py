"""From bytes to a checked body, or an `InvalidRequest` that names field, value and remedy.

The fast path is one msgspec decode and a few comparisons. Only where it fails is the body looked at again
to say what was found.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any, TypeVar

import msgspec

from tidegate.errors import InvalidRequest
from tidegate.gateway.schema import (
    HINTS,
    MAX_SEQUENCES,
    NOT_HONOURED,
    ChatBody,
    CompletionBody,
    GenerationBody,
    Message,
)

Body = TypeVar("Body", bound=GenerationBody)
PromptList = list[str] | list[list[int]]

_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_CHAT_NOT_HONOURED = tuple(name for name in ChatBody.__struct_fields__ if name in NOT_HONOURED)
_COMPLETION_NOT_HONOURED = tuple(name for name in CompletionBody.__struct_fields__ if name in NOT_HONOURED)
# All of a body's values at once: the loop below is for the few bodies that set one of them.
_values = {names: attrgetter(*names) for names in (_CHAT_NOT_HONOURED, _COMPLETION_NOT_HONOURED)}
_SHOWN_CHARACTERS = 80


def parse_chat(raw: bytes) -> ChatBody:
    """Raises `InvalidRequest`."""
    body = _decode(_chat_decoder, raw)
    _refuse_not_honoured(body, _CHAT_NOT_HONOURED)
    _check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise refusal("top_logprobs", body.top_logprobs, "it needs logprobs: true")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise refusal(
            "max_tokens",
            body.max_tokens,
            f"max_completion_tokens says {body.max_completion_tokens}; send only max_completion_tokens",
        )
    return body


def parse_completion(raw: bytes) -> CompletionBody:
    """Raises `InvalidRequest`."""
    body = _decode(_completion_decoder, raw)
    _refuse_not_honoured(body, _COMPLETION_NOT_HONOURED)
    _check_stream_options(body)
    if body.max_tokens == 0 and not body.echo:
        raise refusal("max_tokens", 0, "0 is for echo: true only; use 1 or more")
    return body


def chat_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Plain role and content pairs for a chat template.

    `developer` becomes `system`; text parts are joined with a newline. Raises `InvalidRequest`.
    """
    return [_message(index, message) for index, message in enumerate(messages)]


def prompt_list(prompt: str | list[Any]) -> PromptList:
    """The prompts of a completions call: all texts, or all token id lists. Raises `InvalidRequest`."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]
    if len(kinds) > 1:
        raise refusal("prompt", prompt, "it mixes kinds; use " + HINTS["prompt"])
    if kinds == {list}:
        for index, ids in enumerate(prompt):
            if not ids:
                raise refusal(f"prompt[{index}]", ids, "a prompt of token ids needs at least one")
    return prompt


def check_sequences(prompts: int, n: int) -> None:
    """Raises `InvalidRequest` where one call asks for too many sequences."""
    if prompts * n > MAX_SEQUENCES:
        raise refusal(
            "prompt" if prompts > n else "n",
            prompts * n,
            f"prompts x n is at most {MAX_SEQUENCES}; send several calls",
        )


def refusal(param: str, value: Any, remedy: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {_shown(value)}: {remedy}.", param=param)


def _message(index: int, message: Message) -> dict[str, Any]:
    where = f"messages[{index}]"
    role = message.role
    if role in ("tool", "function"):
        raise refusal(f"{where}.role", role, "tools are not supported; use " + HINTS["messages.role"])
    for name in ("name", "refusal", "audio", "tool_calls", "function_call", "tool_call_id"):
        value = getattr(message, name)
        if value is not None and value != []:
            raise refusal(f"{where}.{name}", value, "it is not honoured; leave it out")
    content = message.content
    if content is None:
        raise refusal(f"{where}.content", None, "use " + HINTS["messages.content"])
    if not isinstance(content, str):
        texts = []
        for part_index, part in enumerate(content):
            if part.type != "text":
                remedy = "only text parts are supported; use " + HINTS["messages.content"]
                raise refusal(f"{where}.content[{part_index}].type", part.type, remedy)
            if part.text is None:
                remedy = "a text part needs text"
                raise refusal(f"{where}.content[{part_index}].text", None, remedy)
            texts.append(part.text)
        if not texts:
            raise refusal(f"{where}.content", [], "use " + HINTS["messages.content"])
        content = "\n".join(texts)
    return {"role": "system" if role == "developer" else role, "content": content}


def _refuse_not_honoured(body: GenerationBody, names: tuple[str, ...]) -> None:
    if _values[names](body) == (None,) * len(names):
        return
    for name in names:
        value = getattr(body, name)
        if value is None:
            continue
        rule = NOT_HONOURED[name]
        # Compared with the type, because 1 == True and 0 == False.
        if not any(type(value) is type(same) and value == same for same in rule.same_as_absent):
            raise InvalidRequest(
                f"{name}: {_shown(value)}: not honoured: {rule.remedy}.",
                param=name,
                code="unsupported_parameter",
            )


def _check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options", "given", "it needs stream: true")


def _decode(decoder: msgspec.json.Decoder[Body], raw: bytes) -> Body:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        if "got `float`" in str(error):
            return _decode_integral(decoder.type, raw)
        raise _explained(str(error), raw) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not UTF-8: {error.reason} at byte {error.start} of a text.", code="invalid_json"
        ) from None
    except msgspec.DecodeError as error:
        sentence = str(error).rstrip(".")
        place = "" if "(byte" in sentence else f" (it ends at byte {len(raw)})"
        raise InvalidRequest(f"The body is not valid JSON: {sentence}{place}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None


def _decode_integral(kind: type[Body], raw: bytes) -> Body:
    """Decode once more with 3.0 taken for 3: the same number in JSON Schema, but not to msgspec."""
    try:
        return msgspec.convert(_integral(msgspec.json.decode(raw)), kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), raw) from None


def _integral(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_integral(item) for item in value]
    if isinstance(value, dict):
        return {name: _integral(item) for name, item in value.items()}
    return value


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$?(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`")
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*)`")


def _explained(sentence: str, raw: bytes) -> InvalidRequest:
    """msgspec's sentence with the value that was found and what to send instead."""
    match = _AT.match(sentence)
    what, path = (match["what"], match["path"] or "") if match else (sentence, "")
    if missing := _MISSING_FIELD.fullmatch(what):
        param = _joined(path, missing["name"])
        return InvalidRequest(f"{param}: missing: send {_hint(param)}.", param=param)
    if unknown := _UNKNOWN_FIELD.fullmatch(what):
        param = _joined(path, unknown["name"])
        return InvalidRequest(
            f"{param}: unknown field: check the spelling or leave it out.",
            param=param,
            code="unknown_parameter",
        )
    param = path.lstrip(".")
    if not param:
        return InvalidRequest(
            f"The body is wrong: {_lowered(what)}. Send a JSON object.", code="invalid_json"
        )
    try:
        param, value = _found(raw, param)
    except (msgspec.DecodeError, RecursionError):  # a number beyond every type, or nested too deeply to show
        return InvalidRequest(f"{param}: {_lowered(what)}; send {_hint(param)}.", param=param)
    return InvalidRequest(f"{param}: {_shown(value)}: {_lowered(what)}; send {_hint(param)}.", param=param)


def _joined(path: str, name: str) -> str:
    """`messages[...]` holds no index in msgspec's path, so it is left as it is."""
    parent = path.lstrip(".")
    return f"{parent}.{name}" if parent else name


def _hint(param: str) -> str:
    plain = re.sub(r"\[[^]]*\]", "", param)
    return HINTS.get(plain) or HINTS.get(plain.split(".")[0], "a valid value")


_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def _found(raw: bytes, path: str) -> tuple[str, Any]:
    """The value at msgspec's path and the path as far as it could be followed."""
    value: Any = msgspec.json.decode(raw)
    shown = ""
    for name, index in _STEP.findall(path):
        if name and isinstance(value, dict) and name in value:
            value, shown = value[name], f"{shown}.{name}" if shown else name
        elif index.isdigit() and isinstance(value, list) and int(index) < len(value):
            value, shown = value[int(index)], f"{shown}[{index}]"
        else:
            break
    return shown or path, value


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _lowered(sentence: str) -> str:
    return (sentence[:1].lower() + sentence[1:]).replace("`", "")

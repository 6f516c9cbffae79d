"""A request body: declared once as a msgspec struct, read from bytes by it, described by it.

A field is `name: Annotated[type, says(...)]`. The type and its bounds are what the decoder enforces and the
document shows; the sentence is the field's description in the document and the remedy of a refusal. Two other
declarations say more: `not_honoured` for a field that does not act, and `documented` where the document
shows another form than the decoder takes. A rule over several fields is a `Rule` in the struct's `RULES`.

The fast path is one decode and a few comparisons. Only where it fails is the body read again to say what
was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

import msgspec
from msgspec import Meta
from msgspec import inspect as declared

from tidegate.errors import InvalidRequest

Body = TypeVar("Body", bound="RequestBody")
REFERENCE = "#/components/schemas/{name}"
_SHOWN_CHARACTERS = 80
_SEARCHED_ITEMS = 2048


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule over several fields: `check` raises `InvalidRequest`, `schema` says the same in the document."""

    check: Callable[[Any], None]
    schema: dict[str, Any]


class RequestBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    RULES: ClassVar[tuple[Rule, ...]] = ()


@dataclass(frozen=True, slots=True)
class NotHonoured:
    """A field that does not act. null and `same_as_absent` pass, everything else is refused."""

    same_as_absent: tuple[Any, ...]
    remedy: str


def says(what_to_send: str) -> Meta:
    return Meta(description=what_to_send)


UNREAD = says("(advisory: not acted on)")  # a field of any type


def not_honoured(remedy: str, *same_as_absent: Any) -> Meta:
    return Meta(
        description=f"Not honoured: {remedy}. Other values are refused.",
        extra={"schema": {"enum": [None, *same_as_absent]}, "rule": NotHonoured(same_as_absent, remedy)},
    )


def documented(description: str | None, schema: dict[str, Any], *, is_required: bool = False) -> Meta:
    """The document shows `schema` in place of the decoder's type."""
    return Meta(description=description, extra={"schema": schema, "is_required": is_required})


def needs(field: str, other: str) -> Rule:
    """`field`, where it is not null, needs `other` to be true."""

    def check(body: Any) -> None:
        value = getattr(body, field)
        if value is not None and not getattr(body, other):
            shown = "given" if isinstance(value, msgspec.Struct) else value
            raise refusal(field, shown, f"it needs {other}: true")

    is_true = {"properties": {other: {"const": True}}, "required": [other]}
    return Rule(check, {"anyOf": [{"properties": {field: {"type": "null"}}}, is_true]})


def refusal(param: str, value: Any, remedy: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {_shown(value)}: {remedy}.", param=param)


def reference(struct: str) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(name=struct)}


def with_model(raw: bytes, model: str) -> bytes:
    """The body for a model that the path names, whatever model the body names. What is no object stays as it
    is: its reader says so."""
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return raw
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def not_honoured_fields(struct: type[msgspec.Struct]) -> dict[str, NotHonoured]:
    return {name: extra["rule"] for name, extra in _extras(_declared(struct)) if "rule" in extra}


def refuse_not_honoured(struct: msgspec.Struct, rules: Mapping[str, NotHonoured], where: str = "") -> None:
    """Raises `InvalidRequest` for a field of `not_honoured_fields` that is set. `where`: before its name."""
    for name, rule in rules.items():
        value = getattr(struct, name)
        # Compared with the type, because 1 == True and 0 == False.
        if value is not None and not any(
            type(value) is type(same) and value == same for same in rule.same_as_absent
        ):
            raise InvalidRequest(
                f"{where}{name}: {_shown(value)}: not honoured: {rule.remedy}.",
                param=where + name,
                code="unsupported_parameter",
            )


def describe(struct: type[msgspec.Struct], components: dict[str, dict[str, Any]]) -> None:
    """Put into msgspec's `components` what the declarations of `struct` say beyond its types."""
    for kind in (_declared(struct), *(nested for _, nested in _nested(_declared(struct), ""))):
        component = components[kind.cls.__name__]
        for name, extra in _extras(kind):
            shown = component["properties"][name]
            component["properties"][name] = extra["schema"] | (
                {"description": shown["description"]} if "description" in shown else {}
            )
            if extra.get("is_required") and name not in component.setdefault("required", []):
                component["required"].append(name)
        if component.get("additionalProperties") is False:
            component["additionalProperties"] = getattr(kind.cls, "UNKNOWN", {"type": "null"})
        if schemas := [rule.schema for rule in getattr(kind.cls, "RULES", ()) if rule.schema]:
            component["allOf"] = schemas


class BodyReader(Generic[Body]):
    """From bytes to a checked body."""

    def __init__(self, struct: type[Body]) -> None:
        self._decoder = msgspec.json.Decoder(struct)
        self._checks = tuple(rule.check for rule in struct.RULES)
        self._not_honoured = not_honoured_fields(struct)
        # All of a body's values at once: the loop is for the few bodies that set one of them.
        names = tuple(self._not_honoured)
        self._values: Callable[[Body], Any] = attrgetter(*names) if names else lambda _: ()
        self._nothing = (None,) * len(self._not_honoured)
        self._declared = _declared(struct)
        self._hints = dict(_hints(self._declared))

    def read(self, raw: bytes) -> Body:
        """Raises `InvalidRequest`, which names field, value and remedy."""
        body = self._decode(raw)
        if self._values(body) != self._nothing:
            refuse_not_honoured(body, self._not_honoured)
        for check in self._checks:
            check(body)
        return body

    def hint(self, param: str) -> str:
        """Say what to send instead: the field's description, or that of the field it is part of."""
        plain = re.sub(r"\[[^]]*\]", "", param)
        return self._hints.get(plain) or self._hints.get(plain.split(".")[0], "a valid value")

    def _decode(self, raw: bytes) -> Body:
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            if "got `float`" in str(error) or str(error).startswith(_UNKNOWN):
                return self._decode_leniently(raw)
            raise self._explained(str(error), raw) from None
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"The body is not UTF-8: {error.reason} at byte {error.start} of a text.", code="invalid_json"
            ) from None
        except msgspec.DecodeError as error:
            sentence = str(error).rstrip(".")
            where = "" if "(byte" in sentence else f" (it ends at byte {len(raw)})"
            remedy = ""
            if surrogate := _lone_surrogate(raw):
                sentence, where = f"{surrogate[1]} at byte {surrogate[0]} is half a character", ""
                remedy = " Send both halves, or leave it out."
            raise InvalidRequest(
                f"The body is not valid JSON: {sentence}{where}.{remedy}", code="invalid_json"
            ) from None
        except RecursionError:
            raise _too_deep() from None

    def _decode_leniently(self, raw: bytes) -> Body:
        """Decode once more with 3.0 taken for 3 (the same number in JSON Schema, but not to msgspec) and
        without unknown fields that say nothing."""
        try:
            plain = _without_idle(self._declared, _integral(msgspec.json.decode(raw)))
            return msgspec.convert(plain, self._decoder.type, str_keys=True)
        except msgspec.ValidationError as error:
            raise self._explained(str(error), raw) from None
        except RecursionError:
            raise _too_deep() from None
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None

    def _explained(self, sentence: str, raw: bytes) -> InvalidRequest:
        """msgspec's sentence with the value that was found and what to send instead."""
        match = _AT.match(sentence)
        what, path = (match["what"], match["path"] or "") if match else (sentence, "")
        if missing := _MISSING_FIELD.fullmatch(what):
            param = _joined(path, missing["name"])
            return InvalidRequest(f"{param}: missing: send {self.hint(param)}.", param=param)
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
            if isinstance(value, dict) and (path.endswith("[...]") or "`key` in" in sentence):
                param, value = self._wrong_item(param, value)
        except (msgspec.DecodeError, RecursionError):  # a number beyond every type, or nested too deeply
            found = ""
        else:
            found = f" {_shown(value)}:"
        return InvalidRequest(f"{param}:{found} {_lowered(what)}; send {self.hint(param)}.", param=param)

    def _wrong_item(self, param: str, items: dict[str, Any]) -> tuple[str, Any]:
        """Of a field that maps names to values, or of a list of such maps, the first pair that is wrong."""
        field, _, index = param.partition("[")
        kind = get_type_hints(self._decoder.type, include_extras=True)[field]
        alone = msgspec.defstruct("alone", [(field, kind)])
        for name, value in islice(items.items(), _SEARCHED_ITEMS):
            try:
                pair = {name: value}
                msgspec.convert({field: [pair] if index else pair}, alone, str_keys=True)
            except msgspec.ValidationError:
                return f"{param}.{name[:_SHOWN_CHARACTERS]}", value
        return param, items


def _too_deep() -> InvalidRequest:
    return InvalidRequest("The body is nested too deeply.", code="invalid_json")


def _declared(struct: type[msgspec.Struct]) -> declared.StructType:
    kind = declared.type_info(struct)
    assert isinstance(kind, declared.StructType)
    return kind


def _extras(kind: declared.StructType) -> Iterator[tuple[str, dict[str, Any]]]:
    for field in kind.fields:
        if isinstance(field.type, declared.Metadata) and field.type.extra:
            yield field.encode_name, field.type.extra


def _nested(kind: declared.StructType, path: str) -> Iterator[tuple[str, declared.StructType]]:
    """The structs that the fields of `kind` hold, each with its path."""
    for field in kind.fields:
        for struct in _structs_in(field.type):
            yield f"{path}{field.encode_name}.", struct
            yield from _nested(struct, f"{path}{field.encode_name}.")


def _structs_in(kind: declared.Type) -> Iterator[declared.StructType]:
    if isinstance(kind, declared.StructType):
        yield kind
    elif isinstance(kind, declared.Metadata):
        yield from _structs_in(kind.type)
    elif isinstance(kind, declared.ListType):
        yield from _structs_in(kind.item_type)
    elif isinstance(kind, declared.UnionType):
        for option in kind.types:
            yield from _structs_in(option)


def _hints(body: declared.StructType) -> Iterator[tuple[str, str]]:
    for path, kind in (("", body), *_nested(body, "")):
        for field in kind.fields:
            if isinstance(field.type, declared.Metadata) and field.type.extra_json_schema:
                yield path + field.encode_name, field.type.extra_json_schema["description"]


def _without_idle(kind: declared.StructType, value: Any) -> Any:
    """Leave out unknown fields that are null, and all of those where the struct says so (`reads_no_more`)."""
    if not isinstance(value, dict):
        return value
    known = {field.encode_name: field.type for field in kind.fields}
    is_lenient = getattr(kind.cls, "reads_no_more", lambda _: False)(value)
    kept = {}
    for name, item in value.items():
        if name not in known:
            if kind.forbid_unknown_fields and (item is None or is_lenient):
                continue
        elif struct := next(_structs_in(known[name]), None):
            parts = item if isinstance(item, list) else None
            item = _without_idle(struct, item) if parts is None else [_without_idle(struct, p) for p in parts]
        kept[name] = item
    return kept


def _integral(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_integral(item) for item in value]
    if isinstance(value, dict):
        return {name: _integral(item) for name, item in value.items()}
    return value


_UNKNOWN = "Object contains unknown field"
_AT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`(?:key in )?\$?(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN_FIELD = re.compile(_UNKNOWN + r" `(?P<name>.*)`")
_ESCAPES = re.compile(
    rb"""\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}  # a pair
    |(\\u[dD][89a-fA-F][0-9a-fA-F]{2})  # half of one
    |\\.""",
    re.VERBOSE | re.DOTALL,
)


def _lone_surrogate(raw: bytes) -> tuple[int, str] | None:
    """The byte at which half of a surrogate pair stands, and the half."""
    found = next((match for match in _ESCAPES.finditer(raw) if match[1]), None)
    return None if found is None else (found.start(), found[1].decode())


_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*)`")


def _joined(path: str, name: str) -> str:
    """`messages[...]` holds no index in msgspec's path, so it is left as it is."""
    parent = path.lstrip(".")
    return f"{parent}.{name}" if parent else name


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

"""What a body says about the form of its answer, in OpenAI's words and in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Protocol

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import (
    Rule,
    documented,
    not_honoured,
    not_honoured_fields,
    refusal,
    refuse_not_honoured,
    says,
)
from tidegate.gateway.constraints import Constraint

MAX_CHOICES = 1024
Schema = dict[str, Any] | bool
Text = Annotated[str, Meta(min_length=1)]
Choices = Annotated[list[Text], Meta(min_length=1, max_length=MAX_CHOICES)]
_SCHEMA = {"type": ["object", "boolean", "null"]}
_SCHEMA_SAYS = "a JSON schema, which the answer is valid for"
_WHITESPACE = "a regular expression of what is between the tokens of JSON; left out: one blank after , and :"


_FORMS = ("json", "regex", "choice", "grammar", "json_object")
_GUIDED = ("json", "regex", "choice", "grammar")


def _documents(schema: dict[str, Any]) -> Rule:
    """What `constraint_of` checks."""
    return Rule(lambda _: None, schema)


def _only(wanted: str, names: Sequence[str]) -> dict[str, Any]:
    return {name: {"enum": [False, None]} for name in names if name != wanted}


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$"), says("1 to 64 letters, digits, _ or -")]
    description: Annotated[
        Annotated[str, Meta(max_length=4096)] | None, says("a text (advisory: not acted on)")
    ] = None
    schema: Annotated[Schema | None, documented(_SCHEMA_SAYS + "; left out: any object", _SCHEMA)] = None
    strict: Annotated[
        bool | None,
        says("true: keywords that are not known are refused, and not named in a header of the answer"),
    ] = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    RULES: ClassVar[tuple[Rule, ...]] = (
        _documents(
            {
                "anyOf": [
                    {
                        "properties": {
                            "type": {"const": "json_schema"},
                            "json_schema": {"type": "object"},
                            "value": {"type": "null"},
                        },
                        "required": ["json_schema"],
                    },
                    {
                        "properties": {
                            "type": {"enum": ["text", "json_object"]},
                            "json_schema": {"type": "null"},
                            "value": {"type": "null"},
                        }
                    },
                    {
                        "properties": {"type": {"const": "json_object"}, "json_schema": {"type": "null"}},
                    },
                ]
            }
        ),
    )

    type: Annotated[Literal["text", "json_object", "json_schema"], says("text, json_object or json_schema")]
    json_schema: Annotated[
        JsonSchema | None, says("a name and a schema, together with type: json_schema")
    ] = None
    value: Annotated[
        Schema | None,
        documented("TGI's: a JSON schema, together with type: json_object", _SCHEMA),
    ] = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """As vLLM's; one of the first five."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        _documents(
            {
                "anyOf": [
                    {
                        "properties": {**_only(name, _FORMS), name: {"not": {"enum": [False, None]}}},
                        "required": [name],
                    }
                    for name in _FORMS
                ]
            }
        ),
    )

    json: Annotated[
        Schema | str | None, documented(_SCHEMA_SAYS, {"type": ["object", "boolean", "string", "null"]})
    ] = None
    regex: Annotated[Text | None, says("a regular expression that the whole answer matches")] = None
    choice: Annotated[Choices | None, says(f"1 to {MAX_CHOICES} texts, of which the answer is one")] = None
    grammar: Annotated[Text | None, says("a grammar of Lark's or GBNF's form")] = None
    json_object: Annotated[bool | None, says("true: any JSON object")] = None
    whitespace_pattern: Annotated[Text | None, says(_WHITESPACE)] = None
    disable_any_whitespace: Annotated[bool | None, says("true or false (it is fixed in any case)")] = None
    disable_fallback: Annotated[bool | None, says("true or false (there is none in any case)")] = None
    disable_additional_properties: Annotated[
        Any, not_honoured("say additionalProperties: false in the schema", False)
    ] = None
    structural_tag: Annotated[Any, not_honoured("use grammar, or leave it out")] = None


class Formatted(Protocol):
    """The fields of a body that say how its answer is formed."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def guided_json(self) -> Schema | str | None: ...
    @property
    def guided_regex(self) -> str | None: ...
    @property
    def guided_choice(self) -> list[str] | None: ...
    @property
    def guided_grammar(self) -> str | None: ...
    @property
    def guided_whitespace_pattern(self) -> str | None: ...


_FIELDS = ("response_format", "structured_outputs", *(f"guided_{kind}" for kind in _GUIDED))
_asked = attrgetter(*_FIELDS)
_NOTHING = (None,) * len(_FIELDS)


def constraint_of(body: Formatted) -> Constraint | None:
    """Raises `InvalidRequest` where there is more than one, or a part of one."""
    if _asked(body) == _NOTHING:
        return None
    found = _constraints(body)
    if len(found) > 1:
        names = [constraint.param for constraint in found]
        raise refusal(
            names[1], "given", f"{names[0]} says already how the answer is formed; send one of them"
        )
    return found[0] if found else None


def _constraints(body: Formatted) -> list[Constraint]:
    found = []
    if (asked := body.response_format) is not None:
        _check_response_format(asked)
        if asked.json_schema is not None:
            schema, strict = asked.json_schema.schema, bool(asked.json_schema.strict)
            value = {"type": "object"} if schema is None else schema
            found.append(Constraint("json", value, "response_format.json_schema.schema", strict))
        elif asked.value is not None:
            found.append(Constraint("json", asked.value, "response_format.value"))
        elif asked.type == "json_object":
            found.append(Constraint("json", {"type": "object"}, "response_format"))
    groups: list[tuple[str, Any, str | None]] = []
    if (outputs := body.structured_outputs) is not None:
        space = outputs.whitespace_pattern
        for kind in _GUIDED:
            groups.append((f"structured_outputs.{kind}", getattr(outputs, kind), space))
        if outputs.json_object:
            groups.append(("structured_outputs.json_object", {"type": "object"}, space))
        refuse_not_honoured(outputs, not_honoured_fields(StructuredOutputs), "structured_outputs.")
        if all(value is None for _, value, _ in groups):
            raise refusal(
                "structured_outputs", "given", "send one of json, regex, choice, grammar, json_object"
            )
    for kind in _GUIDED:
        groups.append((f"guided_{kind}", getattr(body, f"guided_{kind}"), body.guided_whitespace_pattern))
    for param, value, space in groups:
        if value is not None:
            kind = "json" if "json" in param else param.rpartition(".")[2].removeprefix("guided_")
            found.append(Constraint(kind, value, param, whitespace=space))  # type: ignore[arg-type]
    return found


def _check_response_format(asked: ResponseFormat) -> None:
    if asked.type == "json_schema" and asked.json_schema is None:
        raise refusal(
            "response_format.json_schema", None, "type json_schema needs it; send a name and a schema"
        )
    if asked.type != "json_schema" and asked.json_schema is not None:
        raise refusal("response_format.json_schema", "given", "it needs type: json_schema")
    if asked.type != "json_object" and asked.value is not None:
        raise refusal("response_format.value", "given", "it needs type: json_object")

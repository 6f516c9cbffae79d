"""Makes the grammar that an answer must follow of what the client sent, or says what is wrong with it.

Pure, and not bounded in time: `grammar_process` runs it, `grammar_pool` bounds it. The library checks a
grammar without a tokenizer. It says neither where in a schema it stumbles, which is found here by checking
parts of it, nor that it does not know a keyword, for which all of them are listed here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from tidegate.gateway.constraints import Checked, Constraint
from tidegate.messages.work import JSON_SPACING

LIMITS = LLParserLimits(verbose_errors=False)
SEARCH_SECONDS = 0.1  # for the part of a schema that is refused
MOST_WARNINGS = 8

# Keywords that the library enforces, or refuses.
ENFORCED = """
    $dynamicRef $recursiveRef $ref additionalItems additionalProperties allOf anyOf const contains
    dependencies dependentRequired dependentSchemas else enum exclusiveMaximum exclusiveMinimum format
    if items maxContains maxItems maxLength maxProperties maximum minContains minItems minLength
    minProperties minimum multipleOf not oneOf pattern patternProperties prefixItems properties
    propertyNames required then type unevaluatedItems unevaluatedProperties uniqueItems
"""
# Keywords that rule nothing out, JSON Schema's and OpenAPI's.
ANNOTATIONS = """
    $anchor $comment $defs $dynamicAnchor $id $recursiveAnchor $schema $vocabulary contentEncoding
    contentMediaType contentSchema default definitions deprecated description discriminator example
    examples externalDocs id readOnly title writeOnly xml
"""
KNOWN = frozenset(ENFORCED.split()) | frozenset(ANNOTATIONS.split())
_SCHEMAS_BY_NAME = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_SCHEMAS = (
    "items",
    "prefixItems",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)


def check(constraint: Constraint) -> Checked:
    try:
        if constraint.kind == "json":
            return _check_schema(constraint)
        grammar = _grammar(constraint)
    except (ValueError, RecursionError) as error:
        return Checked(refusal=str(error) or "it is nested too deeply")
    if why := _why_not(grammar):
        return Checked(refusal=why)
    return Checked(grammar)


def schema_grammar(schema: dict[str, Any], whitespace: str | None = None) -> str:
    """Raises `ValueError`."""
    options = {"whitespace_pattern": whitespace} if whitespace else JSON_SPACING
    text = msgspec.json.encode(schema).decode()
    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def _check_schema(constraint: Constraint) -> Checked:
    schema = constraint.value
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except msgspec.DecodeError as error:
            return Checked(refusal=f"it is not valid JSON: {error}")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        return Checked(refusal=f"{'no value is valid for it; ' if schema is False else ''}send a JSON object")
    unknown = [
        f"{path or '/'}: the keyword {name!r}"
        for path, part in _parts(schema)
        for name in part
        if name not in KNOWN and not name.startswith("x-")
    ]
    if "x-guidance" in schema:
        unknown.insert(0, "/: the keyword 'x-guidance'")
        schema = {name: value for name, value in schema.items() if name != "x-guidance"}
    if unknown and constraint.is_strict:
        return Checked(refusal=f"{unknown[0]} is not known, so strict cannot be kept; leave it out")
    grammar = schema_grammar(schema, constraint.whitespace)
    if why := _why_not(grammar):
        return Checked(refusal=_located(schema, why))
    return Checked(
        grammar, warnings=[f"{found} is not known and has no effect" for found in unknown[:MOST_WARNINGS]]
    )


def _grammar(constraint: Constraint) -> str:
    """Raises `ValueError`."""
    value = constraint.value
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if constraint.kind == "choice":
        # The one character that JSON may hold and a string of Lark's may not.
        texts = [msgspec.json.encode(text).decode().replace("\x7f", "\\u007f") for text in value]
        return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
    return LLMatcher.grammar_from_lark(any_to_lark(value))


def _why_not(grammar: str) -> str:
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return messages[0] if is_error else ""


def _parts(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and the schemas in it, each with its JSON pointer, definitions first."""
    if not isinstance(schema, dict):
        return
    for step, child in _children(schema):
        yield from _parts(child, path + step)
    yield path, schema


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _SCHEMAS_BY_NAME:
        if isinstance(found := schema.get(name), dict):
            for key, child in found.items():
                yield f"/{name}/{key.replace('~', '~0').replace('/', '~1')}", child
    for name in _SCHEMAS:
        found = schema.get(name)
        if isinstance(found, list):
            for place, child in enumerate(found):
                yield f"/{name}/{place}", child
        elif isinstance(found, dict):
            yield f"/{name}", found


def _located(schema: dict[str, Any], why: str) -> str:
    """Say where and by which keyword a schema is refused: the innermost part that is refused for the same
    reason, and the keyword without which it is not."""
    until = time.monotonic() + SEARCH_SECONDS
    named: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def reason(part: Any) -> str:
        if not isinstance(part, dict) or time.monotonic() > until:
            return ""
        try:
            return _why_not(schema_grammar({**named, **part}))
        except ValueError:
            return ""

    path, part, is_inner = "", schema, True
    while is_inner:
        is_inner = False
        for step, child in _children(part):
            if reason(child) == why:
                path, part, is_inner = path + step, child, True
                break
    for keyword in part:
        rest = {name: value for name, value in part.items() if name != keyword}
        if keyword not in named and reason(rest) != why:
            return f"{path}/{keyword}: {why}"
    return f"{path or '/'}: {why}"

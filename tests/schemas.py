"""Small schemas, one or more for each keyword of JSON Schema: which of them an answer can follow."""

from __future__ import annotations

from typing import Any

FOLLOWED: dict[str, dict[str, Any]] = {
    "additionalItems": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "boolean"}],
        "additionalItems": False,
    },
    "additionalProperties": {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    "anyOf": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    "const": {"const": {"a": [1, "é", None]}},
    "definitions": {"$ref": "#/definitions/a", "definitions": {"a": {"enum": [1, 2]}}},
    "enum": {"enum": ["a/b", 'say "no"', 4, False, None, [1], {"b": 2}]},
    "exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "format": {"type": "string", "format": "date"},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 50},
    "oneOf": {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "maximum": 9, "minimum": 0}]},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}$"},
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "integer", "minimum": 0, "maximum": 9}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    },
    "prefixItems": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
    "properties": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b~/\\": {"type": "null"}},
        "required": ["b~/\\"],
        "additionalProperties": False,
    },
    "recursion": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
    },
    "type": {"type": ["boolean", "null"]},
}
# The keyword that is named, and a schema in which it stands below others.
REFUSED: dict[str, dict[str, Any]] = {
    "contains": {"items": {"contains": {"const": 1}}},
    "dependencies": {"properties": {"a": {"dependencies": {"a": ["b"]}}}},
    "dependentRequired": {"anyOf": [{}, {"dependentRequired": {"a": ["b"]}}]},
    "dependentSchemas": {"dependentSchemas": {"a": {"type": "object"}}},
    "format": {"properties": {"a": {"type": "string", "format": "phone"}}},
    "if": {"allOf": [{"if": {"type": "string"}}]},
    "multipleOf": {"items": {"type": "number", "multipleOf": 1e-300}},
    "not": {"$ref": "#/$defs/a", "$defs": {"a": {"not": {"type": "string"}}}},
    "oneOf": {"properties": {"a": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}},
    "pattern": {"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}},
    "patternProperties": {"items": {"patternProperties": {"a": {"type": "null"}, "b": {"type": "boolean"}}}},
    "propertyNames": {"items": {"propertyNames": {"maxLength": 3}}},
    "$ref": {"items": {"$ref": "https://example.com/schema"}},
    "required": {"items": {"required": "a"}},
    "type": {"items": {"type": "text"}},
    "unevaluatedItems": {"items": {"unevaluatedItems": False}},
    "unevaluatedProperties": {"items": {"unevaluatedProperties": False}},
    "uniqueItems": {"properties": {"a": {"type": "array", "uniqueItems": True}}},
}
# No schema, or none that anything is valid for.
WRONG: tuple[Any, ...] = (
    None,
    False,
    3,
    "schema",
    [],
    {"enum": []},
    {"properties": 3},
    {"$ref": "#/nowhere"},
    {"type": 7},
)

"""Chat formats: how messages become a prompt, and how an answer becomes content, reasoning and calls.

`NAME.jinja` is a chat template, with its stop strings in `NAME.json`; a JSON alone says how answers of a
model are read whose checkpoint brings its own template. `response_template` is transformers' own
(`transformers.utils.chat_parsing`), whose parser reads it.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

FOLDER = Path(__file__).parent


class CallFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model writes calls: `begin`, the calls with `separator` between (None: one call is all), `end`.

    `call` is the text of one call around its slots `{name}` and `{arguments}`. Arguments are one JSON object,
    or, one behind another with `comma` between, `parameter`s with the slots `{key}` and `{value}`: the value
    is a Python literal (python), or text as it is and JSON where it is no string (text). `trigger` is what
    only a call begins with in a free answer; empty: an answer is either all calls or none.
    """

    call: str
    arguments: Literal["json", "python", "text"] = "json"
    begin: str = ""
    separator: str | None = None
    end: str = ""
    parameter: str = ""
    comma: str = ""
    trigger: str = ""


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the answers of a model end and are read. `stop`: what ends an answer beside the model's end tokens.
    Without a `response_template` all of an answer is content; without `calls` the format has none."""

    stop: tuple[str, ...] = ()
    response_template: dict[str, Any] | None = None
    calls: CallFormat | None = None


# What answers are in where the text of the checkpoint's template has all of these; the first wins.
RECOGNISED_BY: tuple[tuple[str, tuple[str, ...]], ...] = (("hermes", ("<tool_call>", "</tool_call>")),)


def response_format(tokenizer: Any) -> ResponseFormat | None:
    """Return the format of the tokenizer's chat template, or None where nothing is known of it: then its
    answers are content, and end by the model's own tokens."""
    template = template_text(tokenizer)
    if (name := names_by_template().get(template)) is not None:
        return read_format(name)
    if (own := getattr(tokenizer, "response_template", None)) is not None:
        found = recognised(template)
        return ResponseFormat(response_template=own, calls=found.calls if found else None)
    return recognised(template)


def calls_of(value: Any) -> list[Call]:
    """Return the calls in what the parser made of one `tool_calls` region, whatever form the response
    template gives them. Raises `ValueError` where that is no call: then the region's text is content."""
    if isinstance(value, dict):
        value = value.get("function", value)
    if isinstance(value, list):
        return [call for item in value for call in calls_of(item)]
    if isinstance(value, dict):
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if isinstance(name, str) and isinstance(arguments, dict):
            return [Call(name, arguments)]
    raise ValueError("this is no call of a tool")


def template_text(tokenizer: Any) -> str:
    """Return the chat template; of several all of them."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def recognised(template: str) -> ResponseFormat | None:
    return next(
        (read_format(name) for name, marks in RECOGNISED_BY if all(mark in template for mark in marks)), None
    )


def template_of(name: str) -> str:
    """Return the text of a built-in chat template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=64)
def read_format(name: str) -> ResponseFormat:
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=ResponseFormat)


@cache
def names_by_template() -> dict[str, str]:
    return {template_of(file.stem): file.stem for file in FOLDER.glob("*.jinja")}

"""Chat formats: how messages become a prompt, and how an answer becomes content, reasoning and calls.

`NAME.jinja` is a chat template, with its stop strings in `NAME.json`; a JSON alone says how answers of a
model are read whose checkpoint brings its own template. `response_template` is transformers' own
(`transformers.utils.chat_parsing`), whose parser reads it. Its patterns begin with a literal or where the
answer does, and what repeats in them is bounded: they run over hostile text on the engine's thread.
"""

from __future__ import annotations

import ast
import json
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple, TypeGuard

import msgspec
from msgspec.structs import replace

from tidegate.messages.work import ChatPrompt, Generate, Request
from tidegate.replica_args import CHAT_FORMATS, FORMATS_FOLDER


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


NO_CALL = "this is no call of a tool"
JSON_WORDS = {"true": True, "false": False, "null": None}  # which models mix into Python


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the answers of a model end and are read. `stop`: what ends an answer beside the model's end tokens.
    Without a `response_template` all of an answer is content; without `calls` the format has none. `models`
    are those that are trained on it, for people."""

    models: str = ""
    stop: tuple[str, ...] = ()
    response_template: dict[str, Any] | None = None
    calls: CallFormat | None = None


# What answers are in where the text of the checkpoint's template has all of these; the first wins.
RECOGNISED_BY: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|constrain|>")),
    ("deepseek-v3", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek-v3.1", ("<｜tool▁call▁begin｜>",)),
    ("mistral-args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen3-coder", ("<tool_call>", "<function=", "<parameter=")),
    ("glm-4.5", ("<tool_call>", "<arg_key>")),
    ("hermes", ("<tool_call>", "</tool_call>")),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3-json", ("<|start_header_id|>", '"parameters": dictionary')),
    ("llama3-json", ("<|python_tag|>",)),
    ("think", ("</think>",)),
)


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
    if isinstance(value, str):
        return python_calls(value)
    if isinstance(value, dict):
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if isinstance(name, str) and isinstance(arguments, dict):
            _check_sendable([name, arguments])
            return [Call(name, arguments)]
    raise ValueError(NO_CALL)


def _check_sendable(value: Any) -> None:
    """Raise `ValueError` for what JSON or UTF-8 has no form for, such as half of a surrogate pair."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def python_calls(text: str) -> list[Call]:
    """Read `[f(a=1), g()]`. Raises `ValueError`."""
    try:
        written = _Words().visit(ast.parse(text.strip(), mode="eval")).body
        nodes = written.elts if isinstance(written, ast.List) else []
        calls = [
            Call(
                ast.unparse(node.func),
                {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords},
            )
            for node in nodes
            if is_call(node)
        ]
        _check_sendable(calls)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(NO_CALL) from error
    if not calls or len(calls) != len(nodes):
        raise ValueError(NO_CALL)
    return calls


def is_call(node: ast.expr) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name | ast.Attribute)
        and not node.args
        and all(keyword.arg for keyword in node.keywords)
    )


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:  # as `ast` calls it
        return ast.Constant(JSON_WORDS[node.id]) if node.id in JSON_WORDS else node


class Stops(NamedTuple):
    """What ends the answers of a chat format. A special token has no text, so it stops by its id."""

    texts: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()


def format_stops(tokenizer: Any, vocabulary_size: int) -> Stops:
    found = response_format(tokenizer)
    if found is None:
        return Stops()
    added = tokenizer.added_tokens_decoder.items()
    special = {str(token): token_id for token_id, token in added if token.special}
    return Stops(
        tuple(stop for stop in found.stop if stop not in special),
        tuple(special[stop] for stop in found.stop if special.get(stop, vocabulary_size) < vocabulary_size),
    )


def with_stops(request: Request, stops: Stops) -> Request:
    """Let a chat end where its format does, beside where the client wants it to. Not where it is to go on
    behind the model's own end tokens: these are the format's."""
    work = request.work
    if not any(stops) or not isinstance(work, Generate) or not isinstance(work.prompt, ChatPrompt):
        return request
    sampling = work.sampling
    if sampling.ignore_eos:
        return request
    both = replace(
        sampling,
        stop=(*sampling.stop, *stops.texts),
        stop_token_ids=(*sampling.stop_token_ids, *stops.token_ids),
    )
    return replace(request, work=replace(work, sampling=both))


def is_built_in(tokenizer: Any) -> bool:
    """True where the tokenizer's chat template is one of those here."""
    return template_text(tokenizer) in names_by_template()


def template_text(tokenizer: Any) -> str:
    """Return the chat template; of several all of them."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def recognised(template: str) -> ResponseFormat | None:
    """Return the format of a checkpoint's own template. Its answers end as the checkpoint says."""
    for name, marks in RECOGNISED_BY:
        if all(mark in template for mark in marks):
            return replace(read_format(name), stop=())
    return None


def template_of(name: str) -> str:
    """Return the text of a built-in chat template."""
    return (FORMATS_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=64)
def read_format(name: str) -> ResponseFormat:
    return msgspec.json.decode((FORMATS_FOLDER / f"{name}.json").read_bytes(), type=ResponseFormat)


@cache
def names_by_template() -> dict[str, str]:
    return {template_of(name): name for name in CHAT_FORMATS}

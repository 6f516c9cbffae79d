"""Tools that a model may call: how clients define and choose them, and how answers hold calls.

`functions` and `function_call` are the older names of the same; what they ask is answered in their shape.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import documented, refusal, says
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.sse import text_json
from tidegate.messages.work import CallDelta, Segment

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 1 << 19
MAX_TOOLS_DEPTH = 64
INVALID = "invalid_json"  # the one argument of a call in the history whose arguments are no JSON object

FunctionName = Annotated[
    str,
    Meta(
        pattern=r"^[a-zA-Z0-9_.-]+$",
        min_length=1,
        max_length=64,
        description="1 to 64 letters, digits, _, - or .",
    ),
]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "object"},
        "properties": {"type": "object"},
        "required": {"type": "array", "items": {"type": "string"}},
    },
}


class FunctionDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName
    description: Annotated[str | None, says("what it does, for the model")] = None
    parameters: Annotated[
        dict[str, Any] | None,
        documented(
            "a JSON schema of type object; left out: it has none", {"anyOf": [{"type": "null"}, PARAMETERS]}
        ),
    ] = None
    strict: Annotated[bool | None, says("true: what of the schema cannot be enforced is refused")] = None


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: NamedFunction


class NamedToolInList(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: NamedFunction


class Allowed(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolInList], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """Fewer than all of `tools`."""

    allowed_tools: Allowed


Tools = Annotated[
    Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None,
    says(f'at most {MAX_TOOLS} of {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}'),
]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedTools | None,
    says(
        'none, auto, required, {"type": "function", "function": {"name": ...}}, or {"type": "allowed_tools", '
        '"allowed_tools": {"mode": "auto" or "required", "tools": [...]}}; left out: auto'
    ),
]
Functions = Annotated[
    Annotated[list[FunctionDefinition], Meta(max_length=MAX_TOOLS)] | None,
    says(f"at most {MAX_TOOLS} functions, as in tools, which are their newer name"),
]
FunctionChoice = Annotated[
    Literal["none", "auto"] | NamedFunction | None, says('none, auto, or {"name": ...}; left out: auto')
]


class CalledFunction(msgspec.Struct, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: Annotated[str, says("JSON text, as it was in the answer")]


class ToolCall(msgspec.Struct, kw_only=True):
    id: Annotated[str, Meta(min_length=1, max_length=256)]
    function: CalledFunction
    type: Literal["function"] = "function"


class Asked(NamedTuple):
    """What a call says of tools, as the fields of a `ChatPrompt`."""

    tools: list[dict[str, Any]]
    choice: str
    is_parallel: bool
    schemas: Sequence[Constraint] = ()  # that strict tools promise to follow


NO_TOOLS = Asked([], "", True)


def asked_tools(
    tools: Sequence[Tool],
    choice: str | NamedTool | AllowedTools | None,
    parallel: bool | None,
    parameters: str = "tools[{}].function.parameters",
) -> Asked:
    """Check the tools of a body, and its `tool_choice` against them. Raises `InvalidRequest`.

    With `none` the model is shown none. `parameters`: where those of a tool are, `{}` being its place.
    """
    if not tools:
        return NO_TOOLS
    definitions = [tool.function for tool in tools]
    is_parallel = parallel is not False
    match choice:
        case None | "auto" | "none" | "required":
            return asked(definitions, choice or "auto", parameters, is_parallel=is_parallel)
        case NamedTool(function=function):
            _check_named(function.name, definitions, "tool_choice.function.name", "tools")
            return asked(definitions, function.name, parameters, is_parallel=False, is_named=True)
        case AllowedTools(allowed_tools=allowed):
            names = {tool.function.name for tool in allowed.tools}
            for at, tool in enumerate(allowed.tools):
                where = f"tool_choice.allowed_tools.tools[{at}].function.name"
                _check_named(tool.function.name, definitions, where, "tools")
            return asked(definitions, allowed.mode, parameters, is_parallel=is_parallel, only=names)
    raise AssertionError(choice)


def asked_functions(functions: Sequence[FunctionDefinition], choice: str | NamedFunction | None) -> Asked:
    """The same of `functions` and `function_call`, of which an answer has one at most."""
    if not functions:
        return NO_TOOLS
    parameters = "functions[{}].parameters"
    if isinstance(choice, NamedFunction):
        _check_named(choice.name, functions, "function_call.name", "functions")
        return asked(functions, choice.name, parameters, is_parallel=False, is_named=True)
    return asked(functions, choice or "auto", parameters, is_parallel=False)


def asked(
    definitions: Sequence[FunctionDefinition],
    choice: str,
    parameters: str,
    *,
    is_parallel: bool,
    is_named: bool = False,
    only: Container[str] | None = None,
) -> Asked:
    """Check definitions. `is_named`: the choice is a tool's name, which may be any word. `only`: the names of
    those that the model is shown, where not all. What is strict is enforced of what may be called."""
    places = [parameters.format(at) for at in range(len(definitions))]
    made = [shown(one, place) for one, place in zip(definitions, places, strict=True)]
    check_size(made, parameters.split("[")[0])
    if is_named and choice in ("auto", "required"):  # which mean something else to a replica
        raise refusal("tool_choice", choice, "a tool of this name cannot be forced; give it another name")
    if choice == "none" and not is_named:
        return NO_TOOLS
    schemas = [
        Constraint("json", one.parameters, place, is_strict=True)
        for one, place in zip(definitions, places, strict=True)
        if one.strict
        and one.parameters
        and (only is None or one.name in only)
        and (not is_named or one.name == choice)
    ]
    if only is not None:
        made = [tool for tool in made if _name(tool) in only]
    return Asked(made, choice, is_parallel, schemas)


def is_deep(found: dict[str, Any] | list[Any], most: int = MAX_TOOLS_DEPTH) -> bool:
    """True for more than `most` levels, which what reads it later may not survive."""
    depth, level = 0, list[Any](found.values() if isinstance(found, dict) else found)
    while level and depth <= most:
        level = [item for item in level if isinstance(item, (dict, list))]
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return bool(level)


def checked(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a call in the history. Raises `InvalidRequest`."""
    if is_deep(arguments):
        raise refusal(where, "given", f"arguments have at most {MAX_TOOLS_DEPTH} levels")
    return arguments


def called(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    """A call in the history as templates want it: with an object of arguments. The model sees again what it
    wrote where that is none."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        found = None
    if not isinstance(found, dict) or is_deep(found):
        found = {INVALID: arguments}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": found}}


class AnswerFunction(msgspec.Struct):
    name: str
    arguments: str


class AnswerCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: AnswerFunction


def whole_calls(segments: Sequence[Segment]) -> list[AnswerCall]:
    """The calls of an answer, in their order."""
    calls: list[AnswerCall] = []
    for segment in segments:
        for part in segment.output.calls:
            if part.index >= len(calls):
                calls.append(AnswerCall(part.id, "function", AnswerFunction(part.name, "")))
            calls[part.index].function.arguments += part.arguments
    return calls


def call_deltas(parts: Sequence[CallDelta]) -> list[bytes]:
    """The deltas of chunks, each a JSON object: the name of a call first, then pieces of its arguments."""
    deltas = []
    for part in parts:
        if part.name:
            deltas.append(
                b'{"tool_calls":[{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":""}}]}'
                % (part.index, text_json(part.id), text_json(part.name))
            )
        if part.arguments:
            deltas.append(
                b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}'
                % (part.index, text_json(part.arguments))
            )
    return deltas


def function_deltas(parts: Sequence[CallDelta]) -> list[bytes]:
    """The same in the older shape, which holds one call."""
    deltas = []
    for part in parts:
        if part.index == 0 and part.name:
            deltas.append(b'{"function_call":{"name":%b,"arguments":""}}' % text_json(part.name))
        if part.index == 0 and part.arguments:
            deltas.append(b'{"function_call":{"arguments":%b}}' % text_json(part.arguments))
    return deltas


def shown(definition: FunctionDefinition, where: str) -> dict[str, Any]:
    """A definition as templates show it to the model. `where`: its parameters."""
    parameters = dict(definition.parameters or {})
    _check_parameters(parameters, where)
    function: dict[str, Any] = {"name": definition.name}
    if definition.description is not None:
        function["description"] = definition.description
    function["parameters"] = {"type": "object", "properties": {}, **parameters}
    return {"type": "function", "function": function}


def _check_parameters(schema: dict[str, Any], where: str) -> None:
    if (kind := schema.get("type", "object")) != "object":
        raise refusal(f"{where}.type", kind, 'arguments are an object; use "object"')
    if not isinstance(properties := schema.get("properties", {}), dict):
        raise refusal(f"{where}.properties", properties, "it is an object of schemas")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise refusal(f"{where}.required", required, "it is a list of names")


def check_size(tools: list[dict[str, Any]], where: str) -> None:
    if is_deep(tools) or len(msgspec.json.encode(tools)) > MAX_TOOLS_BYTES:
        most = f"they have at most {MAX_TOOLS_BYTES} bytes and {MAX_TOOLS_DEPTH} levels"
        raise refusal(where, "given", most)


def _check_named(name: str, definitions: Sequence[FunctionDefinition], where: str, among: str) -> None:
    if not any(definition.name == name for definition in definitions):
        raise refusal(where, name, f"it is none of {among}; name one of them")


def _name(tool: dict[str, Any]) -> str:
    return str(tool["function"]["name"])

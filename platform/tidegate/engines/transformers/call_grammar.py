"""The grammar of answers that call tools, from the tools and the way that the model writes calls.

It is Lark as llguidance reads it. An answer that must call is calls alone, behind what the model may think
first; one that may is free text in which a call, once begun, goes on as one (the grammar is lazy). Arguments
follow the tool's schema; one that llguidance cannot enforce whole leaves them any object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from tidegate.engines.transformers.formats import Call, CallFormat, ResponseFormat, python_calls
from tidegate.engines.transformers.prompts import PromptError
from tidegate.engines.transformers.responses import REASONING, mark
from tidegate.messages.work import JSON_SPACING, ChatPrompt

ANY_OBJECT = {"type": "object"}
MOST_REASONING_SPACE = 8
SLOT = re.compile(r"(\{(?:name|arguments|key|value)\})")
PYTHON = r"""
py_value: PY_STRING | PY_NUMBER | "True" | "False" | "None" | py_list | py_dict
py_list: "[" (py_value (", " py_value)*)? "]"
py_dict: "{" (py_pair (", " py_pair)*)? "}"
py_pair: PY_STRING ": " py_value
PY_INTEGER: /-?(0|[1-9][0-9]{0,18})/
PY_NUMBER: /-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?/
PY_STRING: /"([^"\\\x00-\x1f]|\\[nrt"'\\])*"/
"""


def call_grammar(
    form: ResponseFormat, prompt: ChatPrompt, begun: str, tokenizer: Any, content: str = ""
) -> str:
    """Return the grammar of the answer to `prompt`; empty: there is nothing to enforce but `content`.

    `begun`: what the prompt has written of the answer. `content`: the grammar of one that calls nothing,
    which binds what comes behind the model's thoughts. Raises `PromptError` for a tool that must be called
    and cannot.
    """
    rules = _Rules(tokenizer)
    thinks = _Reasoning.of(form.response_template, begun)
    if not prompt.tools or form.calls is None:
        thought = thinks.before(rules) if content else ""
        return _with_content(rules, f"{thought} @content", content) if thought else ""
    calls = _Calls(form.calls, prompt, rules)
    if name := calls.unreadable():
        if prompt.tool_choice != "auto":
            raise PromptError(
                f"tools: this model writes calls as Python, which has no form for the tool {name!r}: its "
                "name and those of its parameters must be Python's, and none of its keywords."
            )
        return _with_content(rules, f"{thinks.before(rules)} @content", content) if content else ""
    if prompt.tool_choice != "auto":
        rules.add("start", f"{thinks.before(rules)} {calls.all()}")
        return rules.text()
    if content:
        return _with_content(rules, f"{thinks.before(rules)} ({calls.all()} | @content)", content)
    if not form.calls.trigger:
        return ""
    call = f"{rules.until(form.calls.trigger)} {calls.behind_trigger()}"
    others = rules.kept_whole(besides=(form.calls.trigger, *thinks.marks))
    parts = [call if prompt.parallel_tool_calls else "", thinks.within(rules), others]
    free = f"({' | '.join(filter(None, parts))})*" if any(parts) else ""
    end = "TEXT" if prompt.parallel_tool_calls else f"(TEXT | {call})"
    rules.add("start", f"{thinks.rest(rules)} {free} {end}")
    return rules.text()


def _with_content(rules: _Rules, start: str, content: str) -> str:
    rules.add("start", start)
    return json.dumps({"grammars": [{"lark_grammar": rules.text()}, _named(content)]})


def _named(grammar: str) -> dict[str, Any]:
    if grammar.lstrip().startswith("{"):
        [only] = json.loads(grammar)["grammars"]
        return {**only, "name": "content"}
    return {"lark_grammar": grammar, "name": "content"}


class _Rules:
    """Lark rules, and how a tokenizer's text is written in them."""

    def __init__(self, tokenizer: Any) -> None:
        self._added, self._pattern = _added_tokens(tokenizer)
        self._rules: dict[str, str] = {}
        self._lazy: dict[str, str] = {}
        self._needs_python = False

    def add(self, name: str, body: str) -> str:
        self._rules[name] = body
        return name

    def literal(self, text: str) -> str:
        """Write a text. Tokens that the tokenizer keeps whole are no text to a grammar: they stand by id, and
        as text too where other tokens may spell them."""
        return " ".join(
            json.dumps(part, ensure_ascii=False) if token is None else self._token(part, *token)
            for part, token in self._parts(text)
        )

    def until(self, text: str) -> str:
        """Write any text up to and with `text`, whose first place ends it."""
        (first, token), *rest = self._parts(text)
        behind = self.literal("".join(part for part, _ in rest))
        forms = [f"TEXT <[{token[0]}]>"] if token is not None else []
        if token is None or not token[1]:
            name = self._lazy.setdefault(first, f"until_{len(self._lazy)}")
            forms.append(name)
        return f"({' | '.join(forms)}) {behind}"

    def kept_whole(self, besides: Collection[str]) -> str:
        """Write any text up to and with a token that is no text to a grammar, but for some."""
        tokens = sorted({token for text, (token, _) in self._added.items() if text not in besides})
        return f"TEXT <[{','.join(map(str, tokens))}]>" if tokens else ""

    def schema(self, schema: Mapping[str, Any]) -> str:
        return f"%json {json.dumps({**schema, 'x-guidance': JSON_SPACING}, ensure_ascii=False)}"

    def python(self, rule: str) -> str:
        self._needs_python = True
        return rule

    def text(self) -> str:
        lines = [f"{name}: {body}" for name, body in self._rules.items()]
        lines += [
            f"{name}[lazy]: TEXT {json.dumps(text, ensure_ascii=False)}" for text, name in self._lazy.items()
        ]
        lines += [r"TEXT: /(.|\n)*/", rf"SPACE: /[ \t\n]{{0,{MOST_REASONING_SPACE}}}/"]
        return "%llguidance {}\n" + "\n".join(lines) + "\n" + (PYTHON if self._needs_python else "")

    def _parts(self, text: str) -> Iterator[tuple[str, tuple[int, bool] | None]]:
        """Cut a text at the tokens that are kept whole: (part, (token id, is special) or None)."""
        for part in self._pattern.split(text) if self._pattern is not None else [text]:
            if part:
                yield part, self._added.get(part)

    def _token(self, text: str, token: int, is_special: bool) -> str:
        if is_special:
            return f"<[{token}]>"
        return f"(<[{token}]> | {json.dumps(text, ensure_ascii=False)})"


@lru_cache(maxsize=4)
def _added_tokens(tokenizer: Any) -> tuple[dict[str, tuple[int, bool]], re.Pattern[str] | None]:
    added = {
        str(token): (token_id, bool(token.special))
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if str(token)
    }
    if not added:
        return {}, None
    longest_first = sorted(added, key=len, reverse=True)
    return added, re.compile(f"({'|'.join(map(re.escape, longest_first))})")


class _Calls:
    """The rules of calls of some tools in one format."""

    def __init__(self, form: CallFormat, prompt: ChatPrompt, rules: _Rules) -> None:
        self._form, self._rules = form, rules
        self._is_parallel = prompt.parallel_tool_calls and form.separator is not None
        named = prompt.tool_choice not in ("auto", "required")
        self._functions = [
            tool["function"]
            for tool in prompt.tools
            if not named or tool["function"]["name"] == prompt.tool_choice
        ]
        self._arguments = [
            self._arguments_of(place, function.get("parameters") or ANY_OBJECT)
            for place, function in enumerate(self._functions)
        ]

    def unreadable(self) -> str:
        """Return the name of a tool whose calls would not be read as they are written; empty: all are."""
        if self._form.arguments != "python":
            return ""
        for function in self._functions:
            name, keys = function["name"], _properties(function.get("parameters") or ANY_OBJECT)
            try:
                read = python_calls(f"[{name}({', '.join(f'{key}=0' for key in keys)})]")
            except ValueError:
                return str(name)
            if read != [Call(name, dict.fromkeys(keys, 0))]:
                return str(name)
        return ""

    def all(self) -> str:
        """Write one call or, in parallel, several."""
        form = self._form
        return self._group(form.begin, self._any("call", form.call))

    def behind_trigger(self) -> str:
        """The same without the trigger, which has been written."""
        form = self._form
        if form.begin:
            return self._group(form.begin.removeprefix(form.trigger), self._any("call", form.call))
        return self._any("call_rest", form.call.removeprefix(form.trigger))

    def _group(self, begin: str, call: str) -> str:
        form, rules = self._form, self._rules
        more = f"({rules.literal(form.separator or '')} {call})*" if self._is_parallel else ""
        return f"{rules.literal(begin)} {call} {more} {rules.literal(form.end)}"

    def _any(self, name: str, text: str) -> str:
        calls = [
            self._filled(text, {"{name}": function["name"]}, {"{arguments}": arguments})
            for function, arguments in zip(self._functions, self._arguments, strict=True)
        ]
        return self._rules.add(name, "\n    | ".join(calls))

    def _filled(self, text: str, texts: Mapping[str, str], rules: Mapping[str, str]) -> str:
        """Write a text, its slots filled with texts or rules."""
        made, plain = [], ""
        for part in SLOT.split(text):
            if part in rules:
                made += [self._rules.literal(plain), rules[part]]
                plain = ""
            else:
                plain += texts.get(part, part)
        return " ".join([*made, self._rules.literal(plain)])

    def _arguments_of(self, place: int, schema: dict[str, Any]) -> str:
        """Return the name of the rule of one tool's arguments."""
        name = f"arguments_{place}"
        if self._form.arguments == "json":
            return self._rules.add(name, self._rules.schema(enforceable(closed(schema))))
        required = set(schema.get("required") or ())
        defs: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parameters = [
            (self._parameter(f"{name}_{at}", key, {**defs, **kind}), key in required)
            for at, (key, kind) in enumerate(_properties(schema).items())
        ]
        return self._rules.add(name, self._in_order(name, parameters))

    def _in_order(self, name: str, parameters: list[tuple[str, bool]]) -> str:
        """Write parameters one behind another, those that are not required perhaps."""
        comma = self._form.comma
        if not comma:
            return " ".join(rule if needed else f"{rule}?" for rule, needed in parameters) or '""'
        joint = self._rules.literal(comma)
        # The rules of what may follow, once where it is the first and once behind another.
        first, later = '""', '""'
        for at, (rule, needed) in reversed(list(enumerate(parameters))):
            rest = self._rules.add(f"{name}_after_{at}", later)
            behind = f"{joint} {rule} {rest}"
            first = (
                f"{rule} {rest}" if needed else f"{rule} {rest} | {self._rules.add(f'{name}_no_{at}', first)}"
            )
            later = behind if needed else f"{behind} | {rest}"
        return first

    def _parameter(self, name: str, key: str, schema: dict[str, Any]) -> str:
        before, _, after = self._form.parameter.partition("{value}")
        rules, kinds = self._rules, _types(schema)
        begin = rules.literal(before.replace("{key}", key))
        if self._form.arguments == "python":
            return rules.add(name, f"{begin} {_python_value(rules, schema, kinds)} {rules.literal(after)}")
        if "enum" in schema and all(isinstance(value, str) for value in schema["enum"]):
            values = " | ".join(rules.literal(value) or '""' for value in schema["enum"])
            return rules.add(name, f"{begin} ({values}) {rules.literal(after)}")
        if not kinds or "string" in kinds:
            return rules.add(name, f"{begin} {rules.until(after)}")
        return rules.add(name, f"{begin} {rules.schema(enforceable(schema))} {rules.literal(after)}")


def _properties(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {key: kind for key, kind in (schema.get("properties") or {}).items() if isinstance(kind, dict)}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of arguments without those that it does not name, unless it says that there may be."""
    is_open = "additionalProperties" in schema or "patternProperties" in schema or "properties" not in schema
    is_open = is_open or any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf"))
    return schema if is_open else {**schema, "additionalProperties": False}


def enforceable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or where llguidance cannot enforce it one of its type alone."""
    if _is_enforceable(json.dumps(schema)):
        return schema
    kinds = _types(schema)
    return {"type": kinds[0] if len(kinds) == 1 else kinds} if kinds else {}


@lru_cache(maxsize=64)
def _is_enforceable(schema: str) -> bool:
    """Compile a schema to see. Agents send the same tools with each call."""
    try:
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    except ValueError:
        return False


def _types(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    known = ("string", "integer", "number", "boolean", "null", "array", "object")
    return [kind for kind in kinds if kind in known] if isinstance(kinds, list) else []


def _python_value(rules: _Rules, schema: dict[str, Any], kinds: list[str]) -> str:
    simple = (str, bool, int, float, type(None))
    if schema.get("enum") and all(isinstance(value, simple) for value in schema["enum"]):
        literals = [
            json.dumps(v, ensure_ascii=False) if isinstance(v, str) else repr(v) for v in schema["enum"]
        ]
        return "(" + " | ".join(rules.literal(text) for text in literals) + ")"
    by_kind = {
        "string": "PY_STRING",
        "integer": "PY_INTEGER",
        "number": "PY_NUMBER",
        "boolean": '"True" | "False"',
        "null": '"None"',
        "array": "py_list",
        "object": "py_dict",
    }
    return rules.python("(" + " | ".join(by_kind[kind] for kind in kinds) + ")" if kinds else "py_value")


class _Reasoning:
    """What a model may think before or between: from `opens` to `closes`; empty where it does not."""

    def __init__(
        self, opens: str = "", closes: str = "", *, is_open: bool = False, is_over: bool = False
    ) -> None:
        self._opens, self._closes = opens, closes
        self._is_open, self._is_over = is_open, is_over

    @classmethod
    def of(cls, template: dict[str, Any] | None, begun: str) -> _Reasoning:
        fields = (template or {}).get("fields", {})
        for name in REASONING:
            if name in fields:
                opens, closes = (mark(fields[name], side) for side in ("open", "close"))
                if opens and closes:
                    is_open = begun.rfind(opens) > begun.rfind(closes)
                    return cls(opens, closes, is_open=is_open, is_over=closes in begun)
        return cls()

    @property
    def marks(self) -> tuple[str, str]:
        return self._opens, self._closes

    def before(self, rules: _Rules) -> str:
        """Write what may come before calls."""
        if self._is_open:
            return self.rest(rules)
        if not self._opens or self._is_over:
            return ""
        return f"({rules.literal(self._opens)} {rules.until(self._closes)} SPACE)?"

    def rest(self, rules: _Rules) -> str:
        """Write the rest of what the prompt has begun."""
        return f"{rules.until(self._closes)} SPACE" if self._is_open else ""

    def within(self, rules: _Rules) -> str:
        """Write a free text that ends with a thought."""
        return f"{rules.until(self._opens)} {rules.until(self._closes)}" if self._opens else ""

"""Reads an answer while it is written: content, reasoning, and calls of tools.

Which region of the text a piece belongs to says transformers' own parser, by the model's response template
(`formats`). What this module adds is what a stream needs: the arguments of a call go out piece by piece as
the model writes them, with the name first, and what is no call after all is content. Pushing the same text
again rebuilds the same state, so a continued answer goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from transformers.utils.chat_parsing.response_parser import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from tidegate.engines.transformers.formats import (
    ResponseFormat,
    calls_of,
    read_format,
    response_format,
    template_text,
)
from tidegate.messages.work import CallDelta, ChatPrompt

DEFAULT = "hermes"
CALLS = "tool_calls"
REASONING = ("reasoning_content", "reasoning", "thinking")  # as checkpoints' own templates name it
MOST_READ = 1 << 12  # characters that are kept behind what was read


class Part(NamedTuple):
    """What a piece of text adds to an answer."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()


class AnswerFormats:
    """The formats of a model's answers, from its tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        chat_template = template_text(tokenizer)
        form = response_format(tokenizer)
        is_own = form is not None and form.response_template == getattr(tokenizer, "response_template", None)
        self._model = form if form is None or is_own else _without_unknown(form, chat_template)
        self._default = _without_unknown(read_format(DEFAULT), chat_template)

    def of(self, prompt: ChatPrompt) -> ResponseFormat | None:
        """Return the format of the answer to a prompt. A model that knows none writes the calls that it must
        as `DEFAULT` has them."""
        must_call = prompt.tool_choice not in ("", "auto")
        form = self._model
        return self._default if must_call and (form is None or form.calls is None) else form


@lru_cache(maxsize=4)
def answer_formats(tokenizer: Any) -> AnswerFormats:
    return AnswerFormats(tokenizer)


def _without_unknown(form: ResponseFormat, chat_template: str) -> ResponseFormat:
    """Leave out thoughts where the chat template knows of none: such models have none."""
    if form.response_template is None:
        return form
    fields = {
        name: field
        for name, field in form.response_template["fields"].items()
        if name not in REASONING or mark(field, "close") in chat_template
    }
    return msgspec.structs.replace(form, response_template={**form.response_template, "fields": fields})


def mark(field: dict[str, Any], side: str) -> str:
    """Return the text that opens or closes a region, where it is one text with white space around it; else
    nothing."""
    if isinstance(text := field.get(side), list):
        text = text[0]
    if text:
        return str(text)
    pattern = str(field.get(f"{side}_pattern", ""))
    text = re.sub(r"\\(.)", r"\1", pattern.replace(r"\s*", ""))
    try:
        return text if re.fullmatch(pattern, text) else ""
    except re.error:  # of the parser's dialect
        return ""


def reading_template(template: dict[str, Any] | None, *, has_tools: bool) -> ResponseTemplate | None:
    """Return what splits the answers of a request, or None where all of them is content. Without tools a call
    is text like any other."""
    if template is None:
        return None
    return _compiled(msgspec.json.encode(template, order="deterministic"), has_tools)


@lru_cache(maxsize=16)
def _compiled(template: bytes, has_tools: bool) -> ResponseTemplate | None:
    read = msgspec.json.decode(template)
    fields = {name: field for name, field in read["fields"].items() if has_tools or name != CALLS}
    if not any(name == CALLS or name in REASONING for name in fields):
        return None
    return load_response_template({**read, "fields": fields})


def delimiters(template: ResponseTemplate) -> str:
    """Return the text of all that opens or closes a region."""
    marks = [mark for field in template.fields.values() for mark in (field.open_re, field.close_re)]
    return "\n".join([mark.pattern for mark in marks if mark is not None])


def begun_answer(template: ResponseTemplate, prompt: str) -> str:
    """Return what a prompt has already written of the answer that follows it."""
    ends = [match.end() for match in template.start_anchor_re.finditer(prompt)]
    return prompt[ends[-1] :] if ends else ""


def call_id(request_id: str, index: int) -> str:
    """Name a call. Nine letters and digits: Mistral's templates take no other ids back."""
    return hashlib.sha256(f"{request_id}/{index}".encode()).hexdigest()[:9]


class ResponseReader:
    """Splits one answer. `begun`: what the prompt has written of it."""

    def __init__(
        self, template: ResponseTemplate, begun: str, tools: list[dict[str, Any]], request_id: str
    ) -> None:
        self._request_id = request_id
        self._calls = 0
        self._call: _Written | None = None
        self._content, self._reasoning = _Edges(), _Edges()
        self._parser = _Parser(template, begun, tools)
        self._read(self._parser.initial_events)

    def push(self, text: str) -> Part:
        """Add a piece of the answer's text; return what is certain now."""
        return self._read(self._parser.feed(text)) if text else Part()

    def finish(self) -> Part:
        """End the answer; return what was held back."""
        text, reasoning, calls = self._read(self._parser.end())
        return Part(text + self._content.rest(), reasoning, calls)

    def _read(self, events: Iterable[dict[str, Any]]) -> Part:
        text, reasoning, calls = "", "", list[CallDelta]()
        for event in events:
            kind, name = event["type"], event["field"]
            if name == CALLS:
                found, loose = self._of_call(kind, event)
                calls += found
                text += self._content.push(loose)
                if kind == "region_open":
                    self._content.turn()
            elif name in REASONING:
                if kind == "region_chunk":
                    reasoning += self._reasoning.push(event["text"])
                else:
                    self._content.turn()
                    self._reasoning.turn()
            elif kind == "region_chunk":
                text += self._content.push(event["text"])
        return Part(text, reasoning, calls)

    def _of_call(self, kind: str, event: dict[str, Any]) -> tuple[list[CallDelta], str]:
        """Return the parts of calls in an event, or the text of what is none."""
        if kind == "region_open":
            self._call = _Written(event["keys"], event["name"])
            return self._begun(self._call), ""
        call = self._call
        if call is None:
            return [], ""
        if kind == "region_chunk":
            is_begun = call.is_begun
            call.push(event["text"])
            if is_begun:
                piece = call.take()
                return [CallDelta(self._calls - 1, "", "", piece)] if piece else [], ""
            return self._begun(call), ""
        self._call = None
        if call.is_begun:
            return [], ""
        try:
            found = calls_of(event["value"]) if kind == "region_close" else []
        except (ValueError, RecursionError):
            found = []
        if not found:
            return [], event["raw"]
        return [self._whole(name, arguments) for name, arguments in found], ""

    def _begun(self, call: _Written) -> list[CallDelta]:
        if not call.is_begun:
            return []
        self._calls += 1
        index = self._calls - 1
        return [CallDelta(index, call_id(self._request_id, index), call.name, call.take())]

    def _whole(self, name: str, arguments: dict[str, Any]) -> CallDelta:
        self._calls += 1
        index = self._calls - 1
        text = json.dumps(arguments, ensure_ascii=False)
        return CallDelta(index, call_id(self._request_id, index), name, text)


class _Edges:
    """Leaves out the white space between a text and the regions beside it: it belongs to neither."""

    def __init__(self) -> None:
        self._held = ""
        self._is_first = False  # behind another region

    def push(self, text: str) -> str:
        text = text.lstrip() if self._is_first else text
        if not text:
            return ""
        self._is_first = False
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept

    def turn(self) -> None:
        """Another region is here."""
        self._held, self._is_first = "", True

    def rest(self) -> str:
        return self._held


class _Written:
    """Follows a call while it is written, where its arguments are JSON as they will be sent.

    `keys`: of the JSON object that holds name and arguments; None: the arguments come whole, at the end.
    `name`: where it stands before the region, which then is all arguments.
    """

    def __init__(self, keys: tuple[str, str] | None, name: str) -> None:
        self.name, self.is_begun = "", False
        self._named = name
        self._head = _head(*keys) if keys is not None else _BRACE if name else None
        self._text = ""  # before the arguments
        self._ready = ""
        self._depth, self._in_string, self._is_escaped, self._is_over = 0, False, False, False

    def push(self, text: str) -> None:
        if self.is_begun:
            self._follow(text)
        elif self._head is not None:
            self._text += text
            if (match := self._head.match(self._text)) is not None:
                self.is_begun = True
                self.name = self._named or match["name"]
                self._follow(self._text[match.end() :])
            elif len(self._text) > MOST_READ:
                self._head = None

    def take(self) -> str:
        """Return the arguments that have come since."""
        ready, self._ready = self._ready, ""
        return ready

    def _follow(self, text: str) -> None:
        """Take up the arguments to the brace that closes them."""
        if self._is_over:
            return
        for at, character in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._is_over = True
                    self._ready += text[: at + 1]
                    return
        self._ready += text


_BRACE = re.compile(r"\s*(?=\{)")


@lru_cache(maxsize=16)
def _head(name: str, arguments: str) -> re.Pattern[str]:
    """Match what stands before the arguments where the name comes first, as it nearly always does."""
    name, arguments = re.escape(json.dumps(name)), re.escape(json.dumps(arguments))
    string = r'"(?P<name>[^"\\\x00-\x1f]+)"'
    return re.compile(rf"\s*\{{\s*{name}\s*:\s*{string}\s*,\s*{arguments}\s*:\s*(?=\{{)")


def _keys(template: ResponseTemplate) -> tuple[str, str] | None:
    """Return the keys of name and arguments in a region of calls that is one JSON object."""
    field = template.fields.get(CALLS)
    if field is None or field.content != "json" or field.transform_each:
        return None
    if any(field.content_args.get(name) for name in ("string_delims", "unquoted_keys")):
        return None
    if not isinstance(field.transform, dict):
        return None
    match field.transform.get("function", field.transform):
        case "{content}":
            return "name", "arguments"
        case {"name": str(name), "arguments": str(arguments)}:
            keys = [re.fullmatch(r"\{content\.(\w+)\}", text) for text in (name, arguments)]
            if keys[0] is not None and keys[1] is not None:
                return keys[0][1], keys[1][1]
    return None


_QUOTES = re.compile(r'"|\\.?', re.DOTALL)  # and what is escaped, which is no quote


def _has_json(template: ResponseTemplate) -> bool:
    """True where a region of calls is JSON with strings as JSON has them."""
    field = template.fields.get(CALLS)
    return field is not None and field.content == "json" and not field.content_args.get("string_delims")


def _has_name_before(template: ResponseTemplate) -> bool:
    """True where the name stands before the region, and all of that is arguments."""
    field = template.fields.get(CALLS)
    if field is None or field.content != "json" or not isinstance(field.transform, dict):
        return False
    match field.transform.get("function", field.transform):
        case {"name": "{name}", "arguments": "{content}"}:
            return not any(field.content_args.get(name) for name in ("string_delims", "unquoted_keys"))
    return False


class _Parser(ResponseParser):  # type: ignore[misc]  # transformers has no types
    """Transformers' parser, which goes on behind a region that it cannot read and says what was there."""

    _buffer: str
    _pos: int

    def __init__(self, template: ResponseTemplate, begun: str, tools: list[dict[str, Any]]) -> None:
        self._keys = _keys(template)
        self._has_name_before = _has_name_before(template)
        self._has_json = _has_json(template)
        self._region_start = 0
        self._quoted_to, self._is_quoted = 0, False  # up to where the JSON of a call was read for its strings
        super().__init__(template, begun, tools=tools)

    def feed(self, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = super().feed(text)
        if self._current == self._implicit_name:
            self._body = ""  # it was streamed
            if self._pos > MOST_READ:
                # One character stays: patterns for the answer's beginning match at the buffer's.
                self._buffer, self._pos = self._buffer[self._pos - 1 :], 1
        return events

    def end(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        self._process(events, eos=True)
        return events

    def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:
        super()._open_explicit(events, field, m)
        self._region_start = m.start()
        self._quoted_to, self._is_quoted = m.end(), False
        if field.name == CALLS:
            name = self._captures.get("name", "") if self._has_name_before else ""
            events[-1] |= {"keys": self._keys, "name": name}

    def _scan(self, watch: list[Any], eos: bool) -> Any:
        """What closes a call is text like any other within a string of its JSON."""
        found = super()._scan(watch, eos)
        if self._current != CALLS or not self._has_json:
            return found
        begin = self._pos
        while found[0] is not None and self._is_in_string(found[0][2].start()):
            self._pos = found[0][2].start() + 1
            found = super()._scan(watch, eos)
        self._pos = begin
        return found

    def _is_in_string(self, end: int) -> bool:
        """Each part of the text is read once, however many marks are in it."""
        for found in _QUOTES.finditer(self._buffer, self._quoted_to, end):
            self._is_quoted ^= found[0] == '"'
        self._quoted_to = end
        return self._is_quoted

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        name = self._current
        try:
            super()._close_current(events)
        except MemoryError:
            raise
        except Exception:  # the text is a model's, the schema that it is read by a client's
            events.append({"type": "malformed", "field": name})
            self._reset_to_implicit()
        if name == CALLS and events and events[-1]["type"] in ("region_close", "malformed"):
            events[-1]["raw"] = self._buffer[self._region_start : self._pos]

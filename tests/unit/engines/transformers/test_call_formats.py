"""Every built-in format: what its grammar takes is what its response template reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.engines.transformers.test_call_grammar import NOW, WEATHER, is_taken
from tests.unit.engines.transformers.test_responses import Read, pieces_of
from tidegate.engines.transformers.formats import CallFormat, read_format
from tidegate.replica_args import FORMATS_FOLDER

FORMATS = [name for file in sorted(FORMATS_FOLDER.glob("*.json")) if read_format(name := file.stem).calls]
ARGUMENTS = {"city": 'Köln "am" Rhein, 5', "days": 3, "warm": True}


def written(form: CallFormat, name: str, arguments: dict[str, Any]) -> str:
    """A call as the format has it."""
    filled = form.call.replace("{name}", name)
    if form.arguments == "json":
        return filled.replace("{arguments}", json.dumps(arguments, ensure_ascii=False))
    parameters = []
    for key, value in arguments.items():
        text = json.dumps(value, ensure_ascii=False) if form.arguments == "text" else repr(value)
        if isinstance(value, str):
            text = value if form.arguments == "text" else json.dumps(value, ensure_ascii=False)
        parameters.append(form.parameter.replace("{key}", key).replace("{value}", text))
    return filled.replace("{arguments}", form.comma.join(parameters))


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_model_writes_is_taken_and_read(name: str) -> None:
    form = read_format(name)
    calls = form.calls
    assert calls is not None
    asked = [("weather", ARGUMENTS)]
    if calls.separator is not None:
        asked.append(("now", {}))
    separator = calls.separator or ""
    text = calls.begin + separator.join([written(calls, *each) for each in asked]) + calls.end

    for choice in ("auto", "required") if calls.trigger else ("required",):
        for keeps_tags in (True, False):
            assert is_taken(form, text, WEATHER, NOW, choice=choice, keeps_tags=keeps_tags), choice
    for size in (1, 3, len(text)):
        read = Read(form.response_template, pieces_of(text, size), tools=[WEATHER, NOW])
        assert (read.called(), read.text) == (asked, "")
    assert not is_taken(form, text.replace("weather", "whether"), WEATHER, NOW)

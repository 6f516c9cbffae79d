"""Each schema of JSON-Schema-Test-Suite as `response_format`: the answer is valid, or the refusal names what
cannot be held. An answer that its length cut is the beginning of JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jiter
import jsonschema
import pytest

DRAFTS = {"draft7": jsonschema.Draft7Validator, "draft2020-12": jsonschema.Draft202012Validator}
ANSWER_TOKENS = 32
ANSWER_SECONDS = 20


def schemas() -> Iterator[Any]:
    root = Path(os.environ["CLIENTS_SOURCES"]) / "json" / "tests"
    for draft in DRAFTS:
        for path in sorted((root / draft).rglob("*.json")):
            for number, group in enumerate(json.loads(path.read_text(encoding="utf-8"))):
                where = path.relative_to(root).with_suffix("").as_posix()
                yield pytest.param(draft, group["schema"], id=f"{where}-{number}")


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {os.environ['CLIENTS_KEY']}"}
    with httpx.Client(base_url=os.environ["CLIENTS_URL"], headers=headers, timeout=ANSWER_SECONDS) as client:
        yield client


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize(("draft", "schema"), list(schemas()))
def test_schema(client: httpx.Client, draft: str, schema: Any, strict: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "asked", "schema": schema, "strict": strict}}
    body = {
        "model": os.environ["CLIENTS_MODEL"],
        "messages": [{"role": "user", "content": "An example, please."}],
        "response_format": form,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }
    answer = client.post("/v1/chat/completions", json=body)

    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["param"].startswith("response_format"), error
        assert names_a_place(error["message"], schema), error
        return
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "length":
        jiter.from_json(text.encode(), partial_mode="trailing-strings")
        return
    value = json.loads(text)
    try:
        if DRAFTS[draft](schema).is_valid(value):
            return
    except re.error:
        pytest.skip("jsonschema reads patterns as Python's")
    warning = answer.headers.get("x-tidegate-warning", "")
    assert not strict and names_a_place(warning, schema), f"{text} is not valid; warning: {warning!r}"


def names_a_place(said: str, schema: Any) -> bool:
    """Whether a message names, after the field, a place that is in the schema."""
    if schema is False:
        return "no value is valid" in said
    _, _, after = said.partition(": /")
    steps = after.partition(": ")[0].split("/")
    for step in steps if steps != [""] else []:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        elif isinstance(schema, dict) and name in schema:
            schema = schema[name]
        else:
            return False
    return ": " in after

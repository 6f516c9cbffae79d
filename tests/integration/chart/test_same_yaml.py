"""A file says the same to a laptop as to kubectl, and what is written is read as it was by both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.integration.chart.rendered import Helm
from tidegate.control.bounded_yaml import dump, load_documents

# Text that some reader of YAML takes for something else.
LOOKS = [
    *("7765569043124e57", "1e5", "1E+5", "-1e-05", "1.e3", ".5e3", "1_0e5", "0o17", "-0O17", "0x1F", "0b1"),
    *("12_3", "017", "1:20", "1.5", ".inf", "-.INF", ".nan", "null", "~", "Null", "true", "Yes", "on", "OFF"),
    *("y", "Y", "n", "N", "2024-02-30", "=", "<<", "", "1e", "e5", "0o8", "abc", "1e5x", "+1e5", "+y"),
]


@pytest.mark.parametrize("text", LOOKS)
def test_text_stays_text_to_every_reader(text: str) -> None:
    written = dump({"value": text})
    assert load_documents(written) == [{"value": text}]
    assert yaml.safe_load(written) == {"value": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("+1e5", 1e5),
        (".5e-2", 0.005),
        ("1_0e5", 1e6),
        ("0o17", 15),
        ("-0o17", -15),
    ],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    (read,) = load_documents(text)
    assert read == value
    assert type(read) is type(value)


def test_values_come_back_whole_and_in_order() -> None:
    shared = {"b": 1e-7}
    value = {"z": [shared, shared, 1e22, -3, None, True, "\u00e9 \n"], "a": {}}
    text = dump(value)
    assert load_documents(text) == [value]
    assert list(load_documents(text)[0]) == ["z", "a"]
    assert "&" not in text


def test_helm_reads_the_same(helm: Helm, tmp_path: Path) -> None:
    """Go's own reader, on text and on numbers: a chart that gives its values back as JSON."""
    numbers = ["1e-5", "1E5", "+1e5", ".5e-2", "0o17", "0x1F", "12", "1.5"]
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: a, version: 1.0.0}\n")
    (tmp_path / "templates" / "one.yaml").write_text(
        "text: {{ toJson .Values.text | quote }}\nnumbers: {{ toJson .Values.numbers | quote }}\n"
    )
    written = dump({"text": LOOKS}) + f"numbers: [{', '.join(numbers)}]\n"
    (tmp_path / "values.yaml").write_text(written)
    done = helm.run("template", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    assert json.loads(found["text"]) == LOOKS
    assert json.loads(found["numbers"]) == load_documents(written)[0]["numbers"]

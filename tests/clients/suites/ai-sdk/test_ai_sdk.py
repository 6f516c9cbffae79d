"""What Vercel's ai-sdk made of `programs.mjs`, a test for each program and provider."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROGRAMS_SECONDS = 110
PROVIDERS = pytest.mark.parametrize("provider", ["responses", "chat", "compatible", "anthropic"])
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
ANNA = {"name": "Anna", "age": 31, "city": "Rome"}


@pytest.fixture(scope="session")
def found() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        # Node looks for packages beside the file that asks for them.
        (Path(folder) / "node_modules").symlink_to(os.environ["CLIENTS_NODE_MODULES"])
        programs = Path(folder) / "programs.mjs"
        programs.write_bytes(Path(__file__).with_name("programs.mjs").read_bytes())
        ran = subprocess.run(
            ["node", str(programs)], capture_output=True, text=True, timeout=PROGRAMS_SECONDS
        )
    assert ran.stdout.startswith("{"), ran.stderr
    return dict(json.loads(ran.stdout))


def of(found: dict[str, Any], name: str) -> Any:
    assert "error" not in found[name], found[name]["error"]
    return found[name]


@PROVIDERS
def test_generate_text(found: dict[str, Any], provider: str) -> None:
    answer = of(found, f"generateText-{provider}")

    assert ANSWER in answer["text"]
    assert answer["finishReason"] == "stop"
    assert answer["outputTokens"] > 10


@PROVIDERS
def test_stream_text(found: dict[str, Any], provider: str) -> None:
    answer = of(found, f"streamText-{provider}")

    assert len(answer["parts"]) > 1
    assert ANSWER in "".join(answer["parts"])
    assert answer["finishReason"] == "stop"
    assert answer["outputTokens"] > 10


@PROVIDERS
def test_tools(found: dict[str, Any], provider: str) -> None:
    answer = of(found, f"tools-{provider}")

    assert answer["asked"] == ["Paris"]
    assert answer["steps"] == 2
    assert "18 degrees, sunny" in answer["text"]


@PROVIDERS
def test_tools_streamed(found: dict[str, Any], provider: str) -> None:
    answer = of(found, f"toolsStreamed-{provider}")

    assert answer["asked"] == ["Paris"]
    assert "18 degrees, sunny" in answer["text"]
    assert {"tool-input-start", "tool-input-delta", "tool-call", "tool-result"} <= set(answer["kinds"])
    assert answer["kinds"].count("finish-step") == 2


@PROVIDERS
def test_object(found: dict[str, Any], provider: str) -> None:
    assert of(found, f"object-{provider}")["output"] == ANNA


@PROVIDERS
def test_object_streamed(found: dict[str, Any], provider: str) -> None:
    answer = of(found, f"objectStreamed-{provider}")

    assert answer["parts"] > 1
    assert answer["output"] == ANNA


def test_embed_many(found: dict[str, Any]) -> None:
    answer = of(found, "embedMany")
    sky, heavens, invoices = answer["embeddings"]

    assert len(sky) == 384
    assert dot(sky, heavens) > dot(sky, invoices) + 0.2
    assert answer["tokens"] > 10


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))

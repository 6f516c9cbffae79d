"""Calls made from Open Responses' OpenAPI document: no server errors, and answers in the form it tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 110


def test_calls_made_from_the_document_are_answered_in_its_form(tmp_path: Path) -> None:
    file = Path(os.environ["CLIENTS_SOURCES"]) / "public" / "openapi" / "openapi.json"
    document = without_discriminators(json.loads(file.read_text(encoding="utf-8")))
    body = document["components"]["schemas"]["CreateResponseBody"]
    # Any other model is refused before the rest of the call is looked at.
    body["properties"]["model"] = {"const": os.environ["CLIENTS_MODEL"]}
    body["properties"]["max_output_tokens"] = {"type": "integer", "minimum": 16, "maximum": 24}
    body["required"] = ["model", "max_output_tokens", "input"]
    asked = tmp_path / "openapi.json"
    asked.write_text(json.dumps(document), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("st")), "run", str(asked), "--no-color"]
    command += ["--url", f"{os.environ['CLIENTS_URL']}/v1", "--include-path", "/responses"]
    command += ["--header", f"Authorization: Bearer {os.environ['CLIENTS_KEY']}"]
    command += ["--checks", "not_a_server_error,response_schema_conformance", "--max-examples", "50"]
    command += ["--seed", "1", "--generation-deterministic", "--request-timeout", "20"]
    command += ["--suppress-health-check", "all"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert ran.returncode == 0, ran.stdout


def without_discriminators(found: Any) -> Any:
    """Without a mapping they are names of schemas, which is not what `type` holds here."""
    if isinstance(found, dict):
        kept = {name: inner for name, inner in found.items() if not names_a_property(name, inner)}
        return {name: without_discriminators(inner) for name, inner in kept.items()}
    return [without_discriminators(inner) for inner in found] if isinstance(found, list) else found


def names_a_property(name: str, inner: Any) -> bool:
    return name == "discriminator" and isinstance(inner, dict) and "propertyName" in inner

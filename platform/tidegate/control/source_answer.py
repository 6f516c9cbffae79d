"""The answer of `python -m tidegate.sources resolve`, read as the state of a source. Pure."""

from __future__ import annotations

import json

import msgspec

from tidegate.control.observed import SourceState
from tidegate.sources.facts import Resolved


def read_answer(text: str) -> SourceState | None:
    """Read the one JSON object that the resolving process wrote; None where `text` is not that."""
    try:
        found = json.loads(text)
        if "error" in found:
            error = found["error"]
            return SourceState("failed", reason=str(error["reason"]), message=str(error["message"]))
        answer = msgspec.convert(found, Resolved)
    except (ValueError, KeyError, TypeError):
        return None
    return SourceState(
        "resolved",
        checkpoint=answer.path,
        weights_bytes=answer.weights_bytes,
        quantization=answer.quantization,
        precision=answer.precision,
        shape=answer.shape,
        weights=answer.weights,
        commit=answer.commit,
        digest=answer.digest,
        task=answer.task,
    )

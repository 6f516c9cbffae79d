"""What `python -m tidegate.sources resolve` answers, read as the state of a source. Pure."""

from __future__ import annotations

import json

import msgspec

from tidegate.control.observed import DecoderShape, SourceState


def read_answer(text: str) -> SourceState | None:
    """Read the one JSON object that the resolving process wrote; None where `text` is not that."""
    try:
        found = json.loads(text)
        if "error" in found:
            error = found["error"]
            return SourceState("failed", reason=str(error["reason"]), message=str(error["message"]))
        return SourceState(
            "resolved",
            checkpoint=str(found["path"]),
            weights_bytes=int(found["weights_bytes"]),
            quantization=str(found["quantization"]),
            precision=str(found["precision"]),
            shape=msgspec.convert(found.get("shape") or {}, DecoderShape),
            commit=str(found.get("commit") or ""),
            digest=str(found.get("digest") or ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None

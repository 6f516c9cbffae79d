"""What the fuzz tests of both APIs know of the fuzzer."""

from __future__ import annotations

from typing import Any

from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation


def lacks_key(case: Any) -> bool:
    """Whether a case is wrong for its headers. These tests send the key with each, which may mend it."""
    headers = case.meta.components.get(ParameterLocation.HEADER) if case.meta is not None else None
    return headers is not None and headers.mode is GenerationMode.NEGATIVE

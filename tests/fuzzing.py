"""What the fuzz tests of both APIs know of the fuzzer."""

from __future__ import annotations

from typing import Any

from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import negative_data_rejection


def unfit_checks(case: Any) -> list[Any]:
    """The checks that a case does not fit. One that is wrong for its headers may be right once it is sent
    with the key, as these tests send each."""
    headers = case.meta.components.get(ParameterLocation.HEADER) if case.meta is not None else None
    is_mended = headers is not None and headers.mode is GenerationMode.NEGATIVE
    return [negative_data_rejection] if is_mended else []

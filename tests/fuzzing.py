"""What the fuzz tests of both APIs know of the fuzzer."""

from __future__ import annotations

from typing import Any

from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance


def unfit_checks(case: Any) -> list[Any]:
    """The checks that a case does not fit. One that is wrong for its headers may be right once it is sent
    with the key, as these tests send each."""
    headers = case.meta.components.get(ParameterLocation.HEADER) if case.meta is not None else None
    is_mended = headers is not None and headers.mode is GenerationMode.NEGATIVE
    unfit = [negative_data_rejection] if is_mended else []
    if refers(case.body):
        unfit.append(positive_data_acceptance)
    return unfit


def refers(body: Any) -> bool:
    """True where parts of a chat name or exclude each other, which the document does not say: a result the
    call that it is of, a choice the tools."""
    if not isinstance(body, dict):
        return False
    messages = body.get("messages")
    listed = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    parts = [part for one in listed if isinstance(one.get("content"), list) for part in one["content"]]
    has_results = any(
        one.get("role") in ("tool", "function") or (one.get("tool_calls") and one.get("role") != "assistant")
        for one in listed
    ) or any(isinstance(part, dict) and str(part.get("type")).startswith("tool_") for part in parts)
    has_results = has_results or bool(listed and listed[-1].get("tool_calls"))
    items = body.get("input")
    has_results |= isinstance(items, list) and any(
        isinstance(item, dict) and item.get("type") == "function_call_output" for item in items
    )
    chooses = body.get("tool_choice") not in (None, "none", "auto") or isinstance(
        body.get("function_call"), dict
    )
    return has_results or chooses or bool(body.get("tools") and body.get("functions"))

"""A replica reports of its revision: the proof that it loads, or why a replica failed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from tidegate.engines.base import EngineLoadError, LoadReport
from tidegate.messages.registry import RevisionReport
from tidegate.serving.engine_thread import Crash, describe_crash


def proof(
    model: str, revision: str, loaded: LoadReport, load_seconds: float, notes: Sequence[str], now: float
) -> RevisionReport:
    """Report that the engine loaded and proved itself. `now` is unix seconds."""
    return RevisionReport(
        model=model,
        revision=revision,
        at=now,
        proved=True,
        notes=[*loaded.notes, *notes],
        load_seconds=round(load_seconds, 3),
        weights_bytes=loaded.weights_bytes,
        kv_bytes_per_token=loaded.kv_bytes_per_token,
        slots=loaded.slots,
        context_length=loaded.context_length,
        precision=loaded.precision,
        device=loaded.device,
    )


def not_loaded(model: str, revision: str, failure: EngineLoadError, now: float) -> RevisionReport:
    return RevisionReport(
        model=model, revision=revision, at=now, proved=False, reason=failure.reason, message=failure.message
    )


def ended(served: RevisionReport, crash: Crash, node: str, now: float) -> RevisionReport:
    """Report that a replica which served has failed. `node` is its host's name: in a cluster its pod's. What
    its loading found is kept: it tells this report from one of a load that failed (see `ended_note`)."""
    message = f"{crash.message} It ran on {node}; another replica takes its place."
    return msgspec.structs.replace(
        served, at=now, proved=False, reason=crash.reason, message=message, notes=[]
    )


def ended_note(before: RevisionReport | None) -> list[str]:
    """Say of the replica before that it served and then failed: the next one's proof hides that report."""
    if before is None or before.proved or not before.slots:
        return []
    when = datetime.fromtimestamp(before.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return [f"A replica ended at {when}: {before.reason}: {before.message}"]


def load_failure(error: Exception) -> EngineLoadError:
    """Turn any error of a load into the one that has a reason."""
    if isinstance(error, EngineLoadError):
        return error
    reason = describe_crash(error).reason
    if reason != "OutOfMemory":
        reason = "LoadFailed"
    return EngineLoadError(reason, f"The model did not load: {type(error).__name__}: {error}")

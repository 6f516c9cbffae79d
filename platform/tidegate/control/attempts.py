"""Attempts to bring a revision up: their proofs, their failures, and when the next one may begin. Pure.

A revision that fails before it has ever proved itself leaves Serve at once and is tried again, ever more
rarely. One that has served stays recorded and proved, whatever becomes of it.
"""

from __future__ import annotations

from msgspec.structs import replace

from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.observed import Observation
from tidegate.control.reasons import Reason
from tidegate.control.serve_words import why_given_up

FIRST_RETRY_SECONDS = 60.0
LONGEST_RETRY_SECONDS = 3600.0
FIRST_REBUILD_SECONDS = 5.0  # before an application that has served is put back into Serve


def judged(
    record: ModelRecord, seen: Observation, now: float
) -> tuple[ModelRecord, tuple[tuple[str, str], ...]]:
    """Return the record with the proofs and failures that were seen; and the revisions that failed, each with
    the message for its requests, which go."""
    failed: list[tuple[str, str]] = []
    for revision, kept in record.revisions.items():
        if kept.attempt_at > now:  # the clock was set back: what comes from now on is of this attempt
            kept = replace(kept, attempt_at=now)
        report = seen.reports.get((record.name, revision))
        if report is not None and report.proved and kept.proof != report:
            kept = replace(kept, proof=report, failures=0, retry_at=0.0, reason="")
        if kept.is_proved:
            kept = _without_stuck_application(record.name, kept, seen, now)
        elif kept.attempt_at and (failure := _failure(record.name, kept, seen)) is not None:
            kept = replace(_tried_again(kept, failure, FIRST_RETRY_SECONDS, now), attempt_at=0.0)
            failed.append((revision, f"The model {record.name!r} could not be started: {kept.message}"))
        record = record.with_revision(kept)
    return record, tuple(failed)


def _tried_again(
    kept: RevisionRecord, failure: tuple[str, str], first_pause_seconds: float, now: float
) -> RevisionRecord:
    pause = min(LONGEST_RETRY_SECONDS, first_pause_seconds * 2.0**kept.failures)
    reason, message = failure
    return replace(kept, failures=kept.failures + 1, retry_at=now + pause, reason=reason, message=message)


def _without_stuck_application(
    model: str, kept: RevisionRecord, seen: Observation, now: float
) -> RevisionRecord:
    """Serve gives an application up for good after a few failed starts, also one that has served. Leaving it
    out for a while and adding it again is the only way back; its queue stays meanwhile."""
    failure = _given_up(model, kept, seen)
    if failure is None or now < kept.retry_at:
        return kept
    return _tried_again(kept, failure, FIRST_REBUILD_SECONDS, now)


def _failure(model: str, kept: RevisionRecord, seen: Observation) -> tuple[str, str] | None:
    report = seen.reports.get((model, kept.revision))
    if report is not None and not report.proved and report.at >= kept.attempt_at:
        return report.reason or "LoadFailed", report.message or "The engine gave no reason."
    if (refused := seen.refusal(model, kept.revision)) is not None:
        return Reason.ServeRejected, refused
    return _given_up(model, kept, seen)


def _given_up(model: str, kept: RevisionRecord, seen: Observation) -> tuple[str, str] | None:
    state = seen.application(model, kept.revision)
    if state is None or state.status != "DEPLOY_FAILED":
        return None
    return why_given_up(state, kept.group, seen.workers)

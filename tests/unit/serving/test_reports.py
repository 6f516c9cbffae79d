from __future__ import annotations

import pytest

from tidegate.engines.base import EngineLoadError, LoadReport
from tidegate.messages.registry import RevisionReport
from tidegate.serving.engine_thread import Crash
from tidegate.serving.reports import ended, ended_note, load_failure, not_loaded, proof

LOADED = LoadReport(100, 10, 4, 2048, "bfloat16", "cpu", notes=("a fallback",))
PROOF = proof("m", "r", LOADED, 1.23456, ["more"], now=50.0)


def test_a_proof_carries_what_loading_found() -> None:
    assert (
        RevisionReport(
            model="m",
            revision="r",
            at=50.0,
            proved=True,
            notes=["a fallback", "more"],
            load_seconds=1.235,
            weights_bytes=100,
            kv_bytes_per_token=10,
            slots=4,
            context_length=2048,
            precision="bfloat16",
            device="cpu",
        )
        == PROOF
    )
    assert ended_note(PROOF) == []


def test_a_replica_that_ended_is_told_by_the_next_one() -> None:
    report = ended(PROOF, Crash("EngineHung", "No step."), "host-1", now=0.0)
    told = "No step. It ran on host-1; another replica takes its place."
    assert (report.proved, report.reason, report.message, report.slots) == (False, "EngineHung", told, 4)
    assert ended_note(report) == [f"A replica ended at 1970-01-01 00:00:00 UTC: EngineHung: {told}"]


def test_a_load_that_failed_is_over_with_the_next_that_succeeds() -> None:
    report = not_loaded("m", "r", EngineLoadError("WeightsMissing", "none"), now=1.0)
    assert (report.proved, report.reason, report.message) == (False, "WeightsMissing", "none")
    assert ended_note(report) == []
    assert ended_note(None) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineLoadError("TokenizerMissing", "none"), "TokenizerMissing"),
        (MemoryError(), "OutOfMemory"),
        (OSError("disk"), "LoadFailed"),
    ],
)
def test_every_error_of_a_load_has_a_reason(error: Exception, reason: str) -> None:
    assert load_failure(error).reason == reason

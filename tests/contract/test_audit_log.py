"""What every audit log promises: the laptop's file and the cluster's stream in a real Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.control_api.ports import AuditLog
from tidegate.local import audit_file
from tidegate.local.audit_file import AuditFile
from tidegate.messages.administration import AuditEntry
from tidegate.store import audit
from tidegate.store.audit import AuditStream
from tidegate.store.connection import Connection


@pytest.fixture(params=["file", "stream"])
def log(request: pytest.FixtureRequest, tmp_path: Path, connection: Connection, key_prefix: str) -> AuditLog:
    if request.param == "file":
        return AuditFile(tmp_path / "audit.jsonl")
    return AuditStream(connection, key_prefix=key_prefix)


def an_entry(number: int, after: object = None) -> AuditEntry:
    return AuditEntry(float(number), "anna", "scale", f"model-{number}", {"a": 1}, after, "key_1")


async def test_entries_come_back_newest_first_in_pages(log: AuditLog) -> None:
    for number in range(7):
        await log.append(an_entry(number))
    seen, before = [], ""
    while page := await log.page(before, 3):
        seen += [entry.model for entry in page]
        before = page[-1].id
    assert seen == [f"model-{number}" for number in reversed(range(7))]


async def test_an_entry_keeps_all_of_it(log: AuditLog) -> None:
    await log.append(an_entry(1, {"scaling": {"maxReplicas": 2}}))
    (entry,) = await log.page("", 10)
    assert (entry.who, entry.key, entry.what, entry.model) == ("anna", "key_1", "scale", "model-1")
    assert (entry.at, entry.before, entry.after) == (1.0, {"a": 1}, {"scaling": {"maxReplicas": 2}})


async def test_a_page_does_not_move_when_entries_come(log: AuditLog) -> None:
    for number in range(4):
        await log.append(an_entry(number))
    first = await log.page("", 2)
    await log.append(an_entry(4))
    assert [entry.model for entry in await log.page(first[-1].id, 2)] == ["model-1", "model-0"]


async def test_the_oldest_entries_go(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MOST_ENTRIES", 100)
    monkeypatch.setattr(audit_file, "MOST_BYTES", 10_000)
    for number in range(600):
        await log.append(an_entry(number))
    kept = await log.page("", 1000)
    assert kept[0].model == "model-599"
    assert [entry.model for entry in kept] == [f"model-{599 - number}" for number in range(len(kept))]
    assert 50 < len(kept) < 400


async def test_the_file_goes_on_after_a_crash_and_a_clock_that_went_back(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    await AuditFile(path, now=lambda: 2000.0).append(an_entry(1))
    with path.open("ab") as file:
        file.write(b'{"at": 1, "who": "an')  # cut off
    again = AuditFile(path, now=lambda: 1000.0)
    await again.append(an_entry(2))
    await again.append(an_entry(3))
    assert [entry.model for entry in await again.page("", 10)] == ["model-3", "model-2", "model-1"]
    assert path.stat().st_mode & 0o777 == 0o600

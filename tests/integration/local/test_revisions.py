"""Revisions on a whole platform: changed weights are seen, and an undo asks for the old ones first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.local.conftest import Platform
from tests.unit.sources.builders import write
from tests.waiting import await_until
from tidegate.control.desired import ModelRecord
from tidegate.local.record_file import RecordFile

pytestmark = [pytest.mark.serial, pytest.mark.timeout(240)]


async def act(platform: Platform, name: str, **body: Any) -> None:
    """Ask something of the model's rollouts, as the command does."""
    running = platform.running
    headers = {"authorization": f"Bearer {running.control_key}"}
    async with httpx.AsyncClient(base_url=running.control_url, headers=headers, timeout=60.0) as client:
        (await client.post(f"/v1/models/{name}/rollout", json=body)).raise_for_status()


async def history(platform: Platform, name: str) -> list[dict[str, Any]]:
    running = platform.running
    headers = {"authorization": f"Bearer {running.control_key}"}
    async with httpx.AsyncClient(base_url=running.control_url, headers=headers, timeout=60.0) as client:
        found: list[dict[str, Any]] = (await client.get(f"/v1/models/{name}/revisions")).json()["items"]
    return found


async def serving(platform: Platform, name: str, *, other_than: str = "") -> str:
    """Return the revision that takes all requests and answers them."""
    entry = await platform.until(
        name,
        lambda entry: entry.ready and entry.replicas_ready and set(entry.revisions) - {other_than},
        timeout=90.0,
    )
    (revision,) = entry.revisions
    assert (await platform.ask(name)).status_code == 200
    return revision


async def test_changed_weights_are_another_revision_and_undo_asks_for_the_old_ones(
    steady: Platform, tmp_path: Path
) -> None:
    folder = write(tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    first_bytes = weights.read_bytes()
    steady.define("content", source={"uri": str(folder)})
    first = await serving(steady, "content")
    weights.write_bytes(first_bytes[:-1] + bytes([first_bytes[-1] ^ 1]))
    await act(steady, "content", verb="recheck")
    second = await serving(steady, "content", other_than=first)
    kept = await history(steady, "content")
    shown = [(item["number"], item["revision"], item["cause"], item["author"]) for item in kept]
    assert shown == [(2, second, "source content changed", "host"), (1, first, "created", "")]

    def record() -> ModelRecord:
        return RecordFile(steady.home.records).read()["content"]

    await await_until(lambda: list(record().revisions) == [second], timeout=60.0)  # the first has drained
    await act(steady, "content", verb="undo", revision=first)

    def refusal() -> str:
        look = record().look
        return look.message if look is not None and look.goal is not None and look.ended else ""

    assert "no longer holds what the revision was made from" in await await_until(refusal, timeout=60.0)
    assert (await steady.entries())["content"].revisions == {second: 100}

    weights.write_bytes(first_bytes)
    await act(steady, "content", verb="undo", revision=first)
    assert await serving(steady, "content", other_than=second) == first
    assert [item["number"] for item in await history(steady, "content")] == [2, 1]


async def test_a_replica_that_starts_later_serves_no_other_bytes_under_the_old_name(
    steady: Platform, tmp_path: Path
) -> None:
    """Nobody has asked for a look: the replica finds it out."""
    folder = write(tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    steady.define("later", source={"uri": str(folder)})
    first = await serving(steady, "later")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    await act(steady, "later", verb="restart")
    await serving(steady, "later", other_than=first)
    assert [item["cause"] for item in await history(steady, "later")] == ["source content changed", "created"]

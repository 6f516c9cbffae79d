"""Weights that stay in memory: real replicas, real holders, a real registry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from tests.checkpoints import tiny
from tests.integration.serving.rig import MODEL, REVISION, ReplicaChild, a_request, open_ear, replica_args
from tests.processes import runs
from tests.waiting import await_until
from tidegate.messages.registry import ModelEntry, Parked
from tidegate.replica_args import PARKED_VARIABLE, ReplicaArgs, parse_args
from tidegate.serving import parking
from tidegate.sources.checkpoint import read_checkpoint
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

WAIT_SECONDS = 120.0  # for what imports torch, beside other work
KEY = (MODEL, REVISION)
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holders and replicas of a test have a machine of their own, as far as folders go."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny(tmp_path / "llama", "llama")


@pytest.fixture
def engine(checkpoint: Path) -> dict[str, Any]:
    return {
        "name": "transformers",
        "path": str(checkpoint),
        "precision": "float32",
        "max_slots": 4,
        "args": {"threads": 1},
    }


@pytest.fixture
def args(redis_url: str, key_prefix: str, engine: dict[str, Any]) -> ReplicaArgs:
    return parse_args(replica_args(redis_url, key_prefix, engine=engine))


@pytest.fixture
def node() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
async def registry(redis_url: str, key_prefix: str) -> AsyncIterator[Registry]:
    async with Connection(redis_url) as connection:
        found = Registry(connection, key_prefix=key_prefix)
        await found.put_model(entry(REVISION))
        yield found


@pytest.fixture
def holder(args: ReplicaArgs) -> Iterator[Callable[..., None]]:
    """Start a holder whose replica is gone, beside a node that is this process or another one."""

    def start(node: int = os.getpid(), replica: ReplicaArgs = args) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        told = msgspec.json.encode(parking.HolderArgs(replica, gone.pid, node)).decode()
        subprocess.run([sys.executable, "-m", parking.HOLDER, told], check=True)

    yield start
    for process in psutil.process_iter(["cmdline"]):
        if parking.HOLDER in (process.info["cmdline"] or []) and args.key_prefix in str(process.info):
            process.kill()


def entry(*parks: str) -> ModelEntry:
    return ModelEntry(
        MODEL, 0, "generate", "transformers", "", "", {REVISION: 100}, True, True, "", "", parks=list(parks)
    )


async def held(registry: Registry) -> Parked:
    async def look() -> Parked | None:
        return (await registry.parked([KEY])).get(KEY)

    found = await await_until(look, WAIT_SECONDS)
    assert found is not None
    return found


async def ended(pid: int) -> None:
    await await_until(lambda: not runs(pid), WAIT_SECONDS)


def spoil(file: Path) -> None:
    """Write other weights in the place of these, which nobody can tell by inode, size or time."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(before.st_size // 2)
        opened.write(bytes(before.st_size - before.st_size // 2))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_the_next_replica_loads_what_the_last_one_left_in_memory(
    redis_url: str, key_prefix: str, engine: dict[str, Any], checkpoint: Path, registry: Registry
) -> None:
    said: list[str] = []
    async with open_ear(redis_url, key_prefix) as ear:
        holders = set()
        for _ in range(3):
            child = ReplicaChild(redis_url, key_prefix, engine=engine)
            try:
                asked = a_request("The tide", max_tokens=24)
                await ear.submit(asked)
                await ear.ended(asked, timeout=WAIT_SECONDS)
                said.append(await ear.text(asked.id))
                child.send(signal.SIGTERM)
                assert child.process.wait(WAIT_SECONDS) == 0
            finally:
                child.close()
            found = await held(registry)
            assert found.bytes >= (checkpoint / WEIGHTS).stat().st_size
            holders.add(found.pid)
            spoil(checkpoint / WEIGHTS)
    assert said[0] == said[1] == said[2]
    (pid,) = holders
    await registry.put_model(entry())
    await ended(pid)
    assert await registry.parked([KEY]) == {}
    assert [each.name for each in parking.root().iterdir()] == [parking.ADMISSION]


async def test_a_borrower_reads_them_also_when_the_holder_has_gone(
    args: ReplicaArgs, registry: Registry, holder: Callable[..., None], checkpoint: Path
) -> None:
    holder()
    found = await held(registry)
    borrowed = parking.borrow(args)
    assert borrowed is not None
    os.kill(found.pid, signal.SIGKILL)
    await ended(found.pid)
    assert read_checkpoint(borrowed.path).loaded == read_checkpoint(checkpoint).loaded
    assert read_checkpoint(borrowed.path).tensor_names == read_checkpoint(checkpoint).tensor_names
    assert (borrowed.path / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    with pytest.raises(PermissionError):  # sealed: nobody can write other weights there
        (borrowed.path / WEIGHTS).write_bytes(b"other")
    path = borrowed.path
    borrowed.close()
    assert not path.exists()
    assert parking.borrow(args) is None
    holder()  # in the place that the killed one left
    again = await await_until(lambda: parking.borrow(args), WAIT_SECONDS)
    assert again is not None
    again.close()


async def test_other_files_are_not_what_is_held(
    args: ReplicaArgs, registry: Registry, holder: Callable[..., None], checkpoint: Path
) -> None:
    holder()
    found = await held(registry)
    os.utime(checkpoint / "config.json")
    assert parking.borrow(args) is None
    await ended(found.pid)


async def test_what_the_revision_was_not_made_from_is_not_held(
    args: ReplicaArgs, registry: Registry, holder: Callable[..., None]
) -> None:
    holder(replica=msgspec.structs.replace(args, digest="other"))
    found = await held(registry)
    assert (found.bytes, "was made from" in found.message) == (0, True)


async def test_what_finds_no_room_is_refused_with_the_numbers(
    args: ReplicaArgs, registry: Registry, holder: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PARKED_VARIABLE, "1000")
    holder()
    found = await held(registry)
    assert found.bytes == 0
    assert "raise TIDEGATE_PARKED_BYTES" in found.message
    assert parking.borrow(args) is None


async def test_a_holder_ends_with_its_node_and_when_another_has_taken_over(
    registry: Registry, holder: Callable[..., None], node: subprocess.Popen[bytes]
) -> None:
    holder(node.pid)
    first = await held(registry)
    node.kill()
    node.wait()
    await ended(first.pid)
    assert await registry.parked([KEY]) == {}
    holder()
    second = await held(registry)
    await registry.park(msgspec.structs.replace(second, node="another"))
    await ended(second.pid)
    assert (await held(registry)).node == "another"

"""Holds the weights of one revision that sleeps: `python -m tidegate.serving.parking_holder ARGS`.

It waits until the replica that started it is gone, so that it counts the memory as it will be; copies, and
then looks every two seconds whether somebody still wants them. It ends when its model no longer parks that
revision, when its files are others, when another holder has them, when Ray's process of this node ends, or on
SIGTERM. While Redis does not answer nothing is known, so it stays.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from tidegate.engines.transformers.memory import GIB, free_host_bytes, gib, total_host_bytes
from tidegate.errors import QueueUnavailable, SourceError
from tidegate.messages.registry import Parked
from tidegate.replica_args import PARKED_VARIABLE, ReplicaArgs, find_redis_url
from tidegate.serving.parking import (
    ADMISSION,
    BYTES,
    LOCK,
    MANIFEST,
    HeldFile,
    HolderArgs,
    Manifest,
    identity,
    is_held,
    locked,
    place_of,
    root,
)
from tidegate.sources.checkpoint import Checkpoint, read_checkpoint
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry

log = logging.getLogger("tidegate.serving.parking")

LOOK_SECONDS = 2.0
REDIS_SECONDS = 10.0  # between two looks whether to stay, while it is away
LEAVING_SECONDS = 60.0  # that the replica may take to end
SPARED_BYTES = GIB  # of free memory that parked weights leave alone
SHARE = 2  # parked weights may take one of so many parts of the memory, where no setting says otherwise
COPY_BYTES = 1 << 26
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class NotParked(Exception):
    """Says in a sentence why nothing is held."""


class HeldAlready(Exception):
    """Another process of this node holds the same."""


def main() -> int:
    if os.fork():  # so that Ray, which ends a worker's children, does not know this process
        return 0
    args = msgspec.json.decode(sys.argv[1], type=HolderArgs)
    from tidegate.serving.process import configure_logs

    configure_logs(args.replica)
    return asyncio.run(run(args))


async def _open(connection: Connection, ended: asyncio.Event) -> None:
    """Connect, however long Redis is away. Raises `ProcessLookupError` where it is not to stay meanwhile."""
    while not ended.is_set():
        with suppress(QueueUnavailable):
            return await connection.open(within_seconds=REDIS_SECONDS)
    raise ProcessLookupError


async def run(args: HolderArgs) -> int:
    """Hold until nobody wants it. Returns the exit status."""
    replica, ended = args.replica, asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    with suppress(ProcessLookupError), _watched(args.leaving) as gone, suppress(TimeoutError):
        await asyncio.wait_for(gone.wait(), LEAVING_SECONDS)
    connection = Connection(partial(find_redis_url, replica.redis_url), name="tidegate-parked")
    registry = Registry(connection, key_prefix=replica.key_prefix, times=replica.times)
    said = Parked(replica.model, replica.revision, socket.gethostname(), os.getpid(), 0)
    try:
        with _watched(args.node, ended.set), _place(replica) as place:
            await _open(connection, ended)
            files = await asyncio.to_thread(hold, replica, place)
            said = msgspec.structs.replace(said, bytes=sum(each.held[2] for each in files))
            log.info("weights of %s are parked: %s", replica.model, gib(said.bytes))
            await _stay(registry, said, partial(are_same, Path(replica.engine.path), files), ended)
            log.info("weights of %s are parked no more", replica.model)
    except (ProcessLookupError, HeldAlready):
        return 0  # the node's Ray is gone, or there is nothing to do
    except (NotParked, OSError, SourceError) as error:
        message = error.message if isinstance(error, SourceError) else str(error)
        log.warning("weights of %s are not parked: %s", replica.model, message)
        with suppress(QueueUnavailable):
            await connection.open()
            await registry.park(msgspec.structs.replace(said, bytes=0, message=message))
    finally:
        await connection.close()
    return 0


def hold(args: ReplicaArgs, place: Path) -> list[HeldFile]:
    """Copy the revision's files into memory and tell of it in `place`. The descriptors are this process's as
    long as it lives. Raises `NotParked`, `OSError`, `SourceError`."""
    folder = Path(args.engine.path)
    before = read_checkpoint(folder)
    files = [_copied(before, name) for name in before.loaded]
    if not are_same(folder, files):
        raise NotParked(f"{folder} changed while it was copied.")
    if args.digest and before.digest(args.commit) != args.digest:
        raise NotParked(f"{folder} no longer holds what the revision was made from.")
    text = json.dumps(msgspec.to_builtins(Manifest(os.getpid(), args.digest, files)))
    (place / f"{MANIFEST}.part").write_text(text)
    (place / f"{MANIFEST}.part").rename(place / MANIFEST)
    return files


def are_same(folder: Path, files: Iterable[HeldFile]) -> bool:
    """Whether the files are still those that were copied."""
    try:
        return all(identity((folder / each.name).stat()) == each.source for each in files)
    except OSError:
        return False


def _copied(checkpoint: Checkpoint, name: str) -> HeldFile:
    with (checkpoint.path / name).open("rb") as file:
        source = os.fstat(file.fileno())
        held = os.memfd_create(f"tidegate {name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        while os.sendfile(held, file.fileno(), None, COPY_BYTES):
            pass
    fcntl.fcntl(held, fcntl.F_ADD_SEALS, SEALS)
    return HeldFile(name, held, identity(os.fstat(held)), identity(source), name in checkpoint.weight_files)


@contextmanager
def _place(args: ReplicaArgs) -> Iterator[Path]:
    """Take the revision's place on this node, with its lock. Raises `NotParked` where there is no room."""
    if not hasattr(os, "memfd_create"):
        raise NotParked("Only Linux can keep them in memory so.")
    place = place_of(args)
    with ExitStack() as stack:
        with locked(root() / ADMISSION, makes=True):
            if is_held(place):
                raise HeldAlready
            shutil.rmtree(place, ignore_errors=True)
            checkpoint = read_checkpoint(Path(args.engine.path))
            size = sum(checkpoint.files[name] for name in checkpoint.loaded)
            check_room(size, _others(), free_host_bytes(), bound_bytes())
            place.mkdir(mode=0o700)
            (place / BYTES).write_text(str(size))
            stack.enter_context(locked(place / LOCK, makes=True))
            stack.callback(shutil.rmtree, place, ignore_errors=True)
        yield place


def check_room(size: int, others: int, free: int, bound: int) -> None:
    """Raise `NotParked` where `size` bytes find no room beside `others` that are parked. Pure."""
    if others + size > bound:
        raise NotParked(
            f"They take {gib(size)}, and of the {gib(bound)} that parked weights may take on this node "
            f"{gib(others)} are taken; raise TIDEGATE_PARKED_BYTES, or park fewer models."
        )
    if size + SPARED_BYTES > free:
        raise NotParked(
            f"They take {gib(size)}, and {gib(free)} of memory are free on this node, of which "
            f"{gib(SPARED_BYTES)} stay so."
        )


def bound_bytes() -> int:
    """What all parked weights of this node may take."""
    return int(os.environ.get(PARKED_VARIABLE) or 0) or total_host_bytes() // SHARE


def _others() -> int:
    """What other holders of this node have, or are about to."""
    places = (lock.parent for lock in root().glob(f"*/{LOCK}"))
    return sum(int((place / BYTES).read_text()) for place in places if is_held(place))


async def _stay(
    registry: Registry, said: Parked, are_wanted: Callable[[], bool], ended: asyncio.Event
) -> None:
    """Tell of what is held until it is of no use. `are_wanted` says whether the files are still the same."""
    key, is_told = (said.model, said.revision), False
    while not ended.is_set() and await asyncio.to_thread(are_wanted):
        with suppress(QueueUnavailable):
            entry = (await registry.read_models([said.model])).get(said.model)
            if entry is None or said.revision not in entry.parks:
                break
            other = (await registry.parked([key])).get(key)
            if is_told and other is not None and (other.node, other.pid) != (said.node, said.pid):
                return
            await registry.park(said)
            is_told = True
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), LOOK_SECONDS)
    with suppress(QueueUnavailable):
        await registry.unpark(*key)


@contextmanager
def _watched(pid: int, ended: Callable[[], None] | None = None) -> Iterator[asyncio.Event]:
    """Set the event, and call `ended`, when another process ends. Raises `ProcessLookupError` where it has
    already."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.pidfd_open(pid)

    def tell() -> None:
        loop.remove_reader(descriptor)
        gone.set()
        if ended is not None:
            ended()

    loop.add_reader(descriptor, tell)
    try:
        yield gone
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    raise SystemExit(main())

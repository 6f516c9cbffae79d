"""Keeps one process of each node ready to become a replica: Ray's worker, with everything imported.

A process that Ray starts for a replica spends its first seconds on imports. Ray gives a worker that waits to
the next actor, and starts no other in its place. So the next one is ordered: by a replica soon after it
serves, and by Serve's controller, which looks now and then, where the spare was lost otherwise.

    replica serves ──order──> marker, Ray starts a worker ──become──> takes marker and lock, imports
                                                                            │ waits for an actor
    next replica <── Ray gives it the worker that waits <───────────────────┘ leaves the lock, orders the next

What always holds.
- At most one spare waits on a node: it holds the lock, which ends with its process. Nobody orders while it is
  held, or while a worker that was ordered may still be on its way (the marker).
- A worker that nobody ordered (Serve's controller is one) imports nothing ahead of need.
- Without a spare a replica starts as it would without this module, only later.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tidegate.engines.create import begin_ahead
from tidegate.replica_args import PRELOAD_MODULE, PRELOAD_VARIABLE

log = logging.getLogger(__name__)

KEEP_SECONDS = 365 * 86_400  # that Ray lets a spare wait
CALL_SECONDS = 10.0  # of an order
COMING_SECONDS = 120.0  # after which a worker that was ordered comes no more
LOOK_SECONDS = 30.0  # between looks of the controller
LOCK_TRIES, LOCK_PAUSE_SECONDS = 50, 0.01  # while others look whether it is held
LOCK, MARKER = "tidegate-spare", "tidegate-spare-ordered"
MODULES = ("ray.serve._private.replica", "tidegate.serving.app")

_held: list[IO[bytes]] = []  # the lock, of the process that is the spare
_next_look: float | None = None  # of `keep`, monotonic seconds


def become() -> None:
    """Called in each worker before its first task: import what a replica needs where a spare was ordered."""
    folder = _folder()
    try:
        (folder / MARKER).unlink()
    except OSError:
        return
    for _ in range(LOCK_TRIES):
        if _lock(folder):
            break
        time.sleep(LOCK_PAUSE_SECONDS)
    else:
        return
    _import_all()


def leave() -> bool:
    """Called by who may have been the spare: it is something else now. Returns whether it was."""
    was = bool(_held)
    while _held:
        _held.pop().close()
    return was


def order() -> None:
    """Let the node's raylet start a spare where none waits. Blocks; never raises: it is a matter of speed."""
    if not is_kept():
        return
    try:
        folder = _folder()
        if not _lock(folder):
            return
        leave()
        if _mark(folder / MARKER):
            _start_worker()
    except Exception as error:
        log.warning("no spare process could be ordered: %r", error)


def keep() -> None:
    """Called often, by an event loop that may not wait: order where the spare is gone, every `LOOK_SECONDS`
    and not before, for then a platform starts."""
    global _next_look
    now = time.monotonic()
    if _next_look is not None and now >= _next_look:
        threading.Thread(target=order, name="spare", daemon=True).start()
    if _next_look is None or now >= _next_look:
        _next_look = now + LOOK_SECONDS


def is_kept() -> bool:
    """Whether this node's workers look for an order."""
    return PRELOAD_MODULE in os.environ.get(PRELOAD_VARIABLE, "").split(",")


def _import_all() -> None:
    """Import beside a replica that serves, so that whoever wakes for a moment goes first. No lower priority
    than that: a replica may be given this process before it is ready."""
    with _batch():
        for name in MODULES:
            importlib.import_module(name)
        begin_ahead()
        gc.collect()
        gc.freeze()  # so that the replica's own collection has little to look at


@contextmanager
def _batch() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _folder() -> Path:
    """The folder of this node's Ray."""
    return Path(_node().get_session_dir_path())


def _node() -> Any:
    from ray._private import worker

    return worker.global_worker.node


def _lock(folder: Path) -> bool:
    """Take the spare's lock, until `leave`. False where another process has it."""
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _held.append(file)
    return True


def _mark(marker: Path) -> bool:
    """Leave the marker for the worker that is ordered. False where one that was ordered may still come."""
    with suppress(OSError):
        if time.time() - marker.stat().st_mtime > COMING_SECONDS:
            marker.unlink()
    try:
        marker.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    return True


def _start_worker() -> None:
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    node = _node()
    channel = init_grpc_channel(f"{node.node_ip_address}:{node.node_manager_port}")
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(
            node_manager_pb2.PrestartWorkersRequest(
                language=common_pb2.Language.PYTHON,
                job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
                keep_alive_duration_secs=KEEP_SECONDS,
                num_workers=1,
            ),
            timeout=CALL_SECONDS,
        )
    finally:
        channel.close()

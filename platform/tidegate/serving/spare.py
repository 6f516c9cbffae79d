"""Keeps one process of each node ready to become a replica: Ray's worker, with everything imported.

A process that Ray starts for a replica spends its first seconds on imports. Ray hands a waiting worker to the
next actor of its job and starts no other in its place, so whoever used the spare orders the next one: a
replica when it serves, and the task that builds an application, which Ray runs in whatever worker waits.

    replica serves ──order──> marker, Ray starts a worker ──preload──> takes marker and lock, imports
                                                                            │ waits for an actor
    next replica <── Ray gives it the worker that waits <───────────────────┘ lets go of the lock, orders

What always holds.
- At most one spare waits on a node: it holds the lock, which ends with its process. Nobody orders while it
  is held. Two who order at once get two workers, of which one finds no marker and stays as small as it is.
- A worker that nobody ordered (Serve's controller is one) imports nothing ahead of need.
- Without a spare a replica starts as it would without this module, only later.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tidegate.replica_args import PRELOAD_MODULE, PRELOAD_VARIABLE

log = logging.getLogger(__name__)

KEEP_SECONDS = 365 * 86_400  # that Ray lets a spare wait
ORDER_SECONDS = 10.0
IMPORT_NICENESS = 10  # of the thread that imports: the replica that ordered serves beside it
HEAVY = (
    "ray.serve._private.replica",
    "tidegate.serving.app",
    "tidegate.engines.transformers.engine",
    "tidegate.engines.transformers.encoder",
)

_held: list[IO[bytes]] = []  # the lock, of the process that is the spare


def become() -> None:
    """Called in each worker before its first task: import what a replica needs where a spare was ordered."""
    folder = _folder()
    if folder is None:
        return
    try:
        _marker(folder).unlink()
    except OSError:
        return
    if not _lock(folder):
        return
    thread = threading.Thread(target=_import_all, name="preload")
    thread.start()
    thread.join()


def order() -> None:
    """Let the node's raylet start a spare where none waits. Blocks; never raises: it is a matter of speed."""
    try:
        folder = _folder()
        if folder is None or not is_kept() or not _lock(folder):
            return
        leave()
        _marker(folder).touch(mode=0o600)
        _start_worker()
    except Exception as error:
        log.warning("no spare process could be ordered: %r", error)


def leave() -> bool:
    """Called by who may have been the spare: it is something else now. Returns whether it was."""
    was = bool(_held)
    while _held:
        _held.pop().close()
    return was


def is_kept() -> bool:
    """Whether this node's workers look for an order."""
    return PRELOAD_MODULE in os.environ.get(PRELOAD_VARIABLE, "").split(",")


def _import_all() -> None:
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), IMPORT_NICENESS)
    from tidegate.engines.create import sleep_while_waiting

    sleep_while_waiting()
    with suppress(ImportError):  # an extra that is not installed
        for name in HEAVY:
            importlib.import_module(name)
        from tidegate.engines.transformers.prompt_pool import start_ahead

        start_ahead()
    gc.collect()
    gc.freeze()  # so that the replica's own collection has little to look at


def _folder() -> Path | None:
    """The folder of this node's Ray, which is its user's alone."""
    node = _node()
    return None if node is None else Path(node.get_session_dir_path())


def _node() -> Any:
    from ray._private import worker

    return worker.global_worker.node


def _marker(folder: Path) -> Path:
    return folder / "tidegate-spare-ordered"


def _lock(folder: Path) -> bool:
    """Take the spare's lock, until `leave`. False where another process has it."""
    file = (folder / "tidegate-spare").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    _held.append(file)
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
            timeout=ORDER_SECONDS,
        )
    finally:
        channel.close()

"""The work of the commands `up`, `down`, `status` and `clean`. `serve` is in `host`."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil

from tidegate import demo
from tidegate.control.resource_files import load_resources
from tidegate.errors import ConfigError, QueueUnavailable, TidegateError
from tidegate.local import processes
from tidegate.local.gateway import check_port
from tidegate.local.home import Home, Problem, ProcessRecord, Running, read_record, write_atomically
from tidegate.local.host import model_state
from tidegate.local.keeping import leave_nothing, only_one
from tidegate.local.progress import OnProgress, Progress, ProgressFile, quiet
from tidegate.messages.queue import QueueHealth
from tidegate.messages.registry import ModelEntry
from tidegate.settings import PREFIX, Settings
from tidegate.store.connection import Connection
from tidegate.store.health import HealthWatch
from tidegate.store.registry import Registry

POLL_SECONDS = 0.1
STOP_SECONDS = 40.0
LOG_LINES = 15
JUDGING = frozenset({"embed", "score", "classify"})


class HostFailed(TidegateError):
    """The host ended while `up` waited for it."""

    reason = "HostFailed"


class Part(msgspec.Struct, frozen=True):
    """A process of the platform. `memory_bytes` is its resident memory."""

    name: str
    pid: int
    is_alive: bool
    memory_bytes: int


class Snapshot(msgspec.Struct, frozen=True):
    """The state that `tidegate status` shows. `running` None: nothing runs; `leftovers` are then processes
    that a killed host left (`down` ends them)."""

    running: Running | None
    parts: list[Part] = []
    models: list[ModelEntry] = []
    problems: list[Problem] = []
    queue: list[str] = []  # what is wrong with it
    leftovers: int = 0


class Started(msgspec.Struct, frozen=True):
    """The platform that `up` found or made. `was_running`: nothing was done."""

    running: Running
    model: ModelEntry | None
    was_running: bool


def default_paths(home: Home) -> list[Path]:
    """The demo's files: this package's, and one in `home` where another package brings the embedding model.
    That is last: models are built in this order. Raises `ConfigError` as `Home.check` does."""
    other = demo.embedding_model()
    if other is None:
        return [demo.resource_file()]
    home.make()
    if not home.demo.is_file() or home.demo.read_text(encoding="utf-8") != other:
        write_atomically(home.demo, other.encode())
    return [demo.resource_file(), home.demo]


async def up(settings: Settings, paths: Sequence[Path] = (), on_progress: OnProgress = quiet) -> Started:
    """Start the platform in the background and wait until the gateway answers and the first model is ready,
    or has failed (see `Started.model`). Raises `ConfigError` where a file or setting is wrong, or where it
    runs with other files, and `HostFailed`."""
    home = Home(settings.home)
    chosen = [Path(path) for path in paths] or default_paths(home)
    running = read_record(home)
    child: asyncio.subprocess.Process | None = None
    if running is not None:
        _same_files(running, chosen)
    else:
        load_resources(chosen)
        home.make()
        await asyncio.to_thread(_end_orphans, home)
        check_port(settings)
        child = await _detach(settings, home, chosen)
    try:
        ready = await _until_ready(home, child, on_progress if child is not None else quiet)
    except asyncio.CancelledError:
        if child is not None:
            await asyncio.shield(asyncio.to_thread(_down, settings, quiet))
        raise
    return Started(ready[0], ready[1], was_running=running is not None)


async def down(settings: Settings, on_progress: OnProgress = quiet) -> bool:
    """Stop the platform; whether anything ran. Leaves no process and no temporary file, also where the host
    was killed. Keys, caches and queue data stay."""
    return await asyncio.to_thread(_down, settings, on_progress)


async def clean(settings: Settings, on_progress: OnProgress = quiet) -> None:
    """Stop, and remove keys, logs, queue data and what was remembered. Raises `ConfigError`, and touches
    nothing, where the home's marker does not say that they are Tidegate's."""
    home = Home(settings.home)
    home.check()
    await down(settings, on_progress)
    if not home.is_ours:
        return
    for path in (home.run, home.data, home.logs):
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
    home.key.unlink(missing_ok=True)
    home.marker.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies in it: that stays
        home.root.rmdir()


async def status(settings: Settings) -> Snapshot:
    """Return what runs, from the host's record, the processes and the registry."""
    home = Home(settings.home)
    running = read_record(home)
    if running is None:
        left = await asyncio.to_thread(processes.of_instance, home.instance)
        return Snapshot(None, leftovers=len(left))
    parts = [_part(record) for record in (running.host, *running.processes)]
    models: list[ModelEntry] = []
    try:
        async with Connection(running.redis_url, name="tidegate-status") as connection:
            found = await Registry(connection, key_prefix=running.key_prefix).read_models()
            models = sorted(found.values(), key=lambda entry: entry.name)
            health = await HealthWatch(connection, key_prefix=running.key_prefix).look()
    except QueueUnavailable:
        health = QueueHealth("away")
    return Snapshot(running, parts, models, list(running.problems), list(health.troubles().values()))


def _end_orphans(home: Home) -> None:
    """End what a killed host left, and free its port. A host that is only starting is not touched: it is seen
    as a process, or it holds the lock."""
    if not processes.of_instance(home.instance) or processes.of_instance(home.instance, "host"):
        return
    with only_one(home):
        leave_nothing(home)


def check_runs_as(running: Running, *, port: int | None, no_auth: bool) -> None:
    """Raise `ConfigError` where what runs has not what a command asks for by name."""
    asked = f"--port {port}" if port and port != urlsplit(running.url).port else ""
    asked = asked or ("--no-auth" if no_auth and running.key else "")
    if asked:
        raise ConfigError(
            f"The platform runs already at {running.url}, without {asked}: run `tidegate down` first."
        )


def _same_files(running: Running, chosen: Sequence[Path]) -> None:
    wanted = [str(path.resolve()) for path in chosen]
    if wanted != running.paths:
        raise ConfigError(
            f"The platform runs already with -f {' '.join(running.paths)}. Its files are watched: "
            "change those, or run `tidegate down` before you start it with others."
        )


async def _detach(settings: Settings, home: Home, paths: Sequence[Path]) -> asyncio.subprocess.Process:
    ProgressFile(home.progress).reset()
    environment = {
        **os.environ,
        f"{PREFIX}HOME": str(home.root),
        f"{PREFIX}HOST": settings.host,
        f"{PREFIX}PORT": str(settings.port),
        f"{PREFIX}NO_AUTH": str(settings.no_auth).lower(),
        f"{PREFIX}KEY_PREFIX": settings.key_prefix,
    }
    if settings.redis_url:
        environment[f"{PREFIX}REDIS_URL"] = settings.redis_url
    return await processes.start(
        "host",
        [sys.executable, "-m", "tidegate.local.host", *(str(path.resolve()) for path in paths)],
        instance=home.instance,
        log=home.logs / "host.log",
        environment=environment,
    )


async def _until_ready(
    home: Home, child: asyncio.subprocess.Process | None, on_progress: OnProgress
) -> tuple[Running, ModelEntry | None]:
    lines = ProgressFile(home.progress)
    failed = ""
    while True:
        for line in lines.read_new():
            on_progress(line)
            if line.step == "host" and line.state == "failed":
                failed = line.message
        if child is not None and child.returncode is not None:
            raise HostFailed(failed or f"The host ended (status {child.returncode}): {_tail(home)}")
        running = read_record(home)
        if running is None and child is None:
            raise HostFailed("The platform stopped meanwhile.")
        if running is not None and running.url:
            is_done, model = await _first_model(running)
            if is_done:
                for line in lines.read_new():
                    on_progress(line)
                return running, model
        await asyncio.sleep(POLL_SECONDS)


async def _first_model(running: Running) -> tuple[bool, ModelEntry | None]:
    """True where waiting has an end: a model is ready, all have failed, or none is defined. Not before this
    host has seen its Serve: until then the registry holds what the host before it wrote."""
    if not running.has_seen_serve:
        return False, None
    try:
        async with Connection(running.redis_url, name="tidegate-up") as connection:
            found = await Registry(connection, key_prefix=running.key_prefix).read_models()
    except QueueUnavailable:
        return False, None
    defined = {model.name for model in load_resources(running.paths).models}
    if not defined:
        return True, None
    if not defined <= found.keys():
        return False, None
    # One that can be talked to before those that only judge or embed.
    entries = sorted((found[name] for name in defined), key=lambda entry: (entry.task in JUDGING, entry.name))
    ready = next((entry for entry in entries if entry.ready and entry.replicas_ready), None)
    if ready is not None:
        return True, ready
    if all(model_state(entry) != "running" for entry in entries):
        return True, next((entry for entry in entries if entry.ready), entries[0])
    return False, None


def _down(settings: Settings, on_progress: OnProgress) -> bool:
    home = Home(settings.home)
    running = read_record(home)
    if running is not None:
        on_progress(Progress("stop", "running", "Stopping."))
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(running.host.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while running.host.is_alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    had_left = running is not None or bool(processes.of_instance(home.instance))
    leave_nothing(home)
    for path in (home.record, home.progress):
        path.unlink(missing_ok=True)
    if had_left:
        on_progress(Progress("stop", "done", "Stopped."))
    return had_left


def _part(record: ProcessRecord) -> Part:
    is_alive = record.is_alive()
    memory = 0
    if is_alive:
        with suppress(psutil.Error):  # it ended between the two looks
            memory = psutil.Process(record.pid).memory_info().rss
    return Part(record.name, record.pid, is_alive, memory)


def _tail(home: Home) -> str:
    try:
        lines = (home.logs / "host.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log."
    return "\n".join(lines[-LOG_LINES:])

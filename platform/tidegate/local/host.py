"""The local host: one process that starts everything else, keeps it alive, and runs the control loop.

    host ── embedded Redis, Ray head (with Serve and the replicas), gateway: children, restarted with backoff
         ── file watcher, control loop, control API: tasks of its event loop

A part that dies is started again; the others wait for it (queue and replicas reconnect by themselves). Ray
loses its replicas with its head: the new one gets the whole Serve config again, and leases bring the
requests back. When the host ends, in whatever way, `end` leaves no process and no temporary file; data,
keys and logs stay.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from tidegate.control.observed import Capacity
from tidegate.control_api.app import ControlApp, Services
from tidegate.control_api.server import serving
from tidegate.control_api.sign_in import OwnKey
from tidegate.errors import ConfigError, QueueUnavailable
from tidegate.gateway.listen import listen, url
from tidegate.local import embedded, ray_cluster
from tidegate.local.api_port import LaptopHost
from tidegate.local.asked import Asked
from tidegate.local.audit_file import AuditFile
from tidegate.local.control_loop import ControlLoop
from tidegate.local.gateway import GatewayProcess, check_port
from tidegate.local.history_folder import HistoryFolder
from tidegate.local.home import Home, Problem, Running, record_of, write_atomically
from tidegate.local.keeping import keep_alive, leave_nothing, only_one
from tidegate.local.log_rotation import keep_small
from tidegate.local.progress import OnProgress, Progress, ProgressFile, quiet
from tidegate.local.ray_cluster import RayCluster
from tidegate.local.record_file import RecordFile
from tidegate.local.source_checks import SourceChecks
from tidegate.local.watch import ResourceFiles
from tidegate.messages.registry import ModelEntry
from tidegate.replica_args import FROM_ENVIRONMENT, REDIS_VARIABLE, ReplicaSettings
from tidegate.serve_api import ServeApi
from tidegate.settings import Settings, load_settings
from tidegate.store.connection import Connection
from tidegate.store.data_watch import DataWatch
from tidegate.store.keys import Keys
from tidegate.store.queue import QueueDepths
from tidegate.store.registry import Registry
from tidegate.store.usage import UsageReader
from tidegate.tasks import end_tasks
from tidegate.telemetry import configure_logging

log = logging.getLogger("tidegate.local")

WATCH_SECONDS = 1.0
KEY_SECONDS = 1.0
LOCAL_KEY = "local"
LOOPBACK = "127.0.0.1"
SMALL_MACHINE_CORES = 2


class Host:
    """Use `serve`. Holds what the tasks share; all of it is touched on the event loop only."""

    def __init__(
        self, settings: Settings, paths: Sequence[Path], on_progress: OnProgress, stop: asyncio.Event
    ) -> None:
        self.settings = settings
        self.home = Home(settings.home)
        self.stop = stop
        self.changed = asyncio.Event()
        self.files = ResourceFiles(paths, self._files_changed)
        self.asked = Asked(self.files, self.home.asked)
        self.sources = SourceChecks(self.home, self.changed.set)
        self._on_progress = on_progress
        self._began: dict[tuple[str, str], float] = {}
        self._paths = [str(path.resolve()) for path in paths]
        self._restarts: dict[str, int] = {}
        self._redis: asyncio.subprocess.Process | None = None
        self._ray: RayCluster | None = None
        self._gateway: GatewayProcess | None = None
        self._key = ""
        self._url = ""
        self._control_key = secrets.token_urlsafe(32)
        self._control_url = ""
        self._has_seen_serve = False
        self._redis_url = settings.redis_url or embedded.url(self.home)
        self._shown: dict[str, tuple[bool, str]] = {}

    async def run(self) -> None:
        """Start all parts, then keep them until `stop`. The caller ends what is left."""
        self._record()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.sources.close)
            ray_starting = asyncio.create_task(self._start_ray())
            stack.push_async_callback(end_tasks, ray_starting)
            await self._start_redis()
            connection = await self._connect(stack)
            keys = Keys(connection, key_prefix=self.settings.key_prefix)
            await keys.start()
            stack.push_async_callback(keys.close)
            self._key = await self._admin_key(keys)
            data_watch = DataWatch(connection, key_prefix=self.settings.key_prefix)
            await data_watch.start()
            stack.push_async_callback(data_watch.close)
            connection.on_reconnect(self.changed.set)  # what Redis lost is written again at once
            loop = await self._start_control(stack, connection, keys)
            await self._start_gateway(stack)
            serve = _ServeSlot(loop)
            stack.push_async_callback(serve.use, None)
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(self.files.follow(self.stop), name="files"),
                asyncio.create_task(loop.run(), name="control"),
                asyncio.create_task(self._keep_key(keys), name="key"),
                asyncio.create_task(keep_small(self.home.logs), name="logs"),
                asyncio.create_task(self._keep_ray(serve, ray_starting), name="ray"),
                asyncio.create_task(
                    self._keep("gateway", self._gateway_died, self._restart_gateway), name="gateway"
                ),
            ]
            if self._redis is not None:
                keeping = self._keep("redis", self._redis_died, self._restart_redis)
                tasks.append(asyncio.create_task(keeping, name="redis"))
            stack.push_async_callback(end_tasks, *tasks)
            stopping = asyncio.create_task(self.stop.wait())
            done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            for task in done - {stopping}:
                if not self.stop.is_set():
                    task.result()  # a task that ended by itself has failed; its error ends the host

    # Parts -----------------------------------------------------------------------------------------

    async def _start_redis(self) -> None:
        if self.settings.redis_url:
            self._tell(Progress("redis", "done", "Using the Redis of REDIS_URL."))
            return
        self._tell(Progress("redis", "running", "Starting the embedded Redis."))
        self._redis = await embedded.start(self.home)
        self._tell(Progress("redis", "done", "The embedded Redis answers."))
        self._record()

    async def _start_ray(self) -> RayCluster:
        self._tell(Progress("ray", "running", "Starting Ray."))
        self._ray = await self._fresh_ray()
        self._tell(Progress("ray", "done", "Ray runs."))
        self._record()
        return self._ray

    async def _fresh_ray(self) -> RayCluster:
        return await ray_cluster.start(
            self.home,
            gpus=ray_cluster.gpu_count(),
            redis_url=self._redis_url,
            keeps_spare=self.settings.spare_process,
            parked_bytes=self.settings.parked_bytes,
        )

    async def _start_gateway(self, stack: AsyncExitStack) -> None:
        self._tell(Progress("gateway", "running", "Starting the gateway."))
        self._gateway = GatewayProcess(self.settings, self.home, self._redis_url)
        stack.push_async_callback(self._gateway.stop)
        self._url = await self._gateway.start()
        self._tell(Progress("gateway", "done", f"The gateway answers at {self._url}."))
        self._record()

    async def _redis_died(self) -> None:
        assert self._redis is not None
        await self._redis.wait()

    async def _restart_redis(self) -> None:
        self._redis = await embedded.start(self.home)

    async def _gateway_died(self) -> None:
        assert self._gateway is not None
        await self._gateway.wait()

    async def _restart_gateway(self) -> None:
        assert self._gateway is not None
        await self._gateway.start()

    async def _keep_ray(self, serve: _ServeSlot, first: asyncio.Task[RayCluster]) -> None:
        await serve.use(await first)

        async def died() -> None:
            assert self._ray is not None
            log.error("%s died, and Ray with it", await _first_death(self._ray))
            await serve.use(None)

        async def restart() -> None:
            self._ray = await self._fresh_ray()
            await serve.use(self._ray)

        await self._keep("ray", died, restart)

    async def _keep(
        self, part: str, died: Callable[[], Awaitable[None]], restart: Callable[[], Awaitable[None]]
    ) -> None:
        async for _ in keep_alive(part, died, restart):
            self._restarts[part] = self._restarts.get(part, 0) + 1
            self._record()

    # What the control loop needs ---------------------------------------------------------------------

    async def _start_control(self, stack: AsyncExitStack, connection: Connection, keys: Keys) -> ControlLoop:
        """Make the control loop, and the control API that changes what it decides on."""
        prefix = self.settings.key_prefix
        registry = Registry(connection, key_prefix=prefix, times=self.settings.times)
        depths = QueueDepths(connection, key_prefix=prefix)
        audit = AuditFile(self.home.audit)
        loop = self._control_loop(registry, depths, audit)
        services = Services(
            host=LaptopHost(loop, self.asked, registry, depths, self.changed.set),
            keys=keys,
            key_ring=OwnKey(self._control_key, "host", keys),
            usage=UsageReader(connection, keys, key_prefix=prefix),
            audit=audit,
        )
        sockets = listen(LOOPBACK, 0, "the control API")
        self._control_url = url(sockets[0])
        await stack.enter_async_context(serving(ControlApp(services), sockets))
        return loop

    def _control_loop(self, registry: Registry, depths: QueueDepths, audit: AuditFile) -> ControlLoop:
        settings = self.settings
        prefix = settings.key_prefix
        cores = os.cpu_count() or 1
        return ControlLoop(
            self.asked,
            registry,
            depths,
            self.sources,
            RecordFile(self.home.records),
            HistoryFolder(self.home.history),
            ReplicaSettings(
                redis_url=f"{FROM_ENVIRONMENT}{REDIS_VARIABLE}",
                key_prefix=prefix,
                times=settings.times,
                log_dir=str(self.home.logs),
            ),
            Capacity(cores, ray_cluster.gpu_count(), psutil.virtual_memory().total),
            self.changed,
            audit,
            wave=1 if cores <= SMALL_MACHINE_CORES else 4,
            on_entries=self._models_changed,
            on_first_serve=self._serve_seen,
        )

    async def _connect(self, stack: AsyncExitStack) -> Connection:
        try:
            return await stack.enter_async_context(Connection(self._redis_url, name="tidegate-host"))
        except QueueUnavailable as error:
            raise ConfigError(f"{error.message} Check REDIS_URL.") from error

    async def _admin_key(self, keys: Keys) -> str:
        """The key of this machine's own commands: made once, kept where only its owner reads it. A Redis that
        lost its data gets it again; one that was revoked is followed by a new one."""
        if self.settings.no_auth:
            return ""
        if self.home.key.exists():
            secret = self.home.key.read_text(encoding="utf-8").strip()
            if secret and (keys.find(secret) is not None or await keys.register(secret, LOCAL_KEY)):
                return secret
        _, secret = await keys.create(LOCAL_KEY)
        write_atomically(self.home.key, secret.encode() + b"\n")
        return secret

    async def _keep_key(self, keys: Keys) -> None:
        """Let this machine's key in again where Redis lost its data, with a reconnect or without."""
        while True:
            await asyncio.sleep(KEY_SECONDS)
            with suppress(QueueUnavailable):  # asked again soon
                if self._key and await keys.restore(self._key, LOCAL_KEY):
                    log.warning("Redis had lost its data; this machine's key is registered again")

    # Reports ------------------------------------------------------------------------------------------

    def _tell(self, progress: Progress) -> None:
        """Pass it on, with the seconds since the step began where it is done."""
        clock, step = asyncio.get_running_loop().time(), (progress.step, progress.name)
        began = self._began.setdefault(step, clock)
        seconds = clock - began if progress.state == "done" else 0.0
        self._on_progress(msgspec.structs.replace(progress, seconds=seconds))

    def _files_changed(self) -> None:
        self.sources.forget_failures()
        self._record()
        self.changed.set()

    def _models_changed(self, entries: Mapping[str, ModelEntry]) -> None:
        for name, entry in entries.items():
            if entry.ready and not self._has_seen_serve:
                continue  # so it was when the platform stopped
            shown = (entry.ready, entry.reason)
            if self._shown.get(name) != shown:
                self._shown[name] = shown
                message = f"{entry.reason}: {entry.message}"
                self._tell(Progress("model", model_state(entry), message, name, task=entry.task))

    def _serve_seen(self) -> None:
        self._has_seen_serve = True
        self._record()

    def _record(self) -> None:
        """Write run/host.json anew."""
        parts = list(self._ray.parts) if self._ray is not None else []
        for name, pid in (
            ("redis", self._redis.pid if self._redis is not None else None),
            ("gateway", self._gateway.pid if self._gateway is not None else None),
        ):
            if pid is not None:
                with suppress(psutil.NoSuchProcess):  # it just died; its keeper writes again
                    parts.append(record_of(name, pid))
        running = Running(
            host=record_of("host", os.getpid()),
            url=self._url,
            key=self._key,
            control_url=self._control_url,
            control_key=self._control_key,
            redis_url=self._redis_url,
            key_prefix=self.settings.key_prefix,
            ray_url=self._ray.head.dashboard_url if self._ray is not None else "",
            ray_token=self._ray.token if self._ray is not None else "",
            ray_session=self._ray.head.session if self._ray is not None else "",
            paths=self._paths,
            logs=str(self.home.logs),
            processes=parts,
            problems=[Problem(p.field, p.value, p.remedy) for p in self.files.problems],
            restarts=dict(self._restarts),
            has_seen_serve=self._has_seen_serve,
        )
        write_atomically(self.home.record, msgspec.json.encode(running))


class _ServeSlot:
    """Hands the Serve of the Ray that runs now to the control loop, and closes the one before."""

    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop
        self._serve: ServeApi | None = None

    async def use(self, cluster: RayCluster | None) -> None:
        old, self._serve = self._serve, None
        if cluster is not None:
            self._serve = ServeApi(cluster.head.dashboard_url, token=cluster.token, timeout_seconds=60.0)
        self._loop.use(self._serve)
        if old is not None:
            await old.close()


def model_state(entry: ModelEntry) -> Literal["running", "done", "failed"]:
    """Return how far a model is: ready, on its way, or stuck until something changes."""
    if entry.ready:
        return "done"
    progressing = any(item.type == "Progressing" and item.status == "True" for item in entry.conditions)
    return "running" if progressing or entry.revisions else "failed"


async def serve(
    settings: Settings,
    paths: Sequence[Path],
    on_progress: OnProgress = quiet,
    stop_event: asyncio.Event | None = None,
) -> None:
    """Run the platform in this process until `stop_event`. Raises `ConfigError` before anything starts where
    a resource, a setting or a port is wrong, or where a host with this home runs already."""
    stop = stop_event or asyncio.Event()
    host = Host(settings, paths, on_progress, stop)
    host.files.load()
    models = len(host.files.resources.models)
    on_progress(Progress("files", "done", f"{models} models are defined."))
    host.home.make()
    with only_one(host.home):
        await asyncio.to_thread(leave_nothing, host.home)  # first: an orphan may hold the port
        check_port(settings)
        host.home.temporary.mkdir(mode=0o700, parents=True)
        try:
            await host.run()
        finally:
            on_progress(Progress("stop", "running", "Stopping."))
            await asyncio.to_thread(leave_nothing, host.home)
            host.home.record.unlink(missing_ok=True)
            on_progress(Progress("stop", "done", "Stopped."))


async def _first_death(cluster: RayCluster) -> str:
    """Ray's processes are not children of the host, so they are polled."""
    while True:
        if (part := cluster.dead_part()) is not None:
            return part
        await asyncio.sleep(WATCH_SECONDS)


def main() -> int:
    """`python -m tidegate.local.host PATH...`: the detached host that `up` starts."""
    settings = load_settings()
    configure_logging(settings.log_format, settings.log_level)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each round of the control loop
    home = Home(settings.home)
    progress = ProgressFile(home.progress)

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(settings, [Path(path) for path in sys.argv[1:]], progress.write, stop)

    try:
        asyncio.run(run())
    except Exception as error:
        log.exception("the host ends")
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        progress.write(Progress("host", "failed", message))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

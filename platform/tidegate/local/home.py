"""The files of one local host, all under `TIDEGATE_HOME`, and how to find a host that runs.

    run/host.json   what runs: written by the host only, gone when it has stopped
    run/host.lock   held by the living host (flock: the kernel lets go when it dies)
    run/demo.yaml   the demo's Models that other packages carry
    data/           the embedded Redis, the control loop's records, what was asked of the control API and
                    its audit log
    logs/           one file per process
    key             the secret of the key that was made at first start, readable by its owner only
    .tidegate-home  says that the above is Tidegate's: only with it `tidegate clean` removes anything

Ray's sockets and session files lie in a short folder under the system's temporary one (socket paths are
bounded), named after the home, so that `down` finds them also when the host was killed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from tidegate.errors import ConfigError, FieldProblem
from tidegate.replica_args import KEY_PREFIX

MARKER_TEXT = b"Tidegate made run, data, logs and key beside this file; `tidegate clean` removes them.\n"
PID_REUSE_SECONDS = 0.5  # two start times of one process agree better than this


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process for certain: ids are used again, so the start time belongs to it."""

    name: str
    pid: int
    created: float

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < PID_REUSE_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class Problem(msgspec.Struct, frozen=True):
    """A refused field of a resource file."""

    field: str
    value: str
    remedy: str


class Running(msgspec.Struct, frozen=True):
    """The host's record of itself. `url` is empty until the gateway answers."""

    host: ProcessRecord
    url: str = ""
    key: str = ""  # empty under --no-auth
    control_url: str = ""  # of the control API
    control_key: str = ""  # its admin key: made anew at each start, and kept here alone
    redis_url: str = ""
    key_prefix: str = KEY_PREFIX
    ray_url: str = ""
    ray_token: str = ""  # what Ray asks of who speaks to it
    ray_session: str = ""  # the folder of Ray's session; logs/serve in it holds what replicas print
    paths: list[str] = []
    logs: str = ""
    processes: list[ProcessRecord] = []
    problems: list[Problem] = []
    restarts: dict[str, int] = {}
    has_seen_serve: bool = False  # and the registry's models are of this start


@dataclass(frozen=True, slots=True)
class Home:
    root: Path

    @property
    def instance(self) -> str:
        """Names everything that belongs to this home; in the environment of each of its processes."""
        return hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:12]

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def record(self) -> Path:
        return self.run / "host.json"

    @property
    def lock(self) -> Path:
        return self.run / "host.lock"

    @property
    def progress(self) -> Path:
        return self.run / "progress.jsonl"

    @property
    def demo(self) -> Path:
        return self.run / "demo.yaml"

    @property
    def key(self) -> Path:
        return self.root / "key"

    @property
    def records(self) -> Path:
        return self.data / "control.json"

    @property
    def asked(self) -> Path:
        return self.data / "asked.json"

    @property
    def audit(self) -> Path:
        return self.data / "audit.jsonl"

    @property
    def history(self) -> Path:
        return self.data / "revisions"

    @property
    def node(self) -> Path:
        return self.data / "node"

    @property
    def temporary(self) -> Path:
        return Path(tempfile.gettempdir()) / f"tg-{self.instance}"

    @property
    def marker(self) -> Path:
        return self.root / ".tidegate-home"

    @property
    def is_ours(self) -> bool:
        """True where Tidegate made what lies here: it has the marker, or what a platform from before the
        marker leaves."""
        before = (self.lock, self.records, self.data / "redis" / "appendonlydir")
        return self.marker.is_file() or any(path.exists() for path in before)

    def check(self) -> None:
        """Raises `ConfigError` where this folder cannot be a home: `/`, a user's own folder, or one whose
        `data`, `logs`, `run` or `key` somebody else made."""
        # Not Path.home, which fails for a user without one.
        user = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111
        shared = {Path("/"), user, *user.parents, Path(tempfile.gettempdir()).resolve()}
        if self.root.resolve() in shared:
            raise self._refused("holds other things than Tidegate's; name a folder of its own")
        if self.is_ours:
            return
        ours = (self.run, self.data, self.logs, self.key)
        if taken := [path.name for path in ours if path.exists() or path.is_symlink()]:
            raise self._refused(
                f"holds {', '.join(taken)} that Tidegate did not make; name a folder of its own"
            )

    def _refused(self, remedy: str) -> ConfigError:
        problem = FieldProblem("TIDEGATE_HOME", str(self.root), remedy)
        return ConfigError(str(problem), [problem])

    def make(self) -> None:
        """Create the folders, for their owner only. Raises `ConfigError` as `check` does."""
        self.check()
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.marker.exists():
            write_atomically(self.marker, MARKER_TEXT)
        for folder in (self.root, self.run, self.data, self.logs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def find(root: Path) -> Running | None:
    """The host that runs with this home and answers; None where there is none, or it is only starting."""
    running = read_record(Home(root))
    return running if running is not None and running.url else None


def read_record(home: Home) -> Running | None:
    """The living host's record, also while it starts."""
    try:
        running = msgspec.json.decode(home.record.read_bytes(), type=Running)
    except (OSError, msgspec.DecodeError):
        return None
    return running if running.host.is_alive() else None


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the old content or the new; the file is its owner's only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)


def record_of(name: str, pid: int) -> ProcessRecord:
    """Raises `psutil.NoSuchProcess` where it is gone already."""
    return ProcessRecord(name, pid, psutil.Process(pid).create_time())

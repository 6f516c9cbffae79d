"""The files of one local host, all under `TIDEGATE_HOME`, and how to find a host that runs.

    run/host.json   what runs: written by the host only, gone when it has stopped
    run/host.lock   held by the living host (flock: the kernel lets go when it dies)
    data/           the embedded Redis, and the control loop's records
    logs/           one file per process
    key             the secret of the key that was made at first start, readable by its owner only

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

from tidegate.replica_args import KEY_PREFIX

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
    def key(self) -> Path:
        return self.root / "key"

    @property
    def records(self) -> Path:
        return self.data / "control.json"

    @property
    def temporary(self) -> Path:
        return Path(tempfile.gettempdir()) / f"tg-{self.instance}"

    def make(self) -> None:
        """Create the folders, for their owner only."""
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

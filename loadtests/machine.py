"""The machine under test: which cores, whose CPU seconds, how much memory, and the processes we start.

Linux only: figures come from /proc. Every process that a scenario starts is recorded with its process id
and stopped by that id; nothing is ever found by name.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

STOP_SECONDS = 15.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
REPOSITORY = Path(__file__).resolve().parent.parent


class StartFailed(Exception):
    """A process did not come up. The message carries the end of its log."""


def pin_to_cores(count: int) -> list[int]:
    """Bind this process, and so all it starts, to the first `count` cores that it may use.

    Returns the cores. With fewer than `count` allowed, all of them are taken.
    """
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    return cores


def prioritize(pid: int, nice: int) -> None:
    """Give a process and its session this priority (below 0 needs root), for tests beside other work.

    Where the kernel groups processes by session (autogroup), a nice value acts only within the group, so
    the group gets it too.
    """
    os.setpriority(os.PRIO_PROCESS, pid, nice)
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text(str(nice))


def become_realtime() -> None:
    """Run this process, and so all it starts, before everything else on its cores (root only)."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and of its living children so far."""
    total = 0.0
    for process_id in (pid, *descendants(pid)):
        try:
            stat = Path(f"/proc/{process_id}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended between listing and reading; its time is in nobody's account any more
        total += parse_stat_seconds(stat)
    return total


def machine_busy_seconds(cores: Sequence[int]) -> float:
    """CPU seconds that these cores have worked so far, for whomever (not idle, not waiting for a disk)."""
    return parse_busy_seconds(Path("/proc/stat").read_text(), cores)


def parse_busy_seconds(stat: str, cores: Sequence[int]) -> float:
    """Sum of user, nice, system, irq, softirq and steal of the `cpuN` lines of /proc/stat."""
    wanted = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, numbers[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / CLOCK_TICKS


def parse_stat_seconds(stat: str) -> float:
    """utime + stime of one /proc/<pid>/stat line. The command name may hold spaces and brackets."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def command_line(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


@dataclass
class Started:
    """A running process of ours, by role: gateway, redis, replica, direct, nginx."""

    role: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_end(self, lines: int = 25) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


@dataclass
class Processes:
    """Starts processes in a session of their own and stops them, last first, on leaving the `with`."""

    folder: Path
    nice: int = 0
    started: list[Started] = field(default_factory=list)

    def __enter__(self) -> Processes:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in reversed(self.started):
            stop(one)
        self.started.clear()

    def start(self, role: str, command: Sequence[str], environ: Mapping[str, str] | None = None) -> Started:
        log = self.folder / f"{role}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                list(command),
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environ or {})},
                cwd=REPOSITORY,
                start_new_session=True,
            )
        if self.nice:
            prioritize(process.pid, self.nice)
        one = Started(role, process, log)
        self.started.append(one)
        return one

    def stop(self, one: Started) -> None:
        stop(one)
        self.started.remove(one)


def stop(one: Started) -> None:
    """SIGTERM, then SIGKILL after `STOP_SECONDS`, to the process group that we made; waits for the end."""
    for signal_number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        if one.process.poll() is not None:
            return
        try:
            os.killpg(one.pid, signal_number)
            one.process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def wait_for(started: Started, ready: Callable[[], bool], seconds: float, what: str) -> float:
    """Poll `ready` until it is true; returns the seconds it took.

    Raises `StartFailed` with the end of the log where the process ends before, or time runs out.
    """
    began = time.monotonic()
    while not ready():
        if started.process.poll() is not None:
            raise StartFailed(
                f"{started.role} ended with status {started.process.returncode} before {what}:\n"
                + started.log_end()
            )
        if time.monotonic() - began > seconds:
            raise StartFailed(f"{started.role}: no {what} within {seconds:.0f} s:\n{started.log_end()}")
        time.sleep(0.05)
    return time.monotonic() - began


def accepts_connections(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def python() -> str:
    return sys.executable


@contextmanager
def helper(module: str, *arguments: str, nice: int = 0) -> Iterator[Callable[[Any], dict[str, Any]]]:
    """A loaded model in a process of its own: call it with an order, which it answers on a line."""
    with subprocess.Popen(
        [python(), "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        start_new_session=True,
    ) as process:
        if nice:
            prioritize(process.pid, nice)

        def order(asked: Any) -> dict[str, Any]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(read_line(process.stdout))
            return answer

        try:
            json.loads(read_line(process.stdout))
            yield order
        finally:
            process.kill()


def read_line(stream: IO[bytes] | None) -> str:
    return stream.readline().decode().strip() if stream else ""

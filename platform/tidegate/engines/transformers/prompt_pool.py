"""The replica's end of the process that prepares its prompts (`prompt_process`).

Who runs where. Whoever loads and closes the engine makes the pool, waits until it is ready and closes it;
`prepare` runs on the event loop, for any number of requests at once. Each takes a seat, which stands for a
lane, and gives it back with the reply, even where nobody waits for that any more: a lane never carries two.

What always holds.
- `LANES` prompts are prepared at a time, and at most `SLOW_LANES` of them are slow: a large prompt, or one
  that was not done at a quick first try. So whoever loops holds up the quick ones for that first try alone.
  Who waits for a seat waits in order.
- A reply comes within the worker's budgets of CPU time. Where it does not (the machine is starved or stopped)
  or the lane closes, the whole crew is replaced and what it had in hand is tried once more, then refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile

import msgspec

from tidegate.engines.base import EngineLoadError
from tidegate.engines.frames import LENGTH, receive, send
from tidegate.engines.limits import refusal
from tidegate.engines.transformers import prompt_process
from tidegate.engines.transformers.prompt_process import REPLIES, Options, Reply, Task
from tidegate.engines.transformers.tokenizer import broken_template_note
from tidegate.messages.codec import encode_open

log = logging.getLogger(__name__)

LANES = 4
SLOW_LANES = 2
LARGE_BYTES = 1 << 16
START_SECONDS = 120.0  # on a machine that loads weights beside
PATIENCE = 10.0  # of a starved machine: a reply may take so many times its CPU time
TRIES = 2
# Small, quiet, and without threads, which do not survive a fork.
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


class Beginner:
    """The process before it knows whose prompts it prepares: it imports, and waits to be told."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: `end` reaches the workers too, and no Ctrl-C does.
            self.process = subprocess.Popen(  # noqa: S603  # our own module
                [sys.executable, "-m", prompt_process.__name__],
                env=os.environ | ENVIRONMENT,
                stdin=theirs.fileno(),
                start_new_session=True,
            )
        self.control = ours

    def lives(self) -> bool:
        return self.process.poll() is None


_beginners: list[Beginner] = []


def start_ahead() -> None:
    """Start the process of this replica's first crew before its engine is known."""
    _beginners.append(Beginner())


class Crew:
    """A nursery with its workers, and the lanes to them that carry nothing."""

    def __init__(self, options: Options) -> None:
        beginner = _beginners.pop() if _beginners else Beginner()
        if not beginner.lives():
            beginner = Beginner()
        self._process = beginner.process
        pairs = [socket.socketpair() for _ in range(LANES)]
        with beginner.control as control, TemporaryFile() as given:
            given.write(msgspec.msgpack.encode(options))
            given.flush()
            given.seek(0)
            # Of a process that is gone the lanes read as closed.
            with suppress(OSError):
                socket.send_fds(control, [b"."], [given.fileno(), *(end.fileno() for _, end in pairs)])
        self.idle = [end for end, _ in pairs]
        for ours, end in pairs:
            ours.setblocking(False)
            end.close()

    def end(self) -> None:
        """Kill the session and close the idle lanes. Who waits at another lane sees it close."""
        os.killpg(self._process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        self._process.wait()
        for lane in self.idle:
            lane.close()


class PromptPool:
    def __init__(
        self, path: Path, context_length: int, chat_template: str = "", *, has_encoder: bool = False
    ) -> None:
        """Start the process, which loads the tokenizer meanwhile."""
        self.most_characters_per_token = 0  # until `wait_ready`
        self._options = Options(str(path), context_length, chat_template, has_encoder)
        self._crew: Crew | None = Crew(self._options)
        self._is_closed = False
        self._seats = asyncio.Semaphore(LANES)
        self._slow_seats = asyncio.Semaphore(SLOW_LANES)
        self._exchanges: set[asyncio.Task[Reply | None]] = set()
        self._reply_seconds = PATIENCE * (
            prompt_process.RENDER_SECONDS + prompt_process.tokenize_seconds(context_length)
        )

    def wait_ready(self, vocabulary_size: int) -> list[str]:
        """Block until the first worker answers; returns notes on the chat template.

        Raises `EngineLoadError`."""
        assert self._crew is not None
        lane = self._crew.idle[-1]
        lane.settimeout(START_SECONDS)
        try:
            send(lane, msgspec.msgpack.encode(Task("", None, vocabulary_size)))
            frame = receive(lane)
        except OSError:
            frame = None
        if frame is None:
            raise EngineLoadError(
                "TokenizerMissing",
                f"The process that prepares prompts with the tokenizer of {self._options.path} did not "
                "start; the replica's log says why.",
            )
        lane.setblocking(False)
        reply = REPLIES.decode(frame)
        self.most_characters_per_token = reply.most_characters_per_token
        return [broken_template_note(reply.finish.message)] if reply.finish is not None else reply.notes

    def close(self) -> None:
        """End the process. What it has in hand comes back refused."""
        self._is_closed = True
        if self._crew is not None:
            self._crew.end()
            self._crew = None

    async def prepare(self, task: Task) -> Reply:
        """Never raises; ends within the bounds of a worker and the patience with the machine."""
        frame = encode_open(msgspec.structs.replace(task, is_quick=True))
        if len(frame) <= LARGE_BYTES:
            reply = await self._surely(frame, [self._seats])
            if reply.finish is None or reply.finish.code != "PromptTooCostly":
                return reply
        return await self._surely(encode_open(task), [self._slow_seats, self._seats])

    async def _surely(self, frame: bytes, seats: list[asyncio.Semaphore]) -> Reply:
        for _ in range(TRIES):
            if (reply := await self._ask(frame, seats)) is not None:
                return reply
        return Reply(
            finish=refusal("PromptFailed", f"{TRIES} processes that prepared this prompt ended over it.")
        )

    async def _ask(self, frame: bytes, seats: list[asyncio.Semaphore]) -> Reply | None:
        """Returns None where the crew ended. An exchange that has begun goes on when its caller leaves."""
        async with AsyncExitStack() as stack:
            for seat in seats:
                await stack.enter_async_context(seat)
            exchange = asyncio.get_running_loop().create_task(self._exchange(frame))
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._exchanges.discard)
            for seat in seats:
                exchange.add_done_callback(lambda _, seat=seat: seat.release())  # type: ignore[misc]
            stack.pop_all()  # the seats are the exchange's now
        return await asyncio.shield(exchange)

    async def _exchange(self, frame: bytes) -> Reply | None:
        if self._is_closed:
            return None
        crew = self._crew = self._crew or Crew(self._options)
        lane = crew.idle.pop()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._reply_seconds):
                await loop.sock_sendall(lane, LENGTH.pack(len(frame)) + frame)
                (size,) = LENGTH.unpack(await _receive(lane, LENGTH.size))
                reply = REPLIES.decode(await _receive(lane, size))
        except BaseException as error:
            lane.close()
            if self._crew is crew:  # the first one that notices
                log.warning("prompts need a new process: %r", error)
                self._crew = None
                crew.end()
            if isinstance(error, (OSError, TimeoutError)):
                return None
            raise
        crew.idle.append(lane)
        return reply


async def _receive(lane: socket.socket, size: int) -> bytes:
    """Raises `ConnectionResetError` where the lane is closed."""
    got = bytearray()
    loop = asyncio.get_running_loop()
    while len(got) < size:
        part = await loop.sock_recv(lane, min(size - len(got), 1 << 20))
        if not part:
            raise ConnectionResetError("the process ended")
        got += part
    return bytes(got)

"""The gateway's end of the process that checks grammars (`grammar_process`).

One check runs at a time, and one of each key waits for its turn, the others of the key behind it: who sends
schemas that take their whole budget delays a stranger by one of them, and takes no more places in the line
than a key may. The process starts with the first check that needs it, and again after each that it did not
survive. What was found is kept, so a schema that comes with every call is checked once.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from collections import Counter, OrderedDict
from contextlib import AsyncExitStack
from weakref import WeakValueDictionary

import msgspec

from tidegate.children import send_signal
from tidegate.errors import GenerationFailed, InvalidRequest, QueueFull
from tidegate.gateway.constraints import CPU_SECONDS, LENGTH, Checked, Constraint

PROCESS = "tidegate.gateway.grammar_process"
MOST_BYTES = 128 * 1024  # of one constraint
MOST_WAITING, MOST_OF_A_KEY = 256, 16
CACHE_BYTES = 8 << 20
REPLY_SECONDS = 10.0  # on a starved machine
# What ends the process where a check takes too much: its timer, or the library on memory that it did not get.
COSTS_TOO_MUCH = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV)
TOO_COSTLY = Checked(refusal=f"it takes more than {CPU_SECONDS:g} s of CPU time to compile; simplify it")


class GrammarPool:
    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting: Counter[str] = Counter()  # by key
        self._known: OrderedDict[bytes, Checked] = OrderedDict()
        self._known_bytes = 0

    async def grammar(self, constraint: Constraint, key: str) -> Checked:
        """Raises `InvalidRequest` where there is no grammar for it, `QueueFull` where too many wait,
        `GenerationFailed` where the check itself failed."""
        frame = msgspec.json.encode(constraint)
        if len(frame) > MOST_BYTES:
            raise _refused(constraint, f"it has {len(frame)} bytes, at most {MOST_BYTES} are taken")
        name = hashlib.sha256(frame).digest()
        checked = self._kept(name) or await self._checked(name, frame, key)
        if checked.refusal:
            raise _refused(constraint, checked.refusal)
        return checked

    async def close(self) -> None:
        if self._process is not None:
            await self._end(self._process)

    async def _checked(self, name: bytes, frame: bytes, key: str) -> Checked:
        if self._waiting.total() >= MOST_WAITING or self._waiting[key] >= MOST_OF_A_KEY:
            raise QueueFull(
                "As many schemas as may wait to be checked. Send the call again.", retry_after_seconds=1
            )
        self._waiting[key] += 1
        try:
            async with AsyncExitStack() as stack:
                for turn in (self._turns.setdefault(key, asyncio.Lock()), self._turn):
                    await stack.enter_async_context(turn)
                if (checked := self._kept(name)) is None:  # another call had it checked meanwhile
                    checked = await self._exchange(frame)
                    self._keep(name, checked)
                return checked
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    async def _exchange(self, frame: bytes) -> Checked:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                PROCESS,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # no Ctrl-C reaches it
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                process.stdin.write(LENGTH.pack(len(frame)) + frame)
                await process.stdin.drain()
                (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
                return msgspec.msgpack.decode(await process.stdout.readexactly(size), type=Checked)
        except BaseException as error:  # also where the caller left: its reply must not be the next one's
            await self._end(process)
            if not isinstance(error, (OSError, TimeoutError, asyncio.IncompleteReadError)):
                raise
            if process.returncode in COSTS_TOO_MUCH:
                return TOO_COSTLY
            raise GenerationFailed(
                "The check of the answer's form broke off. Send the call again."
            ) from error

    def _kept(self, name: bytes) -> Checked | None:
        if name in self._known:
            self._known.move_to_end(name)
        return self._known.get(name)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self._process = None
        send_signal(process, signal.SIGKILL)
        await process.wait()

    def _keep(self, name: bytes, checked: Checked) -> None:
        self._known[name] = checked
        self._known_bytes += _size(checked)
        while self._known_bytes > CACHE_BYTES:
            self._known_bytes -= _size(self._known.popitem(last=False)[1])


def _size(checked: Checked) -> int:
    return 512 + len(checked.grammar) + len(checked.refusal)


def _refused(constraint: Constraint, why: str) -> InvalidRequest:
    return InvalidRequest(f"{constraint.param}: {why}.", param=constraint.param, code="invalid_grammar")

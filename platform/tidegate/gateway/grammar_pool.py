"""The gateway's end of the process that checks grammars (`grammar_process`).

One check runs at a time, and one of each key waits for its turn, the others of the key behind it: who sends
schemas that take their whole budget delays a stranger by one of them. The process starts with the first check
that needs it, and again after each that it did not survive. What was found is kept, so a schema that comes
with every call is checked once.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import OrderedDict
from contextlib import AsyncExitStack
from weakref import WeakValueDictionary

import msgspec

from tidegate.errors import InvalidRequest, QueueFull
from tidegate.gateway import grammar_process
from tidegate.gateway.grammar_process import CPU_SECONDS, LENGTH
from tidegate.gateway.grammars import Checked, Constraint

MOST_BYTES = 128 * 1024  # of one constraint
MOST_WAITING = 256
CACHE_BYTES = 8 << 20
REPLY_SECONDS = 10.0  # on a starved machine
TOO_COSTLY = Checked(refusal=f"it takes more than {CPU_SECONDS:g} s of CPU time to compile; simplify it")


class GrammarPool:
    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting = 0
        self._known: OrderedDict[bytes, Checked] = OrderedDict()
        self._known_bytes = 0

    async def grammar(self, constraint: Constraint, key: str) -> Checked:
        """Raises `InvalidRequest` where there is no grammar for it, `QueueFull` where too many wait."""
        frame = msgspec.msgpack.encode(constraint)
        if len(frame) > MOST_BYTES:
            raise _refused(constraint, f"it has {len(frame)} bytes, at most {MOST_BYTES} are taken")
        name = hashlib.sha256(frame).digest()
        if (checked := self._known.get(name)) is None:
            checked = await self._checked(frame, key)
            self._keep(name, checked)
        else:
            self._known.move_to_end(name)
        if checked.refusal:
            raise _refused(constraint, checked.refusal)
        return checked

    async def close(self) -> None:
        if self._process is not None:
            await self._end(self._process)

    async def _checked(self, frame: bytes, key: str) -> Checked:
        if self._waiting >= MOST_WAITING:
            raise QueueFull(
                f"{MOST_WAITING} schemas wait to be checked. Send the call again.", retry_after_seconds=1
            )
        self._waiting += 1
        try:
            async with AsyncExitStack() as stack:
                for turn in (self._turns.setdefault(key, asyncio.Lock()), self._turn):
                    await stack.enter_async_context(turn)
                return await self._exchange(frame)
        finally:
            self._waiting -= 1

    async def _exchange(self, frame: bytes) -> Checked:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                grammar_process.__name__,
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
            if isinstance(error, (OSError, TimeoutError, asyncio.IncompleteReadError)):
                return TOO_COSTLY
            raise

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self._process = None
        if process.returncode is None:
            process.kill()
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

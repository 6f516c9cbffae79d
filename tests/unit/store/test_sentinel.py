"""Which master is taken where Sentinels disagree, are silent or refuse."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.errors import ConfigError, QueueUnavailable
from tidegate.store.address import Endpoint, parse_url
from tidegate.store.sentinel import find_master
from tidegate.store.wire import Wire

OLD = b"*2\r\n$3\r\nold\r\n$4\r\n6379\r\n"
NEW = b"*2\r\n$3\r\nnew\r\n$4\r\n6379\r\n"
UNKNOWN = b"*-1\r\n"
LOCKED = b"-NOAUTH Authentication required.\r\n"


class FakeSentinel(asyncio.WriteTransport):
    """Answers every command with the same bytes, or never."""

    def __init__(self, wire: Wire, answer: bytes) -> None:
        super().__init__()
        self._wire = wire
        self._answer = answer

    def write(self, _: object) -> None:
        if self._answer:
            asyncio.get_running_loop().call_soon(self._wire.data_received, self._answer)

    def abort(self) -> None:
        asyncio.get_running_loop().call_soon(self._wire.connection_lost, None)


async def ask(answers: list[bytes | None], *, timeout_seconds: float = 20.0) -> Endpoint:
    """Ask one Sentinel per answer. None: it cannot be reached; empty: it is silent."""
    address = parse_url(f"redis+sentinel://{','.join(f's{n}' for n in range(len(answers)))}/queue")

    async def dial(endpoint: Endpoint) -> Wire:
        answer = answers[int(endpoint[0][1:])]
        if answer is None:
            raise ConnectionRefusedError
        wire = Wire(lambda *_: None, lambda _: None, 60.0)
        wire.connection_made(FakeSentinel(wire, answer))
        return wire

    return await find_master(address, dial, timeout_seconds=timeout_seconds)


@pytest.mark.parametrize(
    ("answers", "timeout_seconds"),
    [
        ([NEW], 20),
        ([OLD, NEW, NEW], 20),
        ([b"", NEW, NEW], 20),  # most of them agree: nobody waits for the silent one
        ([None, NEW, NEW], 20),
        ([None, LOCKED, NEW], 20),
        ([UNKNOWN, None, NEW], 20),
        ([b"", b"", NEW], 0.01),
    ],
)
async def test_what_most_of_them_name_is_taken(answers: list[bytes | None], timeout_seconds: float) -> None:
    assert await ask(answers, timeout_seconds=timeout_seconds) == ("new", 6379)


async def test_where_nobody_names_one_it_is_said_why() -> None:
    with pytest.raises(QueueUnavailable, match="No Sentinel answers for queue of Sentinels s0:26379"):
        await ask([None, None])
    with pytest.raises(QueueUnavailable, match="No Sentinel answers"):
        await ask([b"", None], timeout_seconds=0.01)
    with pytest.raises(ConfigError, match="s1:26379 watches no master 'queue'"):
        await ask([None, UNKNOWN])
    with pytest.raises(ConfigError, match=r"NOAUTH.*put sentinel_username and sentinel_password"):
        await ask([LOCKED])

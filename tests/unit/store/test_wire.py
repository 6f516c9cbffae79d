from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.waiting import await_until
from tidegate.store.wire import ConnectionLost, ReplyError, Wire


class FakeTransport(asyncio.WriteTransport):
    """Keeps what is written; `abort` ends the connection as a real one does, later on the loop."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.written = b""
        self._wire = wire

    def write(self, data: Any) -> None:
        self.written += data

    def abort(self) -> None:
        asyncio.get_running_loop().call_soon(self._wire.connection_lost, None)


def a_wire(call_timeout_seconds: float = 60.0) -> tuple[Wire, FakeTransport, list[Any], list[Wire]]:
    pushes: list[Any] = []
    losses: list[Wire] = []
    wire = Wire(lambda *push: pushes.append(push), losses.append, call_timeout_seconds)
    transport = FakeTransport(wire)
    wire.connection_made(transport)
    return wire, transport, pushes, losses


async def test_replies_find_their_commands_and_pushes_go_beside_them() -> None:
    wire, transport, pushes, _ = a_wire()
    first, second, third = wire.send("GET", "a"), wire.send("GET", b"b"), wire.send("NOPE", 1)
    assert transport.written.startswith(b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n*2\r\n")
    message = b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nx\r\n"
    stream = b"$1\r\n1\r\n" + message + b"_\r\n-ERR no such command\r\n" + message
    for at in range(len(stream)):  # however the network cuts it
        wire.data_received(stream[at : at + 1])
    assert (await first, await second) == (b"1", None)
    with pytest.raises(ReplyError) as caught:
        await third
    assert caught.value.kind == "ERR"
    assert pushes == [(b"message", b"c", b"x")] * 2
    wire.connection_lost(None)


async def test_a_lost_connection_fails_what_is_in_flight_and_what_comes_after() -> None:
    wire, _, _, losses = a_wire()
    in_flight = wire.send("GET", "a")
    wire.connection_lost(None)
    for future in (in_flight, wire.send("GET", "b")):
        with pytest.raises(ConnectionLost):
            await future
    assert losses == [wire]


async def test_a_reply_to_a_cancelled_caller_is_dropped() -> None:
    wire, _, _, _ = a_wire()
    cancelled, waiting = wire.send("GET", "a"), wire.send("GET", "b")
    cancelled.cancel()
    wire.data_received(b"$1\r\n1\r\n$1\r\n2\r\n")
    assert await waiting == b"2"
    wire.connection_lost(None)


@pytest.mark.parametrize("noise", [b"$1\r\n1\r\n", b"@nonsense\r\n"])
async def test_what_nobody_asked_for_ends_the_connection(noise: bytes) -> None:
    wire, _, _, losses = a_wire()
    wire.data_received(noise)
    await await_until(lambda: losses)
    assert losses == [wire]


async def test_a_silent_server_is_given_up() -> None:
    wire, _, _, losses = a_wire(call_timeout_seconds=0.02)
    with pytest.raises(ConnectionLost):
        await wire.send("GET", "a")
    assert losses == [wire]

"""The attack's own parts: what a call answers, and what the innocent is said to have noticed."""

from __future__ import annotations

import asyncio
from collections import Counter

from loadtests.attack import Door, Noticed, header_bombs, post, table


async def test_a_call_gives_its_status_whatever_is_left_of_its_body() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n")
        writer.write(b"HTTP/1.1 431 Too Large\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        while await reader.read(1 << 20):
            continue
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        door = Door("127.0.0.1", server.sockets[0].getsockname()[1], "key", "m")
        assert await header_bombs(door) == "431"
        assert await post(door, door.chat(n=2), reads=False) == "unread"


def test_the_table_shows_the_worst_and_when_it_was() -> None:
    noticed = Noticed(failures=Counter({"stream 503": 2}))
    for seconds in [*[0.02] * 60, 1.5, *[0.02] * 139]:
        noticed.note("gaps", seconds)
    noticed.note("machine", 0.001)
    text = table("before", noticed)
    assert f"| gaps | 200 | 0.020 | 1.500 | {noticed.worst['gaps'][1]} |" in text
    assert "wholes" not in text
    assert "failures: {'stream 503': 2}" in text

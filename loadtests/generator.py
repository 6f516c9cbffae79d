"""The load generator: `python -m loadtests.generator PLAN TALLY`, both JSON files.

One process, one uvloop, one `asyncio.Protocol` per client. A client holds one keep-alive connection and has
at most one request under way: it sends, reads the answer to its end, and sends the next (closed loop) until
the window is over. Clients begin spread over `spread_seconds` so that requests keep arriving evenly.

All times of a plan are CLOCK_MONOTONIC seconds, which processes of one machine share, so the caller can read
CPU seconds at the very window that the generator counts in.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import msgspec
import uvloop

from loadtests.sse import AnswerReader, Phase

GOLDEN = (5**0.5 - 1) / 2
MARK = "000000000"  # in a body: as many digits
RECONNECT_SECONDS = 0.01  # a server that hangs up at once must not turn the generator into a busy loop


class LoadPlan(msgspec.Struct, frozen=True):
    """`body` is sent as is by every client, but for `MARK`, which is a number of the client's own.
    `backoff_seconds` bounds how long a refused client waits: the smaller of it and `Retry-After`."""

    host: str
    port: int
    path: str
    body: str
    clients: int
    start_at: float
    window_from: float
    window_to: float
    stop_at: float  # requests still under way then count as unfinished
    spread_seconds: float
    key: str = ""
    backoff_seconds: float = 0.5
    with_gaps: bool = True
    requests_per_client: int = 0  # 0: until the window ends
    think_seconds: float = 0.0  # pause before each request: evenly spread over 0 to this long


class Tally(msgspec.Struct):
    """The window's counts. `ttft` and `gaps` in seconds. Only requests sent inside the window give a TTFT.

    `window_events` counts content events inside the window; `tokens` and `events` are totals over finished
    requests, from which the number of tokens in one event follows.
    """

    window_seconds: float = 0.0
    window_events: int = 0
    tokens: int = 0
    events: int = 0
    finished: int = 0
    window_finished: int = 0
    unfinished: int = 0
    statuses: dict[str, int] = {}
    refused_without_retry_after: int = 0
    broken_streams: int = 0
    token_counts: dict[str, int] = {}  # how many finished requests had so many tokens
    connection_errors: int = 0
    ttft: list[float] = []
    gaps: list[float] = []
    durations: list[float] = []
    cpu_seconds: float = 0.0  # of the generator, from its start
    first_sent: float = 0.0  # monotonic; 0: nothing was sent
    last_finished: float = 0.0

    def busy_seconds(self) -> float:
        """From the first request sent to the last one finished."""
        return self.last_finished - self.first_sent

    def tokens_per_event(self) -> float:
        return self.tokens / self.events if self.events and self.tokens else 1.0

    def tokens_per_second(self) -> float:
        if not self.window_seconds:
            return 0.0
        return self.window_events * self.tokens_per_event() / self.window_seconds


class Client(asyncio.Protocol):
    """One client: a connection and at most one request."""

    def __init__(
        self,
        plan: LoadPlan,
        tally: Tally,
        request: bytes,
        pauses: Iterator[float],
        ended: Callable[[Client], None],
    ) -> None:
        self.plan, self.tally, self.request, self.ended = plan, tally, request, ended
        self.pauses = pauses
        self.transport: asyncio.Transport | None = None
        self.reader: AnswerReader | None = None
        self.sent_at = 0.0
        self.last_event = 0.0
        self.first_event = 0.0
        self.left = plan.requests_per_client
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio.Transport, though they act as one.
        self.transport = cast(asyncio.Transport, transport)
        self.send()

    def send(self) -> None:
        now = time.monotonic()
        if now >= self.plan.window_to or self.transport is None:
            self.ended(self)
            return
        self.reader = AnswerReader()
        self.sent_at, self.first_event, self.last_event = now, 0.0, 0.0
        self.tally.first_sent = self.tally.first_sent or now
        self.transport.write(self.request)

    def data_received(self, received: bytes) -> None:
        reader = self.reader
        if reader is None:
            return
        now = time.monotonic()
        if fresh := reader.feed(received):
            self._count(fresh, now)
        if reader.phase is Phase.COMPLETE:
            self._complete(reader, now)

    def _count(self, fresh: int, now: float) -> None:
        plan, tally = self.plan, self.tally
        inside = plan.window_from <= now < plan.window_to
        if inside:
            tally.window_events += fresh
        if self.first_event == 0.0:
            self.first_event = now
            if self.sent_at >= plan.window_from:
                tally.ttft.append(now - self.sent_at)
        elif inside and plan.with_gaps:
            tally.gaps.append(now - self.last_event)
        self.last_event = now

    def _complete(self, reader: AnswerReader, now: float) -> None:
        tally = self.tally
        self.reader = None
        status = str(reader.status)
        tally.statuses[status] = tally.statuses.get(status, 0) + 1
        pause = 0.0
        if reader.status == 200 and not reader.failed_in_stream:
            tally.finished += 1
            tally.last_finished = now
            tally.events += reader.events
            tally.tokens += reader.tokens or 0
            counted = str(reader.tokens)
            tally.token_counts[counted] = tally.token_counts.get(counted, 0) + 1
            if self.plan.window_from <= now < self.plan.window_to:
                tally.window_finished += 1
                tally.durations.append(now - self.sent_at)
        elif reader.status == 200:
            tally.broken_streams += 1
        else:
            pause = self._refused(reader)
        self.left -= 1
        pause = pause or next(self.pauses)
        if self.left == 0:
            self.ended(self)
        elif pause:
            self.loop.call_later(pause, self.send)
        elif reader.headers.get(b"connection", b"").lower() == b"close":
            return  # connection_lost follows and the client comes back on a new connection
        else:
            self.send()

    def _refused(self, reader: AnswerReader) -> float:
        """Seconds to wait before the next try."""
        after = reader.headers.get(b"retry-after")
        if reader.status == 429 and after is None:
            self.tally.refused_without_retry_after += 1
        return min(self.plan.backoff_seconds, float(after)) if after else self.plan.backoff_seconds

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        if self.reader is not None:
            self.tally.connection_errors += 1
            self.reader = None
        self.ended(self)


def spread_pauses(longest_seconds: float) -> Iterator[float]:
    """Pauses that fill 0 to `longest_seconds` evenly (golden-ratio sequence).

    Streams end on an engine step, so clients that ask again at once would all arrive at the same point of a
    step and the wait for the next one would hide or show a delay of the platform as a whole step.
    """
    position = 0.0
    while True:
        position = (position + GOLDEN) % 1.0
        yield position * longest_seconds


def build_request(plan: LoadPlan, index: int) -> bytes:
    number = f"{int(plan.start_at * 1000) % 1_000_000:06}{index:03}"
    body = plan.body.replace(MARK, number).encode()
    lines = [
        f"POST {plan.path} HTTP/1.1",
        f"host: {plan.host}",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    if plan.key:
        lines.append(f"authorization: Bearer {plan.key}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def drive(plan: LoadPlan) -> Tally:
    """Run the plan's clients to `stop_at` at the latest."""
    tally = Tally(window_seconds=plan.window_to - plan.window_from)
    pauses = spread_pauses(plan.think_seconds)
    await asyncio.gather(
        *(_client(plan, tally, build_request(plan, index), pauses, index) for index in range(plan.clients))
    )
    tally.cpu_seconds = time.process_time()
    return tally


async def _client(plan: LoadPlan, tally: Tally, request: bytes, pauses: Iterator[float], index: int) -> None:
    loop = asyncio.get_running_loop()
    begin = plan.start_at + plan.spread_seconds * index / max(1, plan.clients)
    await asyncio.sleep(max(0.0, begin - time.monotonic()))
    left = plan.requests_per_client
    while time.monotonic() < plan.window_to:
        ended: asyncio.Future[None] = loop.create_future()

        def on_end(_: Client, ended: asyncio.Future[None] = ended) -> None:
            if not ended.done():
                ended.set_result(None)

        try:
            transport, client = await loop.create_connection(
                lambda on_end=on_end: Client(plan, tally, request, pauses, on_end),  # type: ignore[misc]
                plan.host,
                plan.port,
            )
        except OSError:
            tally.connection_errors += 1
            await asyncio.sleep(plan.backoff_seconds)
            continue
        if plan.requests_per_client:
            client.left = left
        try:
            await asyncio.wait_for(ended, max(0.0, plan.stop_at - time.monotonic()))
        except TimeoutError:
            tally.unfinished += 1
            client.reader = None
            transport.close()
            return
        left = client.left
        finished = not transport.is_closing()
        transport.close()
        if finished:
            return
        await asyncio.sleep(RECONNECT_SECONDS)


def main() -> None:
    plan_path, tally_path = map(Path, sys.argv[1:])
    plan = msgspec.json.decode(plan_path.read_bytes(), type=LoadPlan)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tally = runner.run(drive(plan))
    tally_path.write_bytes(msgspec.json.encode(tally))


if __name__ == "__main__":
    main()

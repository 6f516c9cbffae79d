"""Order and completeness of what writers get, whatever happened on the channel."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.errors import QueueUnavailable
from tidegate.gateway.metrics import GatewayMetrics
from tidegate.gateway.ports import RequestQueue
from tidegate.gateway.stream import (
    MOST_EARLY,
    MOST_UNTAKEN_BYTES,
    TOO_SLOW,
    Delivered,
    Ended,
    Failed,
    OpenCall,
    OpenCalls,
    Signal,
    Waiting,
)
from tidegate.messages.queue import Depth, Place
from tidegate.messages.work import Finish, Generate, Request, Sampling, Segment, TextPrompt, Tokens


def a_request(index: int = 0) -> Request:
    return Request(
        id=f"c.{index}",
        tenant="t",
        model="m",
        revision="r",
        gateway="gw",
        created=0.0,
        deadline=60.0,
        priority=0,
        cost=1,
        work=Generate(TextPrompt("x"), Sampling(seed=1)),
    )


def a_log(length: int, request_id: str = "c.0") -> list[Segment]:
    texts = [chr(ord("a") + position) for position in range(length)]
    return [
        Segment(
            request_id, seq, output=Tokens([seq], text), finish=Finish("stop") if seq == length - 1 else None
        )
        for seq, text in enumerate(texts)
    ]


class Logs:
    """The two calls of `RequestQueue` that the table makes, over logs in memory."""

    def __init__(self, logs: dict[str, list[Segment]], *, failures: int = 0) -> None:
        self.logs = logs
        self.failures = failures
        self.cancelled: list[str] = []
        self.forgotten: list[str] = []

    async def replay(self, request_id: str, from_seq: int = 0) -> list[Segment] | None:
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise QueueUnavailable("away")
        log = self.logs.get(request_id)
        return None if log is None else [segment for segment in log if segment.seq >= from_seq]

    async def cancel(self, request_ids: Sequence[str], reason: str) -> None:
        if self.failures:
            raise QueueUnavailable("away")
        self.cancelled += request_ids

    def forget(self, request_ids: Sequence[str]) -> None:
        self.forgotten += request_ids


def table(logs: Logs) -> OpenCalls:
    return OpenCalls(cast(RequestQueue, logs), GatewayMetrics(), heartbeat_seconds=10)


async def text_of(call: OpenCall) -> str:
    """What a writer gets until the end."""
    text = ""
    while True:
        happening = await call.next()
        assert isinstance(happening, Delivered | Ended), happening
        text += "".join(segment.output.text for _, segment in happening.segments)
        if isinstance(happening, Ended):
            return text


@settings(deadline=None)
@given(data=st.data(), length=st.integers(1, 12))
def test_any_loss_order_and_repetition_gives_the_log_once(data: Any, length: int) -> None:
    log = a_log(length)
    arrived = data.draw(st.lists(st.integers(0, length - 1), max_size=20))
    batches = data.draw(st.lists(st.integers(1, 4), min_size=20, max_size=20))
    losses = data.draw(st.sets(st.integers(0, 20)))

    async def run() -> str:
        calls = table(Logs({"c.0": log}))
        call = calls.open([a_request()], is_streamed=True)
        calls.submitted(call)
        rest = [log[seq] for seq in arrived]
        for step, size in enumerate(batches):
            batch, rest = rest[:size], rest[size:]
            calls.deliver(batch)
            if step in losses:
                calls.lost()
            await asyncio.sleep(0)
        calls.lost()
        text = await text_of(call)
        calls.close(call, "test")
        await calls.shut_down()
        return text

    assert asyncio.run(run()) == "".join(segment.output.text for segment in log)


async def test_a_break_before_the_submit_is_answered_is_made_good_after_it() -> None:
    calls = table(Logs({"c.0": a_log(3)}))
    call = calls.open([a_request()], is_streamed=False)
    calls.lost()
    assert not call.has_begun
    calls.submitted(call)
    assert await text_of(call) == "abc"


async def test_replay_goes_on_until_redis_is_back() -> None:
    calls = table(Logs({"c.0": a_log(3)}, failures=1))
    call = calls.open([a_request()], is_streamed=False)
    calls.submitted(call)
    calls.deliver(a_log(3)[2:])
    assert await text_of(call) == "abc"


async def test_a_log_that_is_gone_fails_the_call() -> None:
    calls = table(Logs({}))
    call = calls.open([a_request()], is_streamed=True)
    calls.submitted(call)
    calls.lost()
    failed = await call.next()
    assert isinstance(failed, Failed) and failed.finish.code == "LogGone"


async def test_closing_cancels_only_what_still_runs() -> None:
    logs = Logs({})
    calls = table(logs)
    call = calls.open([a_request(0), a_request(1)], is_streamed=True)
    calls.deliver(a_log(1, "c.0"))
    calls.close(call, "left")
    await calls.shut_down()
    assert logs.cancelled == ["c.1"]
    assert logs.forgotten == ["c.0", "c.1"]
    assert len(calls) == 0
    calls.deliver(a_log(1, "c.1"))
    assert call.unfinished == 1


async def test_a_refused_call_cancels_nothing() -> None:
    logs = Logs({})
    calls = table(logs)
    calls.close(calls.open([a_request()], is_streamed=True), None)
    await calls.shut_down()
    assert logs.cancelled == []


async def test_a_cancel_that_fails_is_no_disaster() -> None:
    calls = table(Logs({}, failures=9))
    calls.close(calls.open([a_request()], is_streamed=True), "left")
    await calls.shut_down()
    assert len(calls) == 0


async def test_a_plain_answer_wakes_once_a_stream_each_time() -> None:
    calls = table(Logs({}))
    for is_streamed in (False, True):
        call = calls.open([a_request()], is_streamed=is_streamed)
        waiting = asyncio.create_task(call.next())
        await asyncio.sleep(0)
        calls.deliver(a_log(2)[:1])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done() is is_streamed
        calls.deliver(a_log(2)[1:])
        happened = [await waiting]
        if is_streamed:
            happened.append(await call.next())
        log = [(0, segment) for segment in a_log(2)]
        assert happened == ([Delivered(log[:1]), Ended(log[1:])] if is_streamed else [Ended(log)])
        calls.close(call, None)


def a_place(ahead: int) -> Place:
    return Place(ahead, Depth(5, 1, 0.5))


async def test_a_stream_hears_of_its_wait_until_it_has_begun() -> None:
    calls = table(Logs({}))
    call = calls.open([a_request()], is_streamed=True)
    call.end_hold()
    call.put_position(a_place(2))
    assert [await call.next(), await call.next()] == [Signal.HOLD_OVER, Waiting(a_place(2))]
    call.put_position(a_place(2))  # said before
    call.owe_heartbeat()
    assert await call.next() is Signal.HEARTBEAT_DUE
    call.wrote()
    call.put_position(a_place(1))
    call.end_hold()
    call.owe_heartbeat()
    calls.deliver(a_log(3)[:1])
    assert [await call.next(), await call.next()] == [Delivered([(0, a_log(3)[0])]), Signal.HEARTBEAT_DUE]
    call.wrote()
    waiting = asyncio.create_task(call.next())
    await asyncio.sleep(0)
    assert not waiting.done()
    calls.deliver(a_log(3)[1:])
    assert await waiting == Ended([(0, a_log(3)[1]), (0, a_log(3)[2])])
    calls.close(call, None)


async def test_a_plain_answer_hears_of_its_end_alone() -> None:
    calls = table(Logs({}))
    call = calls.open([a_request(0), a_request(1)], is_streamed=False)
    waiting = asyncio.create_task(call.next())
    calls.deliver(a_log(1, "c.0"))
    call.end_hold()
    call.put_position(a_place(1))
    call.owe_heartbeat()
    await asyncio.sleep(0)
    assert not waiting.done()
    call.leave()
    assert await waiting is Signal.DISCONNECTED
    calls.deliver([Segment("c.1", 0, Finish("error", "EngineError"))])
    failed = await call.next()
    assert isinstance(failed, Failed) and failed.finish.code == "EngineError"
    assert [index for index, _ in failed.segments] == [0, 1]
    calls.close(call, None)


async def test_what_comes_while_a_log_is_read_is_put_aside_within_a_bound() -> None:
    log = [Segment("c.0", seq, output=Tokens([seq], "x")) for seq in range(5 * MOST_EARLY)]
    log[-1] = Segment("c.0", log[-1].seq, Finish("stop"), Tokens([1], "y"))
    calls = table(Logs({"c.0": log}))
    call = calls.open([a_request()], is_streamed=False)
    calls.submitted(call)
    calls.deliver(log[1:])
    assert len(call.requests[0].early or ()) == MOST_EARLY
    assert await text_of(call) == "x" * (len(log) - 1) + "y"


async def test_of_too_much_that_nobody_takes_the_largest_part_ends() -> None:
    calls = table(Logs({}))
    opened = [calls.open([a_request(n)], is_streamed=True) for n in range(40)]
    large = "x" * (MOST_UNTAKEN_BYTES // 32)
    for n in range(32):
        calls.deliver([Segment(f"c.{n}", 0, output=Tokens([1], large[: len(large) - 5000]))])
    calls.deliver(
        [Segment("c.32", 0, output=Tokens([1], large)), Segment("c.33", 0, output=Tokens([1], "s"))]
    )
    assert [call.failure for call in opened[:32]] == [None] * 32
    assert (opened[32].failure, opened[33].failure) == (TOO_SLOW, None)
    for call in opened:
        calls.close(call, None)
    again = calls.open([a_request()], is_streamed=True)
    calls.deliver([Segment("c.0", 0, output=Tokens([1], large))])
    assert again.failure is None

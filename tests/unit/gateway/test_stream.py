"""Order and completeness of what writers get, whatever happened on the channel."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waiting import await_until
from tidegate.errors import QueueUnavailable
from tidegate.gateway.metrics import GatewayMetrics
from tidegate.gateway.ports import RequestQueue
from tidegate.gateway.stream import OpenCall, OpenCalls
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

    async def replay(self, request_id: str) -> list[Segment] | None:
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise QueueUnavailable("away")
        return self.logs.get(request_id)

    async def cancel(self, request_ids: Sequence[str], reason: str) -> None:
        if self.failures:
            raise QueueUnavailable("away")
        self.cancelled += request_ids


def table(logs: Logs) -> OpenCalls:
    return OpenCalls(cast(RequestQueue, logs), GatewayMetrics(), heartbeat_seconds=10)


async def text_of(call: OpenCall) -> str:
    await await_until(lambda: call.unfinished == 0)
    return "".join(segment.output.text for _, segment in call.take())


@settings(deadline=None)
@given(data=st.data(), length=st.integers(1, 12))
def test_any_loss_order_and_repetition_gives_the_log_once(data: Any, length: int) -> None:
    log = a_log(length)
    arrived = data.draw(st.lists(st.integers(0, length - 1), max_size=20))
    batches = data.draw(st.lists(st.integers(1, 4), min_size=20, max_size=20))
    losses = data.draw(st.sets(st.integers(0, 20)))

    async def run() -> str:
        calls = table(Logs({"c.0": log}))
        call = calls.open([a_request()], wakes_on_each=True)
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
    call = calls.open([a_request()], wakes_on_each=False)
    calls.lost()
    assert call.pending == []
    calls.submitted(call)
    assert await text_of(call) == "abc"


async def test_replay_goes_on_until_redis_is_back() -> None:
    calls = table(Logs({"c.0": a_log(3)}, failures=1))
    call = calls.open([a_request()], wakes_on_each=False)
    calls.submitted(call)
    calls.deliver(a_log(3)[2:])
    assert await text_of(call) == "abc"


async def test_a_log_that_is_gone_fails_the_call() -> None:
    calls = table(Logs({}))
    call = calls.open([a_request()], wakes_on_each=True)
    calls.submitted(call)
    calls.lost()
    await await_until(lambda: call.failure is not None)
    assert call.failure is not None and call.failure.code == "LogGone"


async def test_closing_cancels_only_what_still_runs() -> None:
    logs = Logs({})
    calls = table(logs)
    call = calls.open([a_request(0), a_request(1)], wakes_on_each=True)
    calls.deliver(a_log(1, "c.0"))
    calls.close(call, "left")
    await calls.shut_down()
    assert logs.cancelled == ["c.1"]
    assert len(calls) == 0
    calls.deliver(a_log(1, "c.1"))
    assert call.unfinished == 1


async def test_a_refused_call_cancels_nothing() -> None:
    logs = Logs({})
    calls = table(logs)
    calls.close(calls.open([a_request()], wakes_on_each=True), None)
    await calls.shut_down()
    assert logs.cancelled == []


async def test_a_cancel_that_fails_is_no_disaster() -> None:
    calls = table(Logs({}, failures=9))
    calls.close(calls.open([a_request()], wakes_on_each=True), "left")
    await calls.shut_down()
    assert len(calls) == 0


async def test_a_plain_answer_wakes_once_a_stream_each_time() -> None:
    calls = table(Logs({}))
    for wakes_on_each in (False, True):
        call = calls.open([a_request()], wakes_on_each=wakes_on_each)
        waiting = asyncio.create_task(call.changed())
        await asyncio.sleep(0)
        calls.deliver(a_log(2)[:1])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done() is wakes_on_each
        calls.deliver(a_log(2)[1:])
        await waiting
        calls.close(call, None)

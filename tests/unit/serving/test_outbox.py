from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import await_until
from tidegate.engines.base import StepOutput
from tidegate.errors import QueueUnavailable
from tidegate.messages.codec import encode_segment
from tidegate.messages.work import NO_TOKENS, Claim, Finish, Segment, Tokens
from tidegate.serving.measure import Measure
from tidegate.serving.outbox import MOST_UNSENT_TOKENS, Held, Outbox


class HeldUpQueue:
    """Takes a batch each time `gate` is opened; fails while `is_away`."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, Segment]]] = []
        self.ends: list[dict[str, str]] = []
        self.calls = 0
        self.gate = asyncio.Semaphore(0)
        self.is_away = False
        self.encodes = False
        self.lost: list[str] = []

    async def emit(self, segments: Sequence[tuple[int, Segment]], ends: Mapping[str, str]) -> list[str]:
        self.calls += 1
        if self.is_away:
            raise QueueUnavailable("away")
        await self.gate.acquire()
        if self.encodes:
            for _, segment in segments:
                encode_segment(segment)
        self.batches.append(list(segments))
        self.ends.append(dict(ends))
        return self.lost

    async def start(self, wake: Any, cancelled: Any) -> None: ...
    async def claim(self, most: int) -> list[Claim]:
        return []

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[str]:
        return []

    async def hand_back(self, leases: Sequence[tuple[str, int]], reason: str) -> None: ...
    async def fault(self, leases: Sequence[tuple[str, int]], reason: str) -> None: ...
    async def close(self) -> None: ...


class Bench:
    def __init__(self) -> None:
        self.queue = HeldUpQueue()
        self.written: list[tuple[list[tuple[int, Segment]], list[str]]] = []
        self.pauses: list[bool] = []
        self.outbox = Outbox(self.queue, self.note, self.pauses.append)
        self.on_written: Callable[[], None] | None = None

    def note(self, batch: list[tuple[int, Segment]], lost: list[str]) -> None:
        self.written.append((batch, lost))
        if self.on_written is not None:
            self.on_written()

    def step(self, *outputs: tuple[Held, StepOutput]) -> None:
        for held, output in outputs:
            self.outbox.put(held, output)
        self.outbox.send()

    def open(self, times: int = 1) -> None:
        for _ in range(times):
            self.queue.gate.release()


def output(token: int, finish: Finish | None = None, tokens: int = 1) -> StepOutput:
    return StepOutput("a", Tokens([token] * tokens, f"{token} "), 3, finish)


def held(request_id: str = "a", seq: int = 0) -> Held:
    return Held(request_id, attempt=2, ticket=1, seq=seq, measure=Measure(0.0, ()))


async def test_one_step_leaves_as_one_batch_with_numbers_that_continue() -> None:
    bench, first, second = Bench(), held("a", seq=4), held("b", seq=9)
    bench.step((first, output(1)), (second, output(2)))
    bench.open()
    assert await bench.outbox.flush(20.0)
    ((batch, lost),) = bench.written
    assert [(attempt, segment.request_id, segment.seq) for attempt, segment in batch] == [
        (2, "a", 4),
        (2, "b", 9),
    ]
    assert lost == []


async def test_a_segment_that_cannot_be_encoded_ends_its_request_and_holds_up_no_other() -> None:
    bench, bad, good = Bench(), held("bad", seq=4), held("good", seq=9)
    bench.queue.encodes = True
    bench.step((bad, StepOutput("bad", Tokens([1], "\ud800"), 3, None)), (good, output(2)))
    bench.open(2)
    assert await bench.outbox.flush(20.0)

    ((_, end), (_, other)) = bench.queue.batches[-1]
    assert (end.request_id, end.seq, end.output) == ("bad", 4, NO_TOKENS)
    assert end.finish is not None
    assert (end.finish.reason, end.finish.code) == ("error", "EngineError")
    assert (other.seq, other.output.text) == (9, "2 ")
    assert bench.queue.ends[-1] == {"bad": "error"}
    ((_, lost),) = bench.written
    assert lost == ["bad"]  # so the engine stops with it


async def test_first_tokens_leave_ahead_of_the_rest_of_a_step() -> None:
    bench, old, new = Bench(), held("old", seq=4), held("new")
    bench.queue.lost = ["old"]
    bench.step((old, output(1)), (new, output(2)))
    bench.open(2)
    assert await bench.outbox.flush(20.0)
    assert [[segment.request_id for _, segment in batch] for batch in bench.queue.batches] == [
        ["new"],
        ["old"],
    ]
    ((batch, lost),) = bench.written
    assert [segment.prompt_tokens for _, segment in batch] == [0, 3]
    assert set(lost) == {"old"}


async def test_what_comes_while_a_batch_is_in_flight_is_merged_into_the_next() -> None:
    bench, request = Bench(), held()
    bench.step((request, output(1)))
    await await_until(lambda: bench.queue.calls == 1)
    bench.step((request, output(2)))
    bench.step((request, output(3, Finish("stop"))))
    bench.open(2)
    assert await bench.outbox.flush(20.0)
    segments = [segment for batch in bench.queue.batches for _, segment in batch]
    assert [(segment.seq, segment.output.token_ids, segment.output.text) for segment in segments] == [
        (0, [1], "1 "),
        (1, [2, 3], "2 3 "),
    ]
    assert segments[1].finish == Finish("stop")


async def test_an_outage_repeats_the_same_batch() -> None:
    bench, request = Bench(), held()
    bench.queue.is_away = True
    bench.step((request, output(1)))
    await await_until(lambda: bench.queue.calls == 1)
    bench.step((request, output(2)))
    bench.queue.is_away = False
    bench.outbox.retry_now()
    bench.open(2)
    assert await bench.outbox.flush(20.0)
    assert [[segment.output.token_ids for _, segment in batch] for batch in bench.queue.batches] == [
        [[1]],
        [[2]],
    ]


async def test_what_an_end_counts_as_leaves_with_its_segment_and_no_other() -> None:
    bench, request, other = Bench(), held("a"), held("b", seq=1)
    bench.step((other, output(1)))
    await await_until(lambda: bench.queue.calls == 1)
    bench.outbox.put(request, output(2))
    bench.outbox.put(request, output(3, Finish("stop")), "ok t4")
    bench.outbox.put(other, output(4, Finish("error")), "error")
    bench.outbox.drop("b")
    bench.open(2)
    assert await bench.outbox.flush(20.0)
    assert bench.queue.ends == [{}, {"a": "ok t4"}]


async def test_stepping_is_paused_when_too_much_gathers_and_resumed() -> None:
    bench, request = Bench(), held()
    bench.step((request, output(1)))
    await await_until(lambda: bench.queue.calls == 1)
    bench.step((request, output(2, tokens=MOST_UNSENT_TOKENS + 1)))
    assert bench.pauses == [True]
    bench.open(2)
    assert await bench.outbox.flush(20.0)
    assert bench.pauses == [True, False]


async def test_stepping_resumes_where_all_that_gathered_is_given_up() -> None:
    """As after a lease that ran out while Redis was away."""
    bench, request, other = Bench(), held("a"), held("b")
    bench.step((other, output(1)))
    await await_until(lambda: bench.queue.calls == 1)
    bench.step((request, output(2, tokens=MOST_UNSENT_TOKENS + 1)))
    bench.queue.lost = ["b"]
    bench.on_written = lambda: bench.outbox.drop("a")
    bench.open(1)
    assert await bench.outbox.flush(20.0)
    assert bench.pauses == [True, False]
    bench.step((other, output(3, tokens=MOST_UNSENT_TOKENS // 2)))  # what was dropped no longer counts
    await await_until(lambda: bench.queue.calls == 2)
    bench.step((request, output(4, tokens=MOST_UNSENT_TOKENS)))
    assert bench.pauses == [True, False]
    await bench.outbox.close()


async def test_what_is_dropped_does_not_leave() -> None:
    bench, request, other = Bench(), held("a"), held("b")
    bench.step((other, output(1)))
    await await_until(lambda: bench.queue.calls == 1)
    bench.step((request, output(2)))
    bench.outbox.drop("a")
    bench.open(2)
    assert await bench.outbox.flush(20.0)
    assert [segment.request_id for batch in bench.queue.batches for _, segment in batch] == ["b"]


async def test_flush_gives_up_and_close_ends_the_sender() -> None:
    bench = Bench()
    bench.step((held(), output(1)))
    assert not await bench.outbox.flush(0.01)
    await bench.outbox.close()
    assert bench.written == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_however_it_is_held_up_streams_stay_whole(events: list[tuple[str, bool]]) -> None:
    """Whatever mixture of outputs and round trips: gapless numbers and all tokens in order."""

    async def run() -> None:
        bench = Bench()
        requests = {name: held(name) for name in "abc"}
        sent: dict[str, list[int]] = {name: [] for name in "abc"}
        for number, (name, is_through) in enumerate(events):
            bench.step((requests[name], StepOutput(name, Tokens([number], ""), 0, None)))
            sent[name].append(number)
            if is_through:
                bench.open()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        bench.open(2 * len(events) + 2)  # a batch may leave as two writes
        assert await bench.outbox.flush(20.0)
        segments = [segment for batch in bench.queue.batches for _, segment in batch]
        for name, tokens in sent.items():
            mine = [segment for segment in segments if segment.request_id == name]
            assert [segment.seq for segment in mine] == list(range(len(mine)))
            assert [token for segment in mine for token in segment.output.token_ids] == tokens

    asyncio.run(run())

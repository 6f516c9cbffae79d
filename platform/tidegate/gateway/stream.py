"""The calls that are open in this gateway: segments in, order and completeness kept, writers woken.

Everything runs on the one event loop, so no step of a plain function is interrupted. Who runs:

- the store's listener calls `OpenCalls.deliver` with each published batch and `OpenCalls.lost` after each
  reconnect;
- per HTTP call one writer (its ASGI task) waits in `OpenCall.next` and acts on what it says;
- per HTTP call one task waits for the client to leave;
- one watch per gateway, only while streams are open whose status line is out, wakes those that owe their
  client a heartbeat and asks once a second where those without a first token stand in the queue;
- one replay per request that missed something.

The published batches are the fast path, the request's log is the truth. At all times `next_seq` is the
number of segments handed to the writer, in order and without a gap. A segment ahead of it is put aside and
the log is read; what is read again and was already handed over is dropped by its number. A request is in
the table from before its submit, because its first segment may come before the submit's answer. A call that
is kept has a channel of its own, which each of its readers hears for itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import msgspec

from tidegate.errors import QueueUnavailable
from tidegate.gateway.metrics import GatewayMetrics
from tidegate.gateway.ports import RequestQueue
from tidegate.messages.kept import KeptCall
from tidegate.messages.queue import Place
from tidegate.messages.work import Finish, Request, Scores, Segment, Vectors

logger = logging.getLogger("tidegate.gateway.stream")

WATCH_SECONDS = 1.0
REPLAY_RETRY_SECONDS = 0.25
REPLAYS_AT_ONCE = 4
GOOD_ENDS = ("stop", "length")
MOST_EARLY = 64  # segments put aside for a request while its log is read, which has them all
# Of memory, for what a call's writer has not taken yet, and for that of all calls together.
MOST_PENDING_BYTES = 16 * 1024 * 1024
MOST_ANSWER_BYTES = 128 * 1024 * 1024  # of an answer that is not streamed
MOST_UNTAKEN_BYTES = 256 * 1024 * 1024
_SEGMENT_BYTES, _LOGPROB_BYTES = 440, 215  # measured; a token and each of its alternatives
_NUMBER_BYTES = 32  # of a list
_CALL_BYTES = 300  # a part of a call, beside its arguments
TOO_SLOW = Finish("error", "ReaderTooSlow", "The client reads its stream slower than it is written.")
TOO_LARGE = Finish("error", "AnswerTooLarge", "The answer is too large to be sent whole: ask for a stream.")
LOG_GONE = Finish("error", "LogGone", "the request's log is gone")
# What the gateway finds of one reader. The answer of a call that is kept may be whole all the same.
READERS_FAULTS = (TOO_SLOW, TOO_LARGE, LOG_GONE)


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One sequence of a call."""

    call: OpenCall
    id: str
    index: int
    next_seq: int = 0
    early: dict[int, Segment] | None = None
    ahead: int = -1  # the last segment that was published before its turn
    is_replaying: bool = False
    finish: Finish | None = None


class Delivered(msgspec.Struct, frozen=True, gc=False):
    """Segments came, and more will: (choice index, segment), in order per choice."""

    segments: list[tuple[int, Segment]]


class Ended(msgspec.Struct, frozen=True, gc=False):
    """Every choice has ended; `segments` are the last ones."""

    segments: list[tuple[int, Segment]]


class Failed(msgspec.Struct, frozen=True, gc=False):
    """A choice ended badly. `segments` came before or beside that."""

    segments: list[tuple[int, Segment]]
    finish: Finish


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """The call has another position in the queue than before."""

    position: Place


class Signal(Enum):
    HOLD_OVER = "nothing came in the time for which the status line is held"
    HEARTBEAT_DUE = "nothing was sent for too long"
    DISCONNECTED = "the client closed the connection"


Happening = Delivered | Ended | Failed | Waiting | Signal


@dataclass(slots=True)
class Untaken:
    """What the writers of all open calls have not taken yet."""

    size_bytes: int = 0
    calls: int = 0

    def is_too_much(self, own_bytes: int) -> bool:
        """True for a call that holds more than its equal part of too much."""
        return self.size_bytes > MOST_UNTAKEN_BYTES and own_bytes > MOST_UNTAKEN_BYTES // self.calls


@dataclass(slots=True, weakref_slot=True, eq=False)
class OpenCall:
    """One HTTP call: its sequences and what its writer has not taken yet."""

    model: str
    revision: str
    unfinished: int
    is_streamed: bool  # a plain answer's writer waits for the end
    untaken: Untaken
    is_kept: bool = False  # it has a channel of its own, and its requests belong to no gateway
    most_pending_bytes: int = MOST_PENDING_BYTES
    requests: list[OpenRequest] = field(default_factory=list)
    failure: Finish | None = None
    has_begun: bool = False  # a first segment came
    has_left: bool = False
    is_submitted: bool = False
    is_replay_owed: bool = False  # the channel broke before the submit was answered
    is_hold_over: bool = False
    is_heartbeat_due: bool = False
    last_sent: float = 0.0  # loop time
    _pending: list[tuple[int, Segment]] = field(default_factory=list)
    _pending_bytes: int = 0
    _position: Place | None = None
    _position_shown: Place | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _waiter: asyncio.Future[None] | None = None

    async def next(self) -> Happening:
        """Wait until something happens that the writer has to act on, and say what. A stream hears of
        everything, a plain answer of its end alone. What has come is looked at before each wait, so nothing
        that came meanwhile is missed."""
        while True:
            if self.failure is not None:
                return Failed(self._take(), self.failure)
            if self.has_left:
                return Signal.DISCONNECTED
            if not self.unfinished:
                return Ended(self._take())
            if self.is_streamed:
                if self._pending:
                    return Delivered(self._take())
                if (happening := self._waiting()) is not None:
                    return happening
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def accept(self, request: OpenRequest, segment: Segment) -> None:
        """Take the next segment in order of one of the sequences."""
        if request.finish is not None:
            return
        request.next_seq = segment.seq + 1
        if self.failure is TOO_SLOW or self.failure is TOO_LARGE:
            return
        self._pending.append((request.index, segment))
        output = segment.output
        size_bytes = _SEGMENT_BYTES + len(output.text) + len(output.reasoning)
        if output.calls:
            size_bytes += sum([_CALL_BYTES + len(call.arguments) for call in output.calls])
        for entries in (output.logprobs, output.prompt_logprobs):
            if entries:
                size_bytes += _LOGPROB_BYTES * sum([1 + len(token.top) for token in entries])
        if segment.result is not None:
            size_bytes += result_bytes(segment.result)
        self._pending_bytes += size_bytes
        self.untaken.size_bytes += size_bytes
        if self._pending_bytes > self.most_pending_bytes or self.untaken.is_too_much(self._pending_bytes):
            self.failure = self.failure or (TOO_SLOW if self.is_streamed else TOO_LARGE)
            self._take()
            self._wake()
            return
        self.has_begun = True
        finish = segment.finish
        if finish is not None:
            request.finish = finish
            self.unfinished -= 1
            if finish.reason not in GOOD_ENDS:
                self.failure = self.failure or finish
        if self.is_streamed or self.unfinished == 0 or self.failure is not None:
            self._wake()

    def end_hold(self) -> None:
        self.is_hold_over = True
        self._wake()

    def owe_heartbeat(self) -> None:
        self.is_heartbeat_due = True
        self._wake()

    def put_position(self, position: Place) -> None:
        self._position = position
        self._wake()

    def leave(self) -> None:
        self.has_left = True
        self._wake()

    def wrote(self) -> None:
        """Something went to the client."""
        self.last_sent = self._loop.time()
        self.is_heartbeat_due = False

    def drop(self) -> None:
        """Forget what nobody will take."""
        self._take()

    def finishes(self) -> list[Finish | None]:
        return [request.finish for request in self.requests]

    def _waiting(self) -> Waiting | Signal | None:
        if not self.has_begun and self.is_hold_over:
            self.is_hold_over = False
            return Signal.HOLD_OVER
        position = self._position
        if not self.has_begun and position is not None and position != self._position_shown:
            self._position_shown = position
            return Waiting(position)
        return Signal.HEARTBEAT_DUE if self.is_heartbeat_due else None

    def _take(self) -> list[tuple[int, Segment]]:
        pending = self._pending
        self.untaken.size_bytes -= self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        return pending

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def result_bytes(result: Vectors | Scores) -> int:
    """About what a result takes of memory."""
    if isinstance(result, Vectors):
        return len(result.values)
    return sum([_NUMBER_BYTES * len(row) for row in result.rows])


class OpenCalls:
    """The table of open calls of this gateway."""

    def __init__(self, queue: RequestQueue, metrics: GatewayMetrics, *, heartbeat_seconds: float) -> None:
        self._queue = queue
        self._metrics = metrics
        self._heartbeat_seconds = heartbeat_seconds
        self._requests: dict[str, OpenRequest] = {}
        self._kept: set[OpenCall] = set()
        self._untaken = Untaken()
        self._streaming: set[OpenCall] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._replay_slots = asyncio.Semaphore(REPLAYS_AT_ONCE)

    def __len__(self) -> int:
        return len(self._requests) + sum([len(call.requests) for call in self._kept])

    def open(self, requests: Sequence[Request], *, is_streamed: bool, is_kept: bool = False) -> OpenCall:
        """Begin to expect the segments of `requests`. Every `open` is paired with a `close`."""
        first, ids = requests[0], [request.id for request in requests]
        call = self._open(first.model, first.revision, ids, is_streamed=is_streamed, is_kept=is_kept)
        if is_kept:
            self._kept.add(call)
        else:
            self._requests.update((request.id, request) for request in call.requests)
        return call

    def reopen(self, kept: KeptCall) -> OpenCall:
        """Begin to expect the segments of a call that was submitted before, those that it has too. Is paired
        with a `close` as well."""
        ids = [f"{kept.id}.{index}" for index in range(kept.sequences)]
        call = self._open(kept.model, kept.revision, ids, is_streamed=True, is_kept=True)
        call.most_pending_bytes = MOST_ANSWER_BYTES  # its log comes at once
        call.is_replay_owed = True
        self._kept.add(call)
        return call

    def _open(
        self, model: str, revision: str, ids: Sequence[str], *, is_streamed: bool, is_kept: bool
    ) -> OpenCall:
        call = OpenCall(model, revision, len(ids), is_streamed, self._untaken, is_kept)
        if not is_streamed:
            call.most_pending_bytes = MOST_ANSWER_BYTES
        self._untaken.calls += 1
        call.requests = [OpenRequest(call, request_id, index) for index, request_id in enumerate(ids)]
        return call

    def submitted(self, call: OpenCall) -> None:
        """The queue has accepted the call."""
        call.is_submitted = True
        if call.is_replay_owed:
            for request in call.requests:
                self._start_replay(request)

    def close(self, call: OpenCall, cancel_reason: str | None) -> None:
        """Forget a call and, where a reason is given, cancel what of it still runs."""
        self._streaming.discard(call)
        self._kept.discard(call)
        for request in () if call.is_kept else call.requests:
            self._requests.pop(request.id, None)
        if call.unfinished and cancel_reason is not None:
            running = [request.id for request in call.requests if request.finish is None]
            self._spawn(self._cancel(running, cancel_reason, is_kept=call.is_kept))
        if not call.is_kept:
            self._queue.forget([request.id for request in call.requests if request.finish is not None])
        # The two point to each other, and a whole answer hangs on them: it goes now, without the collector.
        call.requests = []
        call.drop()
        self._untaken.calls -= 1

    def _stop_running(self, call: OpenCall) -> None:
        """Of a call that is kept, which may be read again, nothing is stopped."""
        running = [request.id for request in call.requests if self._requests.pop(request.id, None)]
        if running:
            self._spawn(self._cancel(running, TOO_SLOW.message))

    def stream_opened(self, call: OpenCall) -> None:
        """The call's status line is out: from now on it is told of heartbeats and queue positions."""
        self._streaming.add(call)
        if self._watcher is None or self._watcher.done():
            self._watcher = self._spawn(self._watch_silence())

    def deliver(self, segments: Iterable[Segment]) -> None:
        self._deliver(self._requests, segments)

    def deliver_to(self, call: OpenCall) -> Callable[[Iterable[Segment]], None]:
        """What hears the channel of a kept call for this reader of it."""
        return partial(self._deliver, {request.id: request for request in call.requests})

    def _deliver(self, requests: Mapping[str, OpenRequest], segments: Iterable[Segment]) -> None:
        count = 0
        for segment in segments:
            count += 1
            request = requests.get(segment.request_id)
            if request is None:
                continue
            if segment.seq == request.next_seq and request.early is None:
                request.call.accept(request, segment)
                if request.call.failure is TOO_SLOW:
                    self._stop_running(request.call)  # its writer is stuck in the socket and cannot
            elif segment.seq >= request.next_seq:
                self._set_aside(request, segment)
        self._metrics.segments.inc(count)

    def lost(self) -> None:
        """Read every open request's log: whatever was published in the last moments may be missing."""
        kept = [request for call in self._kept for request in call.requests]
        for request in [*self._requests.values(), *kept]:
            if request.call.is_submitted:
                self._start_replay(request)
            else:
                request.call.is_replay_owed = True

    async def shut_down(self) -> None:
        """Wait for cancellations under way; stop the watch and replays."""
        if self._watcher is not None:
            self._watcher.cancel()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _set_aside(self, request: OpenRequest, segment: Segment) -> None:
        if request.early is None:
            request.early = {}
        request.ahead = max(request.ahead, segment.seq)
        if len(request.early) < MOST_EARLY:
            request.early[segment.seq] = segment
        self._start_replay(request)

    def _start_replay(self, request: OpenRequest) -> None:
        if request.is_replaying or request.finish is not None:
            return
        request.is_replaying = True
        if request.early is None:
            request.early = {}  # what is published while the log is read waits its turn
        self._metrics.replays.inc()
        self._spawn(self._replay(request))

    async def _replay(self, request: OpenRequest) -> None:
        async with self._replay_slots:
            while request.id in self._requests or request.call in self._kept:
                try:
                    log = await self._queue.replay(request.id, request.next_seq)
                except QueueUnavailable:
                    # The store reconnects by itself; the stream waits meanwhile.
                    await asyncio.sleep(REPLAY_RETRY_SECONDS)
                    continue
                if self._caught_up(request, log):
                    break
        request.is_replaying = False

    def _caught_up(self, request: OpenRequest, log: list[Segment] | None) -> bool:
        """Hand over the log and what was put aside. False where a gap is left: the log is older than the
        batch that showed it, so it is read again."""
        if log is None:
            request.early = None
            request.call.accept(request, Segment(request.id, request.next_seq, LOG_GONE))
            return True
        early = request.early or {}
        early.update((segment.seq, segment) for segment in log)
        while (segment := early.pop(request.next_seq, None)) is not None:
            request.call.accept(request, segment)
        has_gap = request.ahead >= request.next_seq and request.finish is None
        request.early = early if has_gap else None
        return not has_gap

    async def _cancel(self, request_ids: Sequence[str], reason: str, *, is_kept: bool = False) -> None:
        try:
            await self._queue.cancel(request_ids, reason)
        except QueueUnavailable as error:
            # The requests end by their own limits; nobody reads their results.
            logger.warning("could not cancel %d requests: %s", len(request_ids), error.message)
            return
        if not is_kept:
            self._queue.forget(request_ids)

    async def _watch_silence(self) -> None:
        loop = asyncio.get_running_loop()
        interval = min(WATCH_SECONDS, self._heartbeat_seconds)
        while self._streaming:
            await asyncio.sleep(interval)
            silent_since = loop.time() - self._heartbeat_seconds
            for call in self._streaming:
                if call.last_sent <= silent_since:
                    call.owe_heartbeat()
            await self._ask_positions([call for call in self._streaming if not call.has_begun])

    async def _ask_positions(self, calls: list[OpenCall]) -> None:
        if not calls:
            return
        try:
            positions = await self._queue.places(
                [(call.requests[0].id, call.model, call.revision) for call in calls]
            )
        except QueueUnavailable:
            return  # positions are a courtesy; heartbeats go on
        for call, position in zip(calls, positions, strict=True):
            call.put_position(position)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

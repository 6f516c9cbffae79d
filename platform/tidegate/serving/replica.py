"""A replica pulls requests, runs them through its engine and writes out what comes.

Who runs where. The engine has a thread of its own (`engine_thread`); everything here runs on the event loop:

    wake ──> claim ──> prepare ──hand_over──> engine thread ──Delivery──> outbox ──> emit (one write per step)
                          ^ cancel                  ^ abort                  │
                          └─ cancelled, lease lost ─┘          lost ids <────┘

At most one claim, one emit, one renewal and one beat are in flight. Each request is prepared by a task of
its own (`Engine.prepare`: its prompt becomes tokens, in a process beside), so a slow one holds up nobody. A
claim is made when there is room and the queue may hold something: after a wake (the store repeats one that
was lost) and while claims come back full. Leases are renewed by the tick, so a long step does not cost them.
No timer lies on the way of a request: wake, claim, prepare, add, step and emit follow each other directly.

What may interleave. A request can be cancelled, lost to another replica or claimed anew by this one at any
await, also while its output is on the way. `_held` is the truth: output for an id that is not there is
dropped, and so is output older than the hand-over of the present holder (`EngineThread`'s tickets).

What always holds.
- Late binding: requests claimed and not finished, those that are still being prepared included, never exceed
  the engine's slots, but for those whose slot frees with the very next token (`slots`).
- A request is in `_held` exactly from its claim to the acknowledged write of its finish, or until it is
  given up (cancelled, lease lost, handed back). Everything in `_held` is renewed.
- `Held.preparing` is set exactly until the request is handed over or refused; who gives a request up cancels
  the one or aborts the other (`_stop`).
- What the engine gives back for want of room goes back to the queue, with what of it is written. What is not
  is forgotten: who goes on makes the same tokens. It is held until the queue has it.
- After a failure (crash, hang) nothing is claimed or written. The leases of what the engine had go back as
  faults in one call. What it never saw (in preparation, or in a claim that was in flight) is merely handed
  back, so nobody takes it for the poison. The registry gets the reason, and `ended` tells the owner, who ends
  the process. A new process is the only state that is surely clean, and Serve starts it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from tidegate.engines.base import Engine, EngineLoadError, HasMetrics, LoadReport, Prepared, StepOutput
from tidegate.errors import QueueUnavailable
from tidegate.messages.engine_metrics import pack
from tidegate.messages.registry import ReplicaStats, RevisionReport
from tidegate.messages.work import NO_TOKENS, Claim, Finish, Segment
from tidegate.replica_args import ReplicaArgs
from tidegate.serving import reports
from tidegate.serving.engine_thread import Crash, Delivery, EngineThread, refused_by_raising
from tidegate.serving.measure import Measure
from tidegate.serving.outbox import Held, Outbox
from tidegate.serving.ports import LeaseQueue, ReplicaRegistry
from tidegate.serving.probing import Probing
from tidegate.serving.slots import Slots, tokens_left
from tidegate.tasks import end_tasks

log = logging.getLogger(__name__)

ANSWERED = Finish("stop")  # of what needed no step
LAST_WORDS_SECONDS = 3.0  # what a failed replica may spend on telling so
RETRY_SECONDS = 0.5
METRICS_BEATS = 5  # between two looks at the engine's own metrics


class ReplicaLoop:
    """Serves from `start()` until `drain()`, or until `ended` is done (with the failure)."""

    def __init__(
        self,
        engine: Engine,
        queue: LeaseQueue,
        registry: ReplicaRegistry,
        args: ReplicaArgs,
        replica_id: str,
    ) -> None:
        self._replica_id = replica_id
        self._model, self._revision = args.model, args.revision
        self._times = args.times
        self.failure: Crash | None = None
        self.ended: asyncio.Future[Crash] = asyncio.get_running_loop().create_future()
        self.tokens_total = 0
        self._engine = engine
        self._queue = queue
        self._registry = registry
        self._thread = EngineThread(engine, self._delivered, self._failed)
        self._outbox = Outbox(queue, self._written, self._thread.pause)
        self._report: RevisionReport | None = None
        self._probes = args.probes
        self._probing: Probing | None = None  # until they are answered
        self._started = time.time()
        self._slots = Slots(0, 0)  # until the engine is loaded

        self._held: dict[str, Held] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._idle_since = self._started

        self._can_claim = False
        self._may_wait = False  # the queue may hold a request for us
        self._claiming: asyncio.Task[None] | None = None
        self._cancelled_early: set[str] = set()  # cancelled while a claim that may bring them is in flight
        self._ticking: asyncio.Task[None] | None = None
        self._side_tasks: dict[str, asyncio.Task[None]] = {}
        self._last_words: asyncio.Task[None] | None = None
        self._metrics = b""  # of the engine's own, for the next beat
        self._beaten = (time.monotonic(), 0)  # when, and tokens_total then

    async def start(self, notes: Sequence[str] = (), *, process_seconds: float = 0.0) -> LoadReport:
        """Load the engine, report what came of it and `notes`, begin to serve. Raises `EngineLoadError`.
        `process_seconds` is what the process took to get here, for the estimate of the next waking."""
        begun = time.monotonic()
        try:
            loaded = await self._thread.start()
            await self._probe()
        except Exception as error:
            failure = reports.load_failure(error)
            log.error("model did not load: %s: %s", failure.reason, failure.message)
            report = reports.not_loaded(self._model, self._revision, failure, time.time())
            await _persist(self._registry.report, report, patience_seconds=30.0)
            await self._thread.close(patience_seconds=5.0)  # it runs where a probe failed
            raise failure from error
        self._slots = Slots(loaded.slots, self._thread.free_slots)
        seconds = time.monotonic() - begun
        report = reports.proof(self._model, self._revision, loaded, seconds, notes, time.time())
        self._report = msgspec.structs.replace(report, process_seconds=round(process_seconds, 3))
        await _persist(self._registry.report, self._report)
        self._can_claim = True
        await _persist(self._queue.start, self._wake, self._cancelled)
        self._ticking = asyncio.get_running_loop().create_task(self._tick_forever())
        log.info("replica %s serves with %d slots", self._replica_id, loaded.slots)
        return loaded

    async def _probe(self) -> None:
        """Ask what its revision must be able to answer. Raises `EngineLoadError` (ProbeFailed)."""
        if not self._probes:
            return
        self._probing = Probing(self._engine, self._thread.hand_over)
        asking = asyncio.ensure_future(
            self._probing.run(self._probes, len(self._probes) * self._times.step_timeout_seconds)
        )
        either: set[asyncio.Future[Any]] = {asking, self.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self._probing = None
        if self.failure is not None and not asking.done():
            asking.cancel()
            raise EngineLoadError("ProbeFailed", f"The engine broke at a probe: {self.failure.message}")
        await asking

    def trouble(self) -> str | None:
        """Return None while all is well, or a sentence for Serve's health check."""
        if self.failure is not None:
            return f"{self.failure.reason}: {self.failure.message}"
        return self._engine.health()

    async def drain(self) -> None:
        """Claim no more, let what runs finish within `drain_seconds`, hand back the rest, and close."""
        self._can_claim = False
        if self._claiming is not None:
            await asyncio.wait({self._claiming})
        if self.failure is None and self._held:
            log.info("draining: %d requests run", len(self._held))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._times.drain_seconds)
        if self.failure is None:
            await self._hand_back_all()
        elif self._last_words is not None:
            await asyncio.wait({self._last_words})
        await self._close()

    # -- claiming ---------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._may_wait = True
        self._outbox.retry_now()
        self._claim_soon()

    def _claim_soon(self) -> None:
        if self._claiming is None and self._may_wait and self._can_claim and self._slots.room() > 0:
            self._claiming = asyncio.get_running_loop().create_task(self._claim())

    async def _claim(self) -> None:
        try:
            while self._may_wait and self._can_claim and (room := self._slots.room()) > 0:
                self._may_wait = False  # a wake during the call sets it again
                claims = await self._queue.claim(room)
                if self.failure is not None:
                    leases = [(claim.request.id, claim.attempt) for claim in claims]
                    await self._queue.hand_back(leases, self.failure.reason)
                    return
                if len(claims) >= room:
                    self._may_wait = True
                for claim in claims:
                    self._take(claim)
                self._cancelled_early.clear()
        except QueueUnavailable as error:
            self._may_wait = True
            log.warning("cannot claim: %s", error.message)
        except Exception:
            self._may_wait = True
            log.exception("claim failed")
        finally:
            self._claiming = None

    def _take(self, claim: Claim) -> None:
        request = claim.request
        if request.id in self._held:  # lost through an outage and claimed anew by ourselves
            self._give_up(request.id)
        if request.id in self._cancelled_early:
            return
        seq = claim.log[-1].seq + 1 if claim.log else 0
        held = Held(request.id, claim.attempt, seq, Measure(request.created, claim.log))
        held.preparing = asyncio.get_running_loop().create_task(self._prepare(held, claim))
        self._held[request.id] = held
        self._slots.begin()
        self._idle.clear()

    async def _prepare(self, held: Held, claim: Claim) -> None:
        """Make a claimed request ready and hand it over. Who gives it up meanwhile cancels this."""
        try:
            prepared = await self._engine.prepare(claim.request)
        except Exception as error:
            log.exception("engine could not prepare request %s", held.id)
            prepared = refused_by_raising(error)
        if self.failure is not None:
            return
        held.preparing = None
        self._slots.prepared()
        if not isinstance(prepared, Prepared):
            held.is_finished = True
            if isinstance(prepared, Finish):
                output, finish, ends = NO_TOKENS, prepared, held.measure.ends(prepared)
            else:  # the tokenizer's answer says nothing about the revision
                output, finish, ends = prepared, ANSWERED, ""
            self._outbox.put(held, StepOutput(held.id, output, finish.prompt_tokens, finish), ends)
            self._outbox.send()
            self._claim_soon()
            return
        held.ticket = self._thread.hand_over(prepared, claim.log)
        self._slots.hand_over(held.ticket, tokens_left(claim))

    # -- what the engine produced -----------------------------------------------------------------

    def _delivered(self, delivery: Delivery) -> None:
        if self.failure is not None:
            return
        if self._probing is not None:
            self._probing.take(delivery.outputs)
            return
        slots, now = self._slots, time.time()
        slots.deliver(delivery.ticket, delivery.free_slots)
        for output in delivery.outputs:
            held = self._held.get(output.request_id)
            if held is None or held.is_finished or not 0 < held.ticket <= delivery.ticket:
                continue  # of an earlier life of this id, or after its end
            tokens, text, ends = len(output.output.token_ids), output.output.any_text, ""
            if output.is_given_back:
                self._return(held)
                continue
            if tokens or text or output.result is not None:
                held.measure.add(tokens, text, now, is_whole=output.result is not None)
            if output.finish is not None:
                ends = held.measure.ends(output.finish)
                held.is_finished = True
                slots.end(held.ticket)
            elif tokens:
                slots.generate(held.ticket, tokens)
            elif not text:
                continue  # a step of its prefill: nothing to tell yet
            self.tokens_total += tokens
            self._outbox.put(held, output, ends)
        if delivery.outputs:
            self._outbox.send()
        self._claim_soon()

    def _written(self, batch: list[tuple[int, Segment]], lost: list[str]) -> None:
        """Take up that a batch is in Redis: finished requests are over, lost ones are not ours any more."""
        for attempt, segment in batch:
            if segment.finish is not None:
                held = self._held.get(segment.request_id)
                if held is not None and held.attempt == attempt:
                    self._forget(held)
        self._lose({segment.request_id: attempt for attempt, segment in batch}, lost)

    def _return(self, held: Held) -> None:
        held.is_finished = held.is_returned = True
        self._slots.end(held.ticket)
        self._outbox.drop(held.id)
        self._aside("return", self._return_all)

    async def _return_all(self) -> None:
        while returned := [held for held in self._held.values() if held.is_returned]:
            try:
                await self._queue.hand_back([(held.id, held.attempt) for held in returned], "NoRoom")
            except QueueUnavailable as error:
                log.warning("cannot hand back what has no room: %s", error.message)
                return  # the tick tries again
            for held in returned:
                if self._held.get(held.id) is held:  # not claimed anew meanwhile
                    self._forget(held)

    # -- losing requests --------------------------------------------------------------------------

    def _cancelled(self, request_id: str) -> None:
        if request_id in self._held:
            self._give_up(request_id)
        elif self._claiming is not None:
            self._cancelled_early.add(request_id)

    def _lose(self, attempts: Mapping[str, int], lost: Sequence[str]) -> None:
        """Give up what the queue says is no longer ours, as of the attempts that it was asked for."""
        for request_id in lost:
            held = self._held.get(request_id)
            if held is not None and held.attempt == attempts[request_id]:
                log.info("request %s is no longer ours (attempt %d)", request_id, held.attempt)
                self._give_up(request_id)

    def _give_up(self, request_id: str) -> None:
        held = self._held[request_id]
        self._outbox.drop(request_id)
        self._stop(held)
        self._forget(held)

    def _stop(self, held: Held) -> None:
        if held.preparing is not None:
            held.preparing.cancel()
            held.preparing = None
            self._slots.prepared()
        elif not held.is_finished:
            self._thread.abort(held.id)

    def _forget(self, held: Held) -> None:
        del self._held[held.id]
        self._slots.end(held.ticket)
        if not self._held:
            self._idle.set()
            self._idle_since = time.time()

    def _leases(self, of: Callable[[Held], object] = lambda _: True) -> list[tuple[str, int]]:
        return [(held.id, held.attempt) for held in self._held.values() if of(held)]

    # -- the tick: leases, beats, the watchdog ----------------------------------------------------

    async def _tick_forever(self) -> None:
        times = self._times
        period = min(times.lease_seconds / 3, times.beat_seconds, times.step_timeout_seconds / 4)
        ticks_per_beat = max(1, math.floor(times.beat_seconds / period + 0.01))
        tick = 0
        while self.failure is None:
            self._watch()
            if self._held:
                self._aside("renew", self._renew)
            if any(held.is_returned for held in self._held.values()):
                self._aside("return", self._return_all)
            if tick % ticks_per_beat == 0:
                self._aside("beat", self._beat)
            if tick % (METRICS_BEATS * ticks_per_beat) == 0 and isinstance(self._engine, HasMetrics):
                self._aside("metrics", self._read_metrics)
            self._claim_soon()  # where the last claim failed
            tick += 1
            await asyncio.sleep(period)

    def _aside(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work` beside the tick, so that a slow Redis delays no watchdog; one of a kind at a time."""
        if name not in self._side_tasks:
            task = asyncio.get_running_loop().create_task(work())
            self._side_tasks[name] = task
            task.add_done_callback(lambda _: self._side_tasks.pop(name, None))

    async def _renew(self) -> None:
        leases = self._leases()
        try:
            lost = await self._queue.renew(leases)
        except QueueUnavailable as error:
            log.warning("cannot renew leases: %s", error.message)
            return
        self._lose(dict(leases), lost)

    async def _beat(self) -> None:
        try:
            await self._registry.beat(self.stats(), self._metrics)
        except QueueUnavailable as error:
            log.warning("cannot publish statistics: %s", error.message)
            return
        self._metrics = b""

    async def _read_metrics(self) -> None:
        """Get the engine's own metrics for the next beat, which does not wait for them."""
        assert isinstance(self._engine, HasMetrics)
        labels = {"model_name": self._model, "revision": self._revision, "replica": self._replica_id}
        found = await asyncio.to_thread(self._engine.own_metrics, labels)
        self._metrics = pack(found) if found else b""

    def stats(self) -> ReplicaStats:
        now, tokens = time.monotonic(), self.tokens_total
        since, before = self._beaten
        self._beaten = (now, tokens)
        return ReplicaStats(
            replica=self._replica_id,
            model=self._model,
            revision=self._revision,
            pid=os.getpid(),
            node=socket.gethostname(),
            started=self._started,
            updated=time.time(),
            slots=self._slots.present(len(self._held)),
            running=len(self._held),
            tokens_total=tokens,
            tokens_per_second=round((tokens - before) / max(0.05, now - since), 1),
            draining=not self._can_claim,
            idle_since=0.0 if self._held else self._idle_since,
        )

    def _watch(self) -> None:
        busy_since = self._thread.busy_since
        limit = self._times.step_timeout_seconds
        if busy_since is not None and time.monotonic() - busy_since > limit:
            self._failed(
                Crash(
                    "EngineHung",
                    f"The engine finished no step for {limit:g} seconds. Where steps may take so long, raise "
                    "TIDEGATE_STEP_TIMEOUT_SECONDS; otherwise give it more cores.",
                )
            )
        elif (sentence := self._engine.health()) is not None:
            self._failed(Crash("EngineUnhealthy", sentence))

    # -- ending -----------------------------------------------------------------------------------

    def _failed(self, crash: Crash) -> None:
        if self.failure is not None:
            return
        log.error("replica ends: %s: %s", crash.reason, crash.message)
        self._can_claim = False
        self.failure = crash
        self._last_words = asyncio.get_running_loop().create_task(self._say_last_words(crash))

    async def _say_last_words(self, crash: Crash) -> None:
        """Hand everything over and say why; Redis may be away, so within a bound. Where it is, the leases
        expire, which comes to the same."""
        try:
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await self._outbox.flush(LAST_WORDS_SECONDS / 2)
                if self._claiming is not None:
                    await asyncio.wait({self._claiming}, timeout=LAST_WORDS_SECONDS / 4)
                # First what cannot be at fault: a suspect among it must not take the blame for the others.
                await self._queue.hand_back(self._leases(lambda held: not held.is_in_engine), crash.reason)
                await self._queue.fault(
                    self._leases(lambda held: held.is_in_engine), f"{crash.reason}: {crash.message}"
                )
                if self._report is not None:
                    report = reports.ended(self._report, crash, socket.gethostname(), time.time())
                    await self._registry.report(report)
                await self._registry.gone(self.stats())
        except TimeoutError:
            log.warning("could not hand over in time")
        except QueueUnavailable as error:
            log.warning("could not hand over: %s", error.message)
        finally:
            if not self.ended.done():
                self.ended.set_result(crash)

    async def _hand_back_all(self) -> None:
        for held in self._held.values():
            self._stop(held)
        flushed = await self._outbox.flush(LAST_WORDS_SECONDS)
        remaining = self._leases()
        if not remaining:
            return
        log.info("handing back %d requests (%s)", len(remaining), "drained" if flushed else "Redis is slow")
        try:
            await self._queue.hand_back(remaining, "Draining")
        except QueueUnavailable as error:
            log.warning("could not hand back, the leases will expire: %s", error.message)

    async def _close(self) -> None:
        preparing = [held.preparing for held in self._held.values()]
        await end_tasks(self._ticking, *self._side_tasks.values(), *preparing)
        await self._outbox.close()
        await self._thread.close(patience_seconds=5.0)
        try:
            await self._queue.close()
            await self._registry.gone(self.stats())
        except QueueUnavailable as error:
            log.warning("left without a word: %s", error.message)


async def _persist(
    work: Callable[..., Awaitable[None]], *arguments: object, patience_seconds: float = math.inf
) -> None:
    """Do what a replica cannot start (or end) without, however long Redis is away, up to a patience."""
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            await work(*arguments)
            return
        except QueueUnavailable as error:
            log.warning("waiting for Redis: %s", error.message)
            if time.monotonic() >= give_up:
                return
            await asyncio.sleep(RETRY_SECONDS)

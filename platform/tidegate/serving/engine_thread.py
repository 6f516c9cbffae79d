"""One thread drives an engine.

Who runs where. The event loop calls `hand_over`, `abort`, `pause`, `close`; the engine thread alone calls
the engine. Between them stand an inbox (a list behind a condition, for the loop's orders) and one callback
(`deliver`, run on the loop with all that a turn of the thread produced).

What may interleave. An order that arrives while a step runs waits for the end of that step; so an abort
frees its slot within one step and an added request starts with the next one. Outputs of a request may
still be on their way to the loop when its abort is ordered.

What always holds.
- Orders are carried out in the order they were given. Each has a ticket (1, 2, 3, ...), and a delivery says
  the last ticket carried out (`Delivery.ticket`). So the loop can tell what a delivery did not know yet:
  output for a request whose `hand_over` has a later ticket belongs to an earlier life of the same id.
- `add` is called only while the engine has a free slot, or where it gives back what it has no room for; what
  was handed over too early waits here, first in, first out, and an abort finds it there.
- The thread sleeps on the condition while it has neither orders nor work; nothing polls.
- `busy_since` is set exactly while the thread is inside the engine: it is what the watchdog looks at.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.engines.base import Engine, LoadReport, Prepared, StepOutput, is_out_of_memory
from tidegate.messages.work import NO_TOKENS, Finish, Segment

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """Holds what one turn of the engine thread produced. `free_slots` counts slots that no request which was
    handed over up to `ticket` holds or waits for."""

    outputs: list[StepOutput]
    free_slots: int
    ticket: int


@dataclass(frozen=True, slots=True)
class Crash:
    """Says why the engine thread ended early. `reason` is CamelCase."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class _Add:
    prepared: Prepared
    history: list[Segment]

    @property
    def request_id(self) -> str:
        return self.prepared.request.id


class EngineThread:
    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[Delivery], None],
        crashed: Callable[[Crash], None],
    ) -> None:
        """`deliver` and `crashed` are called on the event loop."""
        self.busy_since: float | None = None  # monotonic seconds
        self.free_slots = 0  # of the engine once it is loaded, and after each turn
        self._engine = engine
        self._deliver = deliver
        self._crashed = crashed
        self._condition = threading.Condition()
        self._inbox: list[_Add | str] = []  # an id is an abort
        self._ticket = 0
        self._is_paused = False
        self._is_closing = False
        self._waiting: deque[_Add] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> LoadReport:
        """Start the thread and load the engine in it. Raises `EngineLoadError`, or whatever `load` raised."""
        self._loop = asyncio.get_running_loop()
        loaded: asyncio.Future[LoadReport] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="engine", daemon=True)
        self._thread.start()
        return await loaded

    def hand_over(self, prepared: Prepared, history: list[Segment]) -> int:
        """Give a request to the engine; returns the ticket of this order."""
        return self._order(_Add(prepared, history))

    def abort(self, request_id: str) -> int:
        return self._order(request_id)

    def pause(self, paused: bool) -> None:
        """Stop or resume stepping; orders are carried out meanwhile."""
        if paused == self._is_paused:
            return
        with self._condition:
            self._is_paused = paused
            self._condition.notify()

    async def close(self, patience_seconds: float) -> None:
        """End the thread after its current step and close the engine. A thread that does not end within
        `patience_seconds` is left behind: it is a daemon and dies with the process."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        await asyncio.to_thread(thread.join, patience_seconds)

    def _order(self, order: _Add | str) -> int:
        with self._condition:
            self._ticket += 1
            self._inbox.append(order)
            self._condition.notify()
            return self._ticket

    def _run(self, loaded: asyncio.Future[LoadReport]) -> None:
        try:
            report = self._engine.load()
            self.free_slots = self._engine.free_slots()
        except BaseException as error:
            self._call(_settle, loaded, None, error)
            return
        self._call(_settle, loaded, report, None)
        try:
            self._serve()
        except BaseException as error:  # the engine is broken, whatever it raised
            log.exception("engine failed")
            self._call(self._crashed, describe_crash(error))
        finally:
            self.busy_since = None
            self._close_engine()

    def _serve(self) -> None:
        engine = self._engine
        done = 0
        while True:
            with self._condition:
                while not self._inbox and not self._is_closing and not self._may_step():
                    self._condition.wait()
                if self._is_closing:
                    return
                orders, self._inbox = self._inbox, []
                may_step = not self._is_paused
            self.busy_since = time.monotonic()
            outputs: list[StepOutput] = []
            for order in orders:
                self._carry_out(order)
            done += len(orders)
            if self._waiting:
                self._add_waiting(outputs)
            if may_step and engine.has_work():
                outputs += engine.step()
            self.free_slots = free = engine.free_slots() - len(self._waiting)
            self.busy_since = None
            self._call(self._deliver, Delivery(outputs, free, done))

    def _may_step(self) -> bool:
        return not self._is_paused and (self._engine.has_work() or self._can_add())

    def _can_add(self) -> bool:
        return bool(self._waiting) and (self._engine.gives_back or self._engine.free_slots() > 0)

    def _carry_out(self, order: _Add | str) -> None:
        if isinstance(order, _Add):
            self._waiting.append(order)
            return
        for waiting in self._waiting:
            if waiting.request_id == order:
                self._waiting.remove(waiting)
                return
        self._engine.abort(order)

    def _add_waiting(self, outputs: list[StepOutput]) -> None:
        while self._can_add():
            output = self._add(self._waiting.popleft())
            if output is not None:
                outputs.append(output)

    def _add(self, order: _Add) -> StepOutput | None:
        """Engines do not raise for a bad request; one that does loses that request, not all of them."""
        try:
            return self._engine.add(order.prepared, order.history)
        except MemoryError:
            raise
        except Exception as error:
            log.exception("engine refused request %s by raising", order.request_id)
            self._engine.abort(order.request_id)
            return StepOutput(order.request_id, NO_TOKENS, 0, refused_by_raising(error))

    def _close_engine(self) -> None:
        try:
            self._engine.close()
        except Exception:
            log.exception("engine did not close cleanly")

    def _call(self, function: Callable[..., object], *args: object) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop closed in between: nobody is left to tell
            log.debug("event loop is closed; a delivery was dropped")


def refused_by_raising(error: Exception) -> Finish:
    """Make the finish of a request at which the engine raised, which no engine should."""
    return Finish("error", "EngineError", f"The engine could not take this request ({type(error).__name__}).")


def describe_crash(error: BaseException) -> Crash:
    """Give the reason and sentence that the model's status shows."""
    name = type(error).__name__
    detail = str(error).strip().splitlines()[0] if str(error).strip() else name
    if is_out_of_memory(error):
        return Crash("OutOfMemory", f"The engine ran out of memory: {detail}")
    return Crash("EngineCrashed", f"The engine failed in a step: {name}: {detail}")


def _settle(
    loaded: asyncio.Future[LoadReport], report: LoadReport | None, error: BaseException | None
) -> None:
    if loaded.done():  # the waiter was cancelled
        return
    if report is not None:
        loaded.set_result(report)
    elif isinstance(error, Exception):
        loaded.set_exception(error)
    else:
        loaded.set_exception(RuntimeError(f"the engine ended the load with {type(error).__name__}"))

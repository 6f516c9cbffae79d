from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from tests.integration.serving.rig import a_request
from tests.waiting import await_until
from tidegate.engines.base import EngineLoadError, LoadReport, Prepared, StepOutput
from tidegate.messages.work import Finish, Request, Segment, Tokens
from tidegate.serving.engine_thread import Crash, Delivery, EngineThread, describe_crash


def prepared(request: Request) -> Prepared:
    return Prepared(request, [1], 20)


@dataclass
class ScriptedEngine:
    """Each step takes a permit of `steps`, and gives every running request one token."""

    slots: int = 2
    gives_back: bool = False
    load_error: Exception | None = None
    step_error: BaseException | None = None
    add_error: Exception | None = None
    steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    running: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    is_closed: bool = False

    def load(self) -> LoadReport:
        self.threads.add(threading.current_thread().name)
        if self.load_error is not None:
            raise self.load_error
        return LoadReport(0, 0, self.slots, 100, "x", "cpu")

    def free_slots(self) -> int:
        return self.slots - len(self.running)

    async def prepare(self, request: Request) -> Prepared | Finish:
        return prepared(request)

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:
        self.threads.add(threading.current_thread().name)
        if self.add_error is not None:
            raise self.add_error
        if self.free_slots() < 1 and not self.gives_back:
            raise AssertionError("added without a free slot")
        self.running.append(prepared.request.id)
        return None

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id in self.running:
            self.running.remove(request_id)

    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[StepOutput]:
        self.steps.acquire()
        if self.step_error is not None:
            raise self.step_error
        return [StepOutput(request_id, Tokens([1], "x"), 0, None) for request_id in self.running]

    def health(self) -> str | None:
        return None

    def close(self) -> None:
        self.is_closed = True


class Bench:
    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.deliveries: list[Delivery] = []
        self.crashes: list[Crash] = []
        self.thread = EngineThread(engine, self.deliveries.append, self.crashes.append)

    async def close(self) -> None:
        self.engine.steps.release(1000)
        await self.thread.close(5.0)


async def test_everything_happens_on_the_one_thread_and_close_ends_it() -> None:
    bench = Bench(ScriptedEngine())
    report = await bench.thread.start()
    assert report.slots == 2
    request = a_request()
    bench.thread.hand_over(prepared(request), [])
    bench.engine.steps.release()
    await await_until(lambda: bench.deliveries)
    assert bench.deliveries[0] == Delivery([StepOutput(request.id, Tokens([1], "x"), 0, None)], 1, 1)
    await bench.close()
    assert bench.engine.threads == {"engine"}
    assert bench.engine.is_closed


async def test_an_engine_that_gives_back_gets_all_that_was_handed_over() -> None:
    bench = Bench(ScriptedEngine(slots=1, gives_back=True))
    await bench.thread.start()
    requests = [a_request() for _ in range(3)]
    for request in requests:
        bench.thread.hand_over(prepared(request), [])
    bench.engine.steps.release(2)
    await await_until(lambda: bench.deliveries and bench.deliveries[-1].ticket == 3)
    assert bench.deliveries[-1].free_slots == -2
    assert bench.engine.running == [request.id for request in requests]
    await bench.close()


async def test_what_finds_no_slot_waits_in_order_and_an_abort_finds_it() -> None:
    bench = Bench(ScriptedEngine(slots=1))
    await bench.thread.start()
    first, second, third = a_request(), a_request(), a_request()
    for request in (first, second, third):
        bench.thread.hand_over(prepared(request), [])
    bench.engine.steps.release(2)
    await await_until(lambda: bench.deliveries and bench.deliveries[-1].ticket == 3)
    assert bench.deliveries[-1].free_slots == -2
    bench.thread.abort(second.id)
    bench.thread.abort(first.id)
    bench.engine.steps.release(2)
    await await_until(lambda: bench.engine.running == [third.id])
    assert bench.engine.aborted == [first.id]
    await bench.close()


async def test_a_paused_thread_does_not_step_but_carries_out_orders() -> None:
    bench = Bench(ScriptedEngine())
    await bench.thread.start()
    bench.engine.steps.release(1000)
    bench.thread.pause(True)
    request = a_request()
    bench.thread.hand_over(prepared(request), [])
    await await_until(lambda: bench.deliveries)
    assert bench.deliveries == [Delivery([], 1, 1)]
    bench.thread.pause(False)
    await await_until(lambda: len(bench.deliveries) > 1)
    assert bench.deliveries[1].outputs[0].request_id == request.id
    await bench.close()


async def test_busy_since_is_set_while_a_step_runs() -> None:
    bench = Bench(ScriptedEngine())
    await bench.thread.start()
    assert bench.thread.busy_since is None
    bench.thread.hand_over(prepared(a_request()), [])
    await await_until(lambda: bench.thread.busy_since is not None)
    bench.thread.abort(a_request().id)
    await bench.close()
    assert bench.thread.busy_since is None


async def test_a_step_that_raises_ends_the_thread_with_its_reason() -> None:
    bench = Bench(ScriptedEngine(step_error=ValueError("bad shape")))
    await bench.thread.start()
    bench.thread.hand_over(prepared(a_request()), [])
    bench.engine.steps.release()
    await await_until(lambda: bench.crashes)
    assert bench.crashes == [Crash("EngineCrashed", "The engine failed in a step: ValueError: bad shape")]
    await await_until(lambda: bench.engine.is_closed)
    await bench.close()


async def test_an_add_that_raises_loses_only_that_request() -> None:
    bench = Bench(ScriptedEngine(add_error=KeyError("template")))
    await bench.thread.start()
    request = a_request()
    bench.thread.hand_over(prepared(request), [])
    await await_until(lambda: bench.deliveries)
    (output,) = bench.deliveries[0].outputs
    assert output.finish == Finish(
        "error", "EngineError", "The engine could not take this request (KeyError)."
    )
    assert bench.crashes == []
    await bench.close()


async def test_a_failed_load_reaches_the_caller() -> None:
    bench = Bench(ScriptedEngine(load_error=EngineLoadError("WeightsMissing", "no weights")))
    with pytest.raises(EngineLoadError, match="no weights"):
        await bench.thread.start()
    await bench.close()


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "OutOfMemory"),
        (OutOfMemoryError("CUDA ran over"), "OutOfMemory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "OutOfMemory"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
            "OutOfMemory",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "OutOfMemory"),
        (OSError(12, "Cannot allocate memory"), "OutOfMemory"),
        (ValueError("out of memory is a word"), "EngineCrashed"),
        (RuntimeError("x\ny"), "EngineCrashed"),
    ],
)
def test_a_crash_has_a_stable_reason_and_one_line(error: BaseException, reason: str) -> None:
    crash = describe_crash(error)
    assert crash.reason == reason
    assert "\n" not in crash.message

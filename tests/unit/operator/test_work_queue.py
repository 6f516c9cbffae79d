import asyncio

from tidegate_operator.work_queue import (
    CONFLICT_BACKOFF_SECONDS,
    FIRST_BACKOFF_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    ReconcileQueue,
    Schedule,
)

A, B = ("space", "a"), ("space", "b")


def test_a_key_asked_for_many_times_is_worked_on_once_at_the_earliest_time() -> None:
    schedule = Schedule()
    schedule.add(A, 10.0)
    schedule.add(A, 5.0)
    schedule.add(A, 20.0)
    assert schedule.take(4.9) is None
    assert schedule.take(5.0) == A
    assert schedule.take(100.0) is None


def test_events_during_work_are_not_lost_and_not_worked_on_at_once() -> None:
    schedule = Schedule()
    schedule.add(A, 0.0)
    assert schedule.take(0.0) == A
    schedule.add(A, 1.0)
    assert schedule.take(2.0) is None  # one worker per key
    assert schedule.next_at() is None
    schedule.end(A)
    assert schedule.next_at() == 1.0
    assert schedule.take(2.0) == A


def test_the_longest_due_key_comes_first() -> None:
    schedule = Schedule()
    schedule.add(A, 2.0)
    schedule.add(B, 1.0)
    assert [schedule.take(3.0), schedule.take(3.0)] == [B, A]


def test_failures_back_off_doubling_up_to_a_bound_and_success_forgets_them() -> None:
    schedule = Schedule()
    pauses = []
    now = 0.0
    schedule.add(A, now)
    for _ in range(10):
        assert schedule.take(now) == A
        schedule.add(A, now)  # events do not shorten the pause
        pauses.append(schedule.end_failed(A, now))
        schedule.add(A, now)
        assert schedule.take(now) is None
        now += pauses[-1]
    assert pauses[:3] == [FIRST_BACKOFF_SECONDS, 2 * FIRST_BACKOFF_SECONDS, 4 * FIRST_BACKOFF_SECONDS]
    assert pauses[-1] == LONGEST_BACKOFF_SECONDS
    assert schedule.take(now) == A
    schedule.end(A)
    schedule.add(A, now)
    schedule.take(now)
    assert schedule.end_failed(A, now) == FIRST_BACKOFF_SECONDS


def test_a_conflict_is_tried_again_almost_at_once_but_not_for_ever() -> None:
    schedule = Schedule()
    pauses = []
    now = 0.0
    schedule.add(A, now)
    for _ in range(20):
        assert schedule.take(now) == A
        pauses.append(schedule.end_failed(A, now, CONFLICT_BACKOFF_SECONDS))
        now += pauses[-1]
    assert pauses[0] == CONFLICT_BACKOFF_SECONDS
    assert pauses[-1] == LONGEST_BACKOFF_SECONDS


def test_a_failed_keys_own_events_do_not_hold_up_another() -> None:
    schedule = Schedule()
    schedule.add(A, 0.0)
    schedule.take(0.0)
    schedule.end_failed(A, 0.0)
    schedule.add(B, 0.1)
    assert schedule.next_at() == 0.1
    assert schedule.take(0.1) == B


async def test_two_workers_share_the_keys_and_none_gets_the_others() -> None:
    queue = ReconcileQueue()
    taken: list[tuple[str, str]] = []
    running: set[tuple[str, str]] = set()

    async def worker() -> None:
        while True:
            key = await queue.take()
            assert key not in running
            running.add(key)
            taken.append(key)
            await asyncio.sleep(0)
            running.discard(key)
            queue.end(key)

    tasks = [asyncio.create_task(worker()) for _ in range(2)]
    for _ in range(5):
        queue.add(A)
        queue.add(B)
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    assert {A, B} <= set(taken)
    assert len(queue) == 0


async def test_a_delayed_key_comes_when_its_clock_says_so() -> None:
    now = [0.0]
    queue = ReconcileQueue(clock=lambda: now[0])
    queue.add(A, delay_seconds=60.0)
    waiting = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    now[0] = 60.0
    queue.add(B, delay_seconds=1.0)  # wakes the worker, which finds the other one due
    assert await asyncio.wait_for(waiting, 1.0) == A

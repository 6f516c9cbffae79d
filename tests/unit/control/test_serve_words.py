"""What Ray Serve says of an application that it gave up. The texts are Ray 2.60's own, shortened."""

from __future__ import annotations

from tidegate.control.observed import ApplicationState, Worker
from tidegate.control.serve_words import MAX_CHARACTERS, why_given_up

WORKERS = (
    Worker("main-small-1", "10.0.0.7", "small"),
    Worker("main-cpu-1", "10.0.0.8", "cpu"),
    Worker("main-cpu-2", "10.0.0.9", "cpu"),
)
FAILED = (
    "The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or "
    "initial health check failing. See controller logs for details. Error:\n"
)
OUT_OF_MEMORY = (
    FAILED + "OutOfMemoryError('1 worker(s) were killed due to the node running low on memory. Memory on the "
    "node (IP: 10.0.0.7, ID: 448dc3214fad) was 0.66GB used / 0.68GB limit (0.967344)\\nOOM kill reason: ...')"
)


def application(message: str) -> ApplicationState:
    return ApplicationState("one--a", "DEPLOY_FAILED", deployment_message=message)


def test_a_replica_that_took_too_much_memory_is_told_with_its_pod_and_remedy() -> None:
    reason, message = why_given_up(application(OUT_OF_MEMORY), "small", WORKERS)
    assert reason == "OutOfMemory"
    assert message == (
        "Pod main-small-1, container ray-worker ran out of memory while the replica started (0.66GB of "
        "0.68GB were taken), and Ray ended the replica; raise the memory of group small in the Pool, or set "
        "spec.resources.memory of the models so that fewer share a worker."
    )
    assert "Pod at 10.0.0.7, " in why_given_up(application(OUT_OF_MEMORY), "small", ())[1]


def test_on_one_machine_there_is_no_pod() -> None:
    reason, message = why_given_up(application(OUT_OF_MEMORY), "", ())
    assert reason == "OutOfMemory"
    assert message.startswith("The machine ran out of memory while the replica started (0.66GB of 0.68GB")


def test_a_process_that_ends_is_told_with_the_place_of_its_words() -> None:
    reason, message = why_given_up(application(FAILED + "ActorDiedError()"), "cpu", WORKERS)
    assert reason == "DeployFailed"
    assert message == (
        "The replica's process ended while it started, 3 times in a row. What it said is in "
        "/tmp/ray/session_latest/logs/serve of container ray-worker in main-cpu-1, main-cpu-2."
    )
    assert why_given_up(application(FAILED + "ActorDiedError()"), "gone", WORKERS)[1].endswith(
        "of container ray-worker in the pods of group gone."
    )


def test_a_process_of_which_ray_says_more() -> None:
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: Replica\n\tip: 10.0.0.9\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker unexpectedly exits with a connection error code 2. End of file."
    )
    assert why_given_up(application(FAILED + text), "cpu", WORKERS)[1] == (
        "The replica's process ended while it started, 3 times in a row (SYSTEM_ERROR). What it said is in "
        "/tmp/ray/session_latest/logs/serve of container ray-worker in main-cpu-2."
    )


def test_all_else_is_in_serves_words_and_short() -> None:
    text = "Traceback\nline 2\nValueError: no such thing"
    assert why_given_up(application(text), "cpu", WORKERS) == (
        "DeployFailed",
        "Traceback line 2 ValueError: no such thing",
    )
    assert len(why_given_up(application("x" * 9000), "cpu", WORKERS)[1]) == MAX_CHARACTERS + 1

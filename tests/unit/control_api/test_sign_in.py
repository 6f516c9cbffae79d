"""How often an address may be wrong."""

from __future__ import annotations

import pytest

from tidegate.control_api.sign_in import FAILURE_SECONDS, FREE_FAILURES, MOST_ADDRESSES, Failures


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failures(clock: Clock) -> Failures:
    return Failures(clock)


def fail(failures: Failures, times: int, address: str = "10.0.0.1") -> None:
    for _ in range(times):
        failures.note(address)


def test_some_failures_are_free_and_then_each_takes_its_time(failures: Failures, clock: Clock) -> None:
    fail(failures, FREE_FAILURES - 1)
    assert failures.wait_seconds("10.0.0.1") == 0.0
    fail(failures, 1)
    assert failures.wait_seconds("10.0.0.1") == pytest.approx(FAILURE_SECONDS)
    clock.now += FAILURE_SECONDS
    assert failures.wait_seconds("10.0.0.1") == 0.0
    fail(failures, 1)
    assert failures.wait_seconds("10.0.0.1") == pytest.approx(FAILURE_SECONDS)


def test_time_forgives_all(failures: Failures, clock: Clock) -> None:
    fail(failures, FREE_FAILURES)
    clock.now += FREE_FAILURES * FAILURE_SECONDS
    fail(failures, FREE_FAILURES - 1)
    assert failures.wait_seconds("10.0.0.1") == 0.0


def test_the_addresses_of_one_ipv6_site_are_one_client(failures: Failures) -> None:
    for number in range(FREE_FAILURES):
        failures.note(f"2001:db8::{number:x}")
    assert failures.wait_seconds("2001:db8::ffff") > 0.0
    assert failures.wait_seconds("2001:db8:0:1::1") == 0.0


def test_ipv4_clients_of_an_ipv6_socket_are_told_apart(failures: Failures) -> None:
    fail(failures, FREE_FAILURES, "::ffff:10.0.0.1")
    assert failures.wait_seconds("::ffff:10.0.0.1") > 0.0
    assert failures.wait_seconds("::ffff:10.0.0.2") == 0.0


def test_memory_is_bounded_and_the_longest_quiet_goes_first(failures: Failures) -> None:
    fail(failures, FREE_FAILURES, "first")
    fail(failures, FREE_FAILURES, "second")
    for number in range(MOST_ADDRESSES - 1):
        failures.note(f"other-{number}")
    assert len(failures) == MOST_ADDRESSES
    assert failures.wait_seconds("first") == 0.0
    assert failures.wait_seconds("second") > 0.0

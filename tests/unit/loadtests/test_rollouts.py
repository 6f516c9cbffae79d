"""Rollouts with virtual time reach the figures asked of the gates; their arithmetic is that of the gates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from loadtests.rollouts import (
    ABNORMAL_ENDS,
    ROLLOUT,
    Pair,
    Revision,
    Scenario,
    Seen,
    aborts,
    found,
    joined,
    simulate,
    with_sessions,
)
from tidegate.control.evidence import ALLOWED_SLOWDOWN, ALPHA, Limits, buckets_within, judge
from tidegate.messages.outcomes import Tally, cohort_of

GOOD = Revision(0.001)
SEED = 9
SLACK = buckets_within(ALLOWED_SLOWDOWN)


def at(weight: int, seconds: int = 60) -> Sequence[tuple[int, int]]:
    return ((weight, seconds),)


def outcomes(seen: Seen, run: int, second: int) -> list[dict[str, Tally]]:
    """What the store would have counted in a run by then: of the target and of the stable."""
    found: list[dict[str, Tally]] = [{}, {}]
    until = np.arange(len(seen.weights)) < second
    frozen = seen.thresholds[run]
    for weight in np.unique(seen.weights):
        here = until & (seen.weights == weight)

        def count(pair: Pair, side: int, here: np.ndarray = here) -> int:  # type: ignore[type-arg]
            return int(pair[side][run, here].sum())

        for side in (0, 1):
            failed, errors = count(seen.failed, side), count(seen.errors, side)
            tally = Tally(
                ends={"ok": count(seen.requests, side) - failed, "error": errors, "again": failed - errors}
            )
            tally.ends |= {end: count(seen.abnormal[end], side) for end in ABNORMAL_ENDS}
            for slow, buckets, into in (
                (seen.first_token, frozen.first_token, tally.first_token),
                (seen.between_tokens, frozen.between_tokens, tally.between_tokens),
            ):
                above = [count(pair, side) for pair in slow] + [0]
                for i, bucket in enumerate(buckets):
                    into[bucket + SLACK + 1] = into.get(bucket + SLACK + 1, 0) + above[i] - above[i + 1]
            if side == 0:
                tally.pairs = {"01": count(seen.pairs, 0), "10": count(seen.pairs, 1)}
            found[side][cohort_of("a", round(weight * 100))] = tally
    found[1][""] = seen.before[run]
    return found


@pytest.mark.parametrize("base", [0.0, 0.02])
def test_the_arithmetic_over_arrays_is_that_of_the_gates(base: float) -> None:
    steps = ((0, 20), (10, 30), (50, 30), (100, 30))
    scenario = Scenario(Revision(base), Revision(base + 0.01, empty=0.01, slower=1.2), steps, stall_seconds=2)
    seen = simulate(scenario, 30, np.random.default_rng(SEED))
    evidence = joined(seen)
    for run in range(30):
        for second in (10, 25, 60, 110):
            target, stable = outcomes(seen, run, second)
            judgement = judge(
                stable,
                target,
                "a",
                seen.thresholds[run],
                Limits(),
                least_requests=0,
                slowdown=ALLOWED_SLOWDOWN,
            )
            assert math.log(judgement.evidence) == pytest.approx(evidence[run, second - 1], abs=1e-6)
            assert (judgement.verdict == "fails") == (evidence[run, second - 1] >= math.log(1 / ALPHA))


@pytest.mark.parametrize(
    ("bad", "within_seconds", "share"),
    [
        (Scenario(Revision(0.0), Revision(0.05), at(15)), 60, 0.95),
        (Scenario(GOOD, Revision(0.05), at(15)), 60, 0.95),
        (Scenario(GOOD, Revision(0.05), at(15), tenants=1), 60, 0.94),
        (Scenario(Revision(0.0), Revision(0.05), at(10)), 60, 0.86),
        (Scenario(GOOD, Revision(0.05), at(10)), 60, 0.86),
        (Scenario(GOOD, Revision(0.001, slower=3.0), at(15)), 15, 0.9),
        (Scenario(GOOD, Revision(0.001, empty=0.5), at(15)), 15, 0.95),
        (Scenario(GOOD, Revision(0.05), at(0)), 20, 0.9),
        (Scenario(GOOD, Revision(0.201), at(100)), 30, 0.95),
        (Scenario(GOOD, Revision(0.501), at(100)), 10, 0.95),
        (Scenario(GOOD, Revision(0.501), at(100), tenants=1), 30, 0.95),
        (Scenario(GOOD, Revision(0.001, empty=0.5), at(100)), 30, 0.95),
    ],
)
def test_a_bad_revision_is_found_in_time(bad: Scenario, within_seconds: int, share: float) -> None:
    assert found(bad, 1_000, SEED).within(within_seconds) >= share


@pytest.mark.parametrize("steps", [ROLLOUT, at(100, 300)], ids=["Canary", "BlueGreen"])
def test_of_good_revisions_at_most_one_in_a_hundred_is_aborted(steps: Sequence[tuple[int, int]]) -> None:
    """With a look each second, whatever the base error rate is."""
    results = [
        found(Scenario(Revision(base), Revision(base), steps, tenants=tenants), 200, SEED).aborted
        for base in (0.0, 0.001, 0.01, 0.05)
        for tenants in (1, 8)
    ]
    assert np.mean(results) <= 0.01
    assert max(results) <= 0.025  # five of 200: more are as good as impossible at one in a hundred


def test_what_goes_wrong_late_is_found_as_well() -> None:
    good = Scenario(GOOD, GOOD, at(15, 240))
    result = found(good, 200, SEED, after=Scenario(GOOD, Revision(0.05), at(50, 120)))
    assert result.within(60) >= 0.9


def test_replicas_that_stand_still_now_and_then_abort_no_rollout() -> None:
    """Those of both revisions do, three seconds in five minutes."""
    assert found(Scenario(GOOD, GOOD, stall_seconds=3.0), 200, SEED).aborted <= 0.02


def test_sessions_of_uneven_size_abort_no_rollout_because_each_counts_once() -> None:
    assert with_sessions(12, SEED, 200) == 0.0
    assert with_sessions(12, SEED, 200, each_request=True) > 0.2


def test_a_run_that_never_aborts_ends_at_no_time() -> None:
    evidence = np.log(np.array([[1.0, 99.0, 50.0], [1.0, 101.0, 1.0]]))
    assert list(aborts(evidence)) == [math.inf, 2.0]

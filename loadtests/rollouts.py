"""Rollouts with virtual time: how soon the gates find a bad revision, and how many good ones they abort.

    python -m loadtests.rollouts [--runs 4000] [--seed 9]

Thousands of rollouts at once, one look a second, all gates. Requests come at random times (Poisson) from
several tenants; of a tenant's errors at most one counts in a second, over both revisions, as the store counts
them. First tokens and times between tokens are lognormal; the thresholds are frozen from requests before the
rollout, and a request without its first token counts as slow once it is older. How long a request takes until
it fails comes on top. The arithmetic is that of `control/evidence.py` over arrays; a test holds the two
together. For comparison the rules of Argo Rollouts and Flagger judge the same revisions, at the same weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from tidegate.control.evidence import (
    ALLOWED_SLOWDOWN,
    ALONE,
    ALPHA,
    QUANTILES,
    RATIOS,
    SHARE_EXCESS,
    SHARES,
    Limits,
    Thresholds,
    allowed_share,
    buckets_within,
    freeze,
    judge,
    possible_ratios,
)
from tidegate.messages.outcomes import (
    BUCKETS_PER_DOUBLING,
    FIRST_BUCKET_SECONDS,
    Tally,
    bucket_seconds,
    cohort_of,
)

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]  # by run and second
Pair = tuple[Counts, Counts]  # of the target, of the stable

FIRST_TOKEN_SECONDS, BETWEEN_TOKENS_SECONDS = 0.3, 0.03  # medians
SIGMA = 0.5  # of the logarithm of both
ABNORMAL_ENDS = {"empty": 0.001, "instant": 0.005, "length": 0.2}  # shares of requests
BASELINE = 1_000  # requests before the rollout
ROLLOUT = ((15, 240), (50, 240), (100, 240))  # weight in percent, seconds
MARGIN = 0.05  # `spec.rollout.margin`'s default
CHUNK_SECONDS = 600_000  # of all runs at once: what fits in memory


@dataclass(frozen=True)
class Revision:
    """What a revision does to its requests: shares of them that fail or answer nothing, and how many times as
    long it takes."""

    errors: float = 0.0
    empty: float = ABNORMAL_ENDS["empty"]
    slower: float = 1.0


@dataclass(frozen=True)
class Scenario:
    """A rollout by the clock: `steps` are (weight of the target in percent, seconds). At weight 0 the target
    gets a copy of each request."""

    stable: Revision
    target: Revision
    steps: Sequence[tuple[int, int]] = ROLLOUT
    per_second: float = 20.0
    tenants: int = 8
    stall_seconds: float = 0.0  # how long a replica of either revision stands still, ...
    stall_every: float = 300.0  # ... so often (seconds), with six replicas for the whole weight

    @property
    def weights(self) -> Floats:
        return np.concatenate([np.full(seconds, weight / 100) for weight, seconds in self.steps])


@dataclass(frozen=True)
class Seen:
    """What is counted in each second of each run."""

    weights: Floats
    errors: Pair
    first_token: list[Pair]  # slower than each of QUANTILES
    between_tokens: list[Pair]
    abnormal: dict[str, Pair]
    pairs: Pair  # only the target failed, only the stable
    before: list[Tally]  # of the stable, by run
    thresholds: list[Thresholds]
    requests: Pair
    failed: Pair  # those of them that failed, also those whose tenant's error was counted already


def simulate(scenario: Scenario, runs: int, rng: np.random.Generator) -> Seen:
    weights = scenario.weights
    rates = (scenario.per_second * weights, scenario.per_second * (1.0 - weights))
    revisions = (scenario.target, scenario.stable)
    shape = (runs, len(weights))

    def events(shares: tuple[float, float]) -> Pair:
        ours, theirs = (rng.poisson(rate * share, shape) for rate, share in zip(rates, shares, strict=True))
        return ours, theirs

    ours, theirs = (
        rng.poisson((rate * each.errors / scenario.tenants)[:, None], (*shape, scenario.tenants))
        for rate, each in zip(rates, revisions, strict=True)
    )
    some = ours + theirs > 0
    first_is_ours = rng.random(some.shape) * (ours + theirs) < ours
    copies = rng.poisson(np.where(weights == 0.0, scenario.per_second, 0.0), shape)
    bad, worse = scenario.stable.errors, scenario.target.errors
    only_one = rng.binomial(copies, worse * (1.0 - bad) + bad * (1.0 - worse))
    only_ours = rng.binomial(only_one, _part(worse * (1.0 - bad), bad * (1.0 - worse)))
    first, between = (
        _buckets(median * np.exp(SIGMA * rng.standard_normal((runs, BASELINE))))
        for median in (FIRST_TOKEN_SECONDS, BETWEEN_TOKENS_SECONDS)
    )
    before = [
        Tally(_ends(scenario.stable, rng), first_token=_counted(one), between_tokens=_counted(other))
        for one, other in zip(first, between, strict=True)
    ]
    thresholds = [freeze(tally, scenario.per_second) for tally in before]
    slack = buckets_within(ALLOWED_SLOWDOWN)
    buckets = np.array([(each.first_token, each.between_tokens) for each in thresholds]) + slack
    shares = [(each.empty, ABNORMAL_ENDS["instant"], ABNORMAL_ENDS["length"]) for each in revisions]
    return Seen(
        weights,
        ((some & first_is_ours).sum(axis=2), (some & ~first_is_ours).sum(axis=2)),
        _first_tokens(buckets[:, 0], scenario, rates, rng),
        _slow(buckets[:, 1], BETWEEN_TOKENS_SECONDS, scenario, rates, rng),
        {end: events((shares[0][i], shares[1][i])) for i, end in enumerate(ABNORMAL_ENDS)},
        (only_ours, only_one - only_ours),
        before,
        thresholds,
        tuple(
            failed.sum(axis=2) + rng.poisson(rate * (1.0 - each.errors), shape)
            for failed, rate, each in zip((ours, theirs), rates, revisions, strict=True)
        ),
        (ours.sum(axis=2), theirs.sum(axis=2)),
    )


def _ends(revision: Revision, rng: np.random.Generator) -> dict[str, int]:
    failed = int(rng.binomial(BASELINE, revision.errors))
    shares = ABNORMAL_ENDS | {"empty": revision.empty}
    abnormal = {end: int(rng.binomial(BASELINE - failed, share)) for end, share in shares.items()}
    return {"ok": BASELINE - failed, "error": failed} | abnormal


def joined(seen: Seen) -> Floats:
    """Return the logarithm of the gates' joined e-value after each second, as `evidence.judge` has it."""
    halves = np.where(seen.weights == 0.0, 0.5, 0.0)
    gates: Mapping[str, list[Floats]] = {
        "errors": [_log_e_values(seen.errors, seen.weights, RATIOS)],
        "shadow": [_log_e_values(seen.pairs, halves, RATIOS)],
        "firstToken": _by_quantile(seen.first_token, seen),
        "betweenTokens": _by_quantile(seen.between_tokens, seen),
        "abnormalEnds": [_log_e_values(each, seen.weights, RATIOS) for each in seen.abnormal.values()],
    }
    alone = _alone(seen)
    rest = 1.0 - sum(SHARES[name] for name in gates)  # no limits are set
    total: Floats = np.full(seen.errors[0].shape, math.log(rest))
    for name, tests in gates.items():
        part = 1.0 - ALONE if name in alone else 1.0
        for test in tests:
            total = np.logaddexp(total, test + math.log(SHARES[name] * part / len(tests)))
        for test in alone.get(name, ()):
            total = np.logaddexp(total, test + math.log(SHARES[name] * ALONE / len(tests)))
    return total


def _alone(seen: Seen) -> Mapping[str, list[Floats]]:
    """The tests of the target at 100 %, after each second."""
    is_alone = seen.weights == 1.0
    ended = (seen.requests[0] - seen.failed[0], seen.requests[1] - seen.failed[1])

    def of(
        failures: Pair,
        requests: Pair,
        before: Sequence[tuple[int, int]],
        excess: float = SHARE_EXCESS,
        together: Floats | float = 1.0,
    ) -> Floats:
        lately = [(pair[1] * ~is_alone).sum(axis=1) for pair in (failures, requests)]
        allowed = np.array(
            [
                allowed_share(excess, (bad + int(f), count + int(n)), (int(f), int(n)))
                for (bad, count), f, n in zip(before, *lately, strict=True)
            ]
        )[:, None]
        bad, count = (np.cumsum(pair[0] * is_alone, axis=1) / together for pair in (failures, requests))
        terms = [
            math.log(part) + bad * math.log(ratio) - count * np.log1p((ratio - 1.0) * allowed)
            for ratio, part in RATIOS.items()
        ]
        return np.where(allowed < 1.0, np.logaddexp.reduce(terms), 0.0)

    failed, counted = (np.cumsum(each[0] * is_alone, axis=1) for each in (seen.failed, seen.errors))
    errors = [(tally.ends["error"], tally.finished) for tally in seen.before]
    return {
        "errors": [
            of(seen.failed, seen.requests, errors, MARGIN, np.maximum(1.0, failed / np.maximum(1, counted)))
        ],
        "abnormalEnds": [
            of(pair, ended, [(tally.ends[end], tally.ends["ok"]) for tally in seen.before])
            for end, pair in seen.abnormal.items()
        ],
    }


def aborts(evidence: Floats) -> Floats:
    """Return after how many seconds each run aborts; infinity: never."""
    over = evidence >= math.log(1.0 / ALPHA)
    return np.where(over.any(axis=1), over.argmax(axis=1) + 1.0, math.inf)


def _log_e_values(
    failures: Pair, weights: Floats, ratios: Mapping[float, float], together: Floats | float = 1.0
) -> Floats:
    """`evidence.log_e_value` after each second."""
    compares = ((weights > 0.0) & (weights < 1.0)) / together
    ours, both = failures[0] * compares, (failures[0] + failures[1]) * compares
    terms = [
        math.log(part) + np.cumsum(ours * math.log(ratio) - both * np.log1p((ratio - 1.0) * weights), axis=1)
        for ratio, part in ratios.items()
    ]
    total: Floats = np.logaddexp.reduce(terms)
    return total


def _by_quantile(slow: Sequence[Pair], seen: Seen) -> list[Floats]:
    together = np.array([seen.thresholds[0].together(weight) for weight in seen.weights])
    return [
        _log_e_values(pair, seen.weights, possible_ratios(percent), together)
        for percent, pair in zip(QUANTILES, slow, strict=True)
    ]


def _buckets(seconds: Floats) -> Counts:
    """`outcomes.bucket_of`."""
    numbers: Counts = np.floor(np.log2(seconds / FIRST_BUCKET_SECONDS) * BUCKETS_PER_DOUBLING).astype(int)
    return numbers


def _counted(buckets: Counts) -> dict[int, int]:
    numbers, counts = np.unique(buckets, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _slow(
    buckets: Counts, median: float, scenario: Scenario, rates: tuple[Floats, Floats], rng: np.random.Generator
) -> list[Pair]:
    """Requests above each run's `buckets` (by run and quantile)."""
    bounds = _bounds(buckets)
    found: list[list[Counts]] = []
    for revision, rate in zip((scenario.target, scenario.stable), rates, strict=True):
        above = 1.0 - np.vectorize(NormalDist().cdf)(np.log(bounds / (median * revision.slower)) / SIGMA)
        found.append(_nested(above, np.broadcast_to(rate, (len(buckets), len(rate))), rng))
    return list(zip(*found, strict=True))


def _first_tokens(
    buckets: Counts, scenario: Scenario, rates: tuple[Floats, Floats], rng: np.random.Generator
) -> list[Pair]:
    """A slow request is known at the age of the bound; those that met a stall, at its end."""
    bounds = _bounds(buckets)
    found = [
        (_later(ours, math.ceil(bound)), _later(theirs, math.ceil(bound)))
        for (ours, theirs), bound in zip(
            _slow(buckets, FIRST_TOKEN_SECONDS, scenario, rates, rng), bounds.max(axis=0), strict=True
        )
    ]
    if not scenario.stall_seconds:
        return found
    above = np.maximum(0.0, 1.0 - bounds / scenario.stall_seconds)
    met: list[list[Counts]] = []
    for rate in rates:
        replicas = np.maximum(1.0, np.round(6.0 * rate / scenario.per_second)) * (rate > 0.0)
        stalls = rng.poisson(replicas / scenario.stall_every, (len(buckets), len(rate)))
        each = stalls * rate / np.maximum(1.0, replicas) * scenario.stall_seconds
        met.append(
            [_later(counts, math.ceil(scenario.stall_seconds)) for counts in _nested(above, each, rng)]
        )
    return [(a + c, b + d) for (a, b), c, d in zip(found, *met, strict=True)]


def _nested(above: Floats, rate: Floats, rng: np.random.Generator) -> list[Counts]:
    """Counts above each quantile, of requests with these shares above it (by run and quantile): who is above
    the p99 is above the p90."""
    found: list[Counts] = []
    total: Counts = np.zeros(rate.shape, dtype=np.int64)
    for i in reversed(range(len(QUANTILES))):
        part = above[:, i] - (above[:, i + 1] if found else 0.0)
        total = total + rng.poisson(np.maximum(part, 0.0)[:, None] * rate)
        found.insert(0, total)
    return found


def _bounds(buckets: Counts) -> Floats:
    bounds: Floats = np.vectorize(bucket_seconds)(buckets)
    return bounds


def _later(counts: Counts, seconds: int) -> Counts:
    return np.pad(counts, ((0, 0), (seconds, 0)))[:, : counts.shape[1]]


def _part(one: float, other: float) -> float:
    return one / (one + other) if one + other else 0.0


@dataclass(frozen=True)
class Found:
    """After how many seconds each run aborts (infinity: never), by these gates and by a rule over thresholds,
    and how many requests had failed at a client when the gates aborted."""

    seconds: Floats
    failed: Floats
    windowed: Floats

    def within(self, seconds: float) -> float:
        return float((self.seconds <= seconds).mean())

    @property
    def aborted(self) -> float:
        return float(np.isfinite(self.seconds).mean())


def found(scenario: Scenario, runs: int, seed: int, after: Scenario | None = None) -> Found:
    """Run a rollout often. With `after` the scenario goes on with that one, and its seconds are counted."""
    rng = np.random.default_rng(seed)
    parts: list[tuple[Floats, ...]] = []
    chunk = CHUNK_SECONDS // sum(seconds for each in (scenario, after) if each for _, seconds in each.steps)
    for start in range(0, runs, chunk):
        count, skipped = min(chunk, runs - start), 0
        seen = simulate(scenario, count, rng)
        if after is not None:
            seen, skipped = _joined_up(seen, simulate(after, count, rng)), len(seen.weights)
        seconds = aborts(joined(seen))
        until = np.arange(len(seen.weights)) < seconds[:, None]
        windowed = over_in_window(seen)
        parts.append((seconds - skipped, (seen.failed[0] * until).sum(axis=1), windowed - skipped))
    return Found(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def over_in_window(
    seen: Seen, limit: float = 0.05, window: int = 60, every: int = 10, failures: int = 4
) -> Floats:
    """Return when a rule aborts as users of Argo Rollouts write it: the target's error rate above `limit` in
    the last `window` seconds, looked at `every` so many, `failures` times."""
    sums = [np.cumsum(pair[0], axis=1) for pair in (seen.failed, seen.requests)]
    failed, requests = (counts - _later(counts, window) for counts in sums)
    is_over = (failed > limit * requests)[:, every - 1 :: every]
    reached = np.cumsum(is_over, axis=1) >= failures
    return np.where(reached.any(axis=1), (reached.argmax(axis=1) + 1.0) * every, math.inf)


def flagger(
    scenario: Scenario, runs: int, seed: int, threshold: int = 10, least_success: float = 0.99
) -> Floats:
    """Return when Flagger aborts: a check a minute, of that minute; a failed one, and one without requests,
    halts the advance, and `threshold` of them roll back."""
    rng = np.random.default_rng(seed)
    checks = np.concatenate(
        [np.full(math.ceil(seconds / 60), weight / 100) for weight, seconds in scenario.steps]
    )
    passed, failed = np.zeros(runs, dtype=np.int64), np.zeros(runs, dtype=np.int64)
    ended: Floats = np.full(runs, math.inf)
    for minute in range(1, len(checks) + threshold + 1):
        is_running = (passed < len(checks)) & (failed < threshold)
        rate = 60.0 * scenario.per_second * checks[np.minimum(passed, len(checks) - 1)]
        errors, fine = (
            rng.poisson(rate * scenario.target.errors),
            rng.poisson(rate * (1.0 - scenario.target.errors)),
        )
        is_good = fine > least_success * (errors + fine)
        passed += is_running & is_good
        failed += is_running & ~is_good
        ended[is_running & (failed >= threshold)] = 60.0 * minute
    return ended


def _joined_up(first: Seen, then: Seen) -> Seen:
    def both(one: Pair, other: Pair) -> Pair:
        return np.hstack([one[0], other[0]]), np.hstack([one[1], other[1]])

    return Seen(
        np.hstack([first.weights, then.weights]),
        both(first.errors, then.errors),
        [both(*each) for each in zip(first.first_token, then.first_token, strict=True)],
        [both(*each) for each in zip(first.between_tokens, then.between_tokens, strict=True)],
        {end: both(first.abnormal[end], then.abnormal[end]) for end in ABNORMAL_ENDS},
        both(first.pairs, then.pairs),
        first.before,
        first.thresholds,
        both(first.requests, then.requests),
        both(first.failed, then.failed),
    )


def with_sessions(runs: int, seed: int, sessions: int, *, each_request: bool = False) -> float:
    """Return the share of good rollouts that are aborted where requests belong to sessions of uneven size
    (Zipf), each alike in itself (slow or quick, long or short) and all of it on one revision. The store
    counts the first request of a session; with `each_request` see what that is for."""
    rng = np.random.default_rng(seed)
    return float(np.mean([_aborts_sessions(sessions, each_request, rng) for _ in range(runs)]))


def _aborts_sessions(sessions: int, each_request: bool, rng: np.random.Generator) -> bool:
    size = 1.0 / np.arange(1, sessions + 1)
    is_long, point = rng.random(sessions) < ABNORMAL_ENDS["length"], 100.0 * rng.random(sessions)
    median = FIRST_TOKEN_SECONDS * np.exp(SIGMA * rng.standard_normal(sessions))

    def come(count: int) -> tuple[Counts, Counts]:
        who = rng.choice(sessions, count, p=size / size.sum())
        return who, _buckets(median[who] * np.exp(0.3 * rng.standard_normal(count)))

    thresholds = freeze(Tally(first_token=_counted(come(BASELINE)[1])), 20.0)
    revisions: tuple[dict[str, Tally], dict[str, Tally]] = ({}, {})
    for weight, seconds in ROLLOUT[:2]:
        is_target, seen = (point < weight).tolist(), set[int]()
        for _ in range(seconds // 5):
            for session, bucket in zip(*(each.tolist() for each in come(100)), strict=True):
                tally = revisions[is_target[session]].setdefault(cohort_of("a", weight), Tally())
                tally.ends["ok"] = tally.ends.get("ok", 0) + 1
                if each_request or session not in seen:
                    tally.ends["length"] = tally.ends.get("length", 0) + bool(is_long[session])
                    tally.first_token[bucket] = tally.first_token.get(bucket, 0) + 1
                seen.add(session)
            if judge(*revisions, "a", thresholds, Limits()).verdict == "fails":
                return True
    return False


BASES = (0.0, 0.0001, 0.001, 0.005, 0.01, 0.02, 0.05)
LONG = 1_200  # seconds at one weight: no rule is cut short


def detection(runs: int, seed: int) -> list[list[str]]:
    """The rows of the table "how soon"."""

    def at(weight: int, seconds: int = LONG) -> Sequence[tuple[int, int]]:
        return ((weight, seconds),)

    errors = [
        (f"5 % errors, base {base * 100:g} %", Scenario(Revision(base), Revision(0.05), at(weight)), 60)
        for weight in (15, 10)
        for base in (0.0, 0.001, 0.005, 0.01, 0.02)
    ]
    failing = Revision(0.05)
    few = [
        ("5 % errors, base 0.1 %, one tenant", Scenario(Revision(0.001), failing, at(weight), tenants=1), 60)
        for weight in (15, 10)
    ]
    slow = [
        (
            f"{times:g} times as slow",
            Scenario(Revision(0.001), Revision(0.001, slower=times), at(weight, 300)),
            15,
        )
        for weight in (15, 10)
        for times in (3, 2, 1.5)
    ]
    other = [
        ("20 % errors, base 0.1 %", Scenario(Revision(0.001), Revision(0.2), at(15)), 60),
        ("half of the answers empty", Scenario(Revision(0.001), Revision(0.001, empty=0.5), at(15, 300)), 15),
    ]
    shadow = [
        (
            f"5 % errors in the shadow, base {base * 100:g} %",
            Scenario(Revision(base), Revision(0.05), at(0, 300)),
            20,
        )
        for base in (0.0, 0.001, 0.01)
    ]
    rows: list[list[str]] = []
    for name, scenario, within in [*errors, *few, *slow, *other, *shadow]:
        result = found(scenario, runs, seed)
        rows.append(_row(name, scenario, within, result, flagger(scenario, runs, seed)))
    late = [
        (f"{extra * 100:g} % more errors {when}, base {base * 100:g} %", base, extra, before, weight)
        for base, extra, when, before, weight in (
            (0.001, 0.05, "from the second step on", 240, 50),
            (0.01, 0.05, "from the second step on", 240, 50),
            (0.05, 0.05, "from the second step on", 240, 50),
            (0.001, 0.05, "after an hour's pause", 3_600, 15),
            (0.01, 0.05, "after an hour's pause", 3_600, 15),
            (0.01, 0.2, "after an hour's pause", 3_600, 15),
        )
    ]
    for name, base, extra, before, weight in late:
        good = Scenario(Revision(base), Revision(base), ((15, before),))
        bad = Scenario(Revision(base), Revision(base + extra), at(weight))
        result = found(good, runs, seed, after=bad)
        rows.append(_row(name, bad, 60, result, flagger(bad, runs, seed)))
    for base in (0.0, 0.001, 0.01, 0.02, 0.05):
        for what, worse in (
            *((f"{extra * 100:g} % more errors", Revision(base + extra)) for extra in (0.1, 0.2, 0.5)),
            ("half of the answers empty", Revision(base, empty=0.5)),
        ):
            scenario = Scenario(Revision(base), worse, at(100, 300))
            name, result = f"{what} as BlueGreen, base {base * 100:g} %", found(scenario, runs, seed)
            rows.append(_row(name, scenario, 60, result, flagger(scenario, runs, seed)))
    for what, worse in (
        ("20 % more errors", Revision(0.21)),
        ("50 % more errors", Revision(0.51)),
    ):
        good = Scenario(Revision(0.01), Revision(0.01), ((15, 60), (50, 60)))
        scenario = Scenario(Revision(0.01), worse, at(100, 300))
        result = found(good, runs, seed, after=scenario)
        rows.append(
            _row(f"{what} at 100 % only, base 1 %", scenario, 60, result, flagger(scenario, runs, seed))
        )
    return rows


def false_aborts(runs: int, seed: int) -> list[list[str]]:
    """The rows of the table "good rollouts that are aborted"."""
    rows: list[list[str]] = []
    for base in BASES:
        same = Revision(base)
        scenarios = [
            Scenario(same, same),
            Scenario(same, same, tenants=1),
            Scenario(same, same, steps=((0, 60), *ROLLOUT)),
            Scenario(same, same, steps=tuple((weight, 240) for weight in (5, 10, 25, 50))),
            Scenario(same, same, stall_seconds=3.0),
            Scenario(same, same, steps=((100, 300),)),
            Scenario(same, same, steps=((100, 300),), stall_seconds=3.0),
        ]
        results = [found(scenario, runs, seed) for scenario in scenarios]
        windowed = [float(np.isfinite(results[i].windowed).mean()) for i in (0, 3)]
        peers = [float(np.isfinite(flagger(scenarios[0], runs, seed, limit)).mean()) for limit in (10, 1)]
        shares = [*(result.aborted for result in results), *windowed, *peers]
        rows.append([f"{base * 100:g} %", *(f"{share * 100:.1f} %" for share in shares)])
    return rows


def _row(name: str, scenario: Scenario, within: int, result: Found, peer: Floats) -> list[str]:
    sees_errors = scenario.target.errors > scenario.stable.errors and scenario.steps[0][0] > 0
    return [
        name,
        f"{scenario.steps[0][0]} %",
        _quantiles(result.seconds),
        f"{result.within(within) * 100:.1f} % in {within} s",
        _quantiles(result.failed) if sees_errors else "0" if scenario.steps[0][0] == 0 else "–",
        _quantiles(result.windowed) if sees_errors else "–",
        _quantiles(peer) if sees_errors else "–",
    ]


def _quantiles(values: Floats) -> str:
    shown = (np.quantile(values, part, method="inverted_cdf") for part in (0.5, 0.9))
    return " / ".join(
        "never" if value == math.inf else f"{value:.0f}" if value >= 0 else "before" for value in shown
    )


HEADS = (
    [
        "bad revision",
        "weight",
        "seconds, p50 / p90",
        "found",
        "failed at clients, p50 / p90",
        "“> 5 % in 60 s”, 4 times",
        "Flagger’s defaults",
    ],
    [
        "base error rate",
        "15/50/100 %",
        "one tenant",
        "shadow first",
        "5/10/25/50 %",
        "replicas stall",
        "BlueGreen",
        "BlueGreen, replicas stall",
        "“> 5 % in 60 s”, 4 times",
        "the same, 5/10/25/50 %",
        "Flagger’s defaults",
        "Flagger, 1 failure",
    ],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=4_000, help="rollouts per row")
    parser.add_argument("--seed", type=int, default=9)
    options = parser.parse_args()
    for heads, rows in zip(HEADS, (detection, false_aborts), strict=True):
        for cells in (heads, ["---"] * len(heads), *rows(options.runs, options.seed)):
            print(f"| {' | '.join(cells)} |", flush=True)
        print()
    sizes = (20, 200, 2_000)
    for each_request in (False, True):
        shares = (with_sessions(200, options.seed, size, each_request=each_request) for size in sizes)
        counted = "each request" if each_request else "the first request of a session"
        print(f"| {counted} | {' | '.join(f'{share * 100:.1f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()

"""Evidence: does a rollout's target do worse than its stable, or than its limits allow? Pure.

Each gate looks at failures only and asks to which revision they belong. While the target has the share w of
the requests and fails r times as often as the stable, a failure is the target's with probability

    theta(r, w) = w r / (w r + 1 - w),

whatever the base rate is. The target's null hypothesis is r <= margin. For each ratio of a fixed mixture the
likelihood of all failures is divided by that at the margin; the mean is an *e-value*: under the null its
expectation is at most 1 at every moment and through every change of weight, so by Ville's inequality it ever
reaches 1 / alpha in at most alpha of all good rollouts, however often one looks (Lindon and Malek, "Anytime-
valid inference for multinomial count data", NeurIPS 2022). It depends on counts per weight alone: there is
nothing to keep between two looks, and nothing begins anew at a step.

The same formula serves all gates. A shadowed request whose two ends differ is a failure at w = 1/2 (McNemar's
test); one that breaks a limit which the share p of requests may break is a failure at w = p (a Bernoulli
test). "Slower than the stable's frozen quantile" is a failure as well, known as soon as a request without its
first token is older than that, so a hang is seen. A weighted mean of e-values is an e-value, and so the gates
are joined without a correction for their number.

Once the target has all requests nobody is beside it. Then it is judged by a Bernoulli test as well: the share
that may fail is what the stable's own share before was at most (an upper bound, from its requests before the
rollout and at the earlier weights), and a margin on top, since those figures are older than the target's. The
share knows nothing of the target's ends, and the larger it is, the smaller is the e-value, so all that has to
hold is that the target's true share is not above it.

No evidence against the target is none for it: that is the gate `requests`, which counts what ended well.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import msgspec

from tidegate.messages.outcomes import BUCKETS_PER_DOUBLING, Outcomes, Tally, bucket_of, bucket_seconds
from tidegate.messages.rollouts import GateState, GateView

ALPHA = 0.01  # the share of good rollouts that the gates may abort
ALLOWED_SLOWDOWN = 1.15  # so many times as long as the stable a target may take, if nobody says otherwise
# How many times as often a bad target fails, and how much of the evidence each ratio gets: most where the
# stable hardly ever fails, since there every second counts.
RATIOS: Mapping[float, float] = {1.5: 0.05, 2.5: 0.15, 5.0: 0.2, 15.0: 0.2, 60.0: 0.4}
# Each gate's share in the joined evidence. Errors have the most, being rare; a target that is slow or answers
# nothing shows it in every request, and is found within seconds with little.
SHARES: Mapping[str, float] = {
    "errors": 0.87,
    "shadow": 0.09,
    "firstToken": 0.015,
    "betweenTokens": 0.01,
    "abnormalEnds": 0.01,
    "limits": 0.005,
}
QUANTILES = (50, 90, 95, 99)  # percent
# Slow requests come together: a replica that stands still makes all wait that come meanwhile. What a revision
# gets within this time counts as one failure.
TOGETHER_SECONDS = 0.7
# A step is left once requests exclude, besides errors, that so much larger a share of them is slow, or ends
# abnormally, than of the stable's. Less is left to the gates.
SHARE_EXCESS = 0.2
LEAST_BASELINE = 50  # requests; of fewer neither a quantile nor a share says anything
# The part of a gate's evidence that is about the target at 100 %: so little that what is beside the stable is
# found as soon as without it, where each failure more costs seconds. At 100 % there is plenty.
ALONE = 0.01
# With this probability at most a share of the stable's is above its bound. Of a dozen bounds that is one of a
# thousand rollouts, of which the margin leaves none to a target that is as good as the stable.
DOUBT = 1e-4
MOST_LOST_REPLICAS = 2  # one more aborts
MOST_EVIDENCE = 1e12  # what is more is shown as this: JSON has no infinity
ABNORMAL_ENDS = {
    "empty": "empty answers",
    "instant": "stops at the first token",
    "length": "runs to the limit",
}
SILENCE = "The target has had no request that can be compared: it neither passes nor fails."
UNKNOWN = f"Nothing is known to compare with: the stable had fewer than {LEAST_BASELINE} requests before."
OTHER_TIMES = "At 100 % times are not compared with those of another hour; rollout.limits bounds them."


class Thresholds(msgspec.Struct, frozen=True):
    """The stable's buckets at `QUANTILES` when its rollout began (empty: it had too few requests), and how
    many requests the model got in a second."""

    first_token: tuple[int, ...] = ()
    between_tokens: tuple[int, ...] = ()
    per_second: float = 0.0

    def together(self, weight: float) -> float:
        """Return how many slow requests of the target, whose share is `weight`, count as one failure."""
        return max(1.0, TOGETHER_SECONDS * self.per_second * weight)


# For which requests to wait: none, those of a target beside its stable, those of one that has all.
More = Literal["", "beside", "alone"]


class Limits(msgspec.Struct, frozen=True):
    """What a target must keep to whatever the stable does; None: no limit. `error_rate` and `slow_share` are
    shares of requests in (0, 1); `slow_share` of them may be slower than the seconds say."""

    error_rate: float | None = None
    first_token_seconds: float | None = None
    between_tokens_seconds: float | None = None
    slow_share: float = 0.05


@dataclass(frozen=True, slots=True)
class Judgement:
    """`fails`: the joined `evidence` (an e-value) has reached `needed`. `waits`: fewer than the least
    requests have ended well (`clean` of `needed_clean`). `message` says which, with the numbers."""

    verdict: GateState
    message: str
    gates: list[GateView]
    clean: int
    needed_clean: int
    evidence: float
    needed: float


def freeze(baseline: Tally, per_second: float = 0.0) -> Thresholds:
    """Return the quantiles of requests that ended before those which they are to judge."""
    return Thresholds(_quantiles(baseline.first_token), _quantiles(baseline.between_tokens), per_second)


def needed_requests(rate: float, failures: int = 0, doubt: float = 0.05) -> int:
    """Return how many requests, of which so many failed, exclude an error rate of `rate`: it would give so
    few failures with a probability of `doubt` at most (Chernoff's bound, exact where none failed). Without a
    failure 59 for 5 %, 149 for 2 %, 299 for 1 %."""
    fewest = most = max(math.ceil(math.log(doubt) / math.log1p(-rate)), math.floor(failures / rate) + 1)
    while most * _divergence(failures / most, rate) < -math.log(doubt):
        fewest, most = most, 2 * most
    while fewest < most:
        middle = (fewest + most) // 2
        if middle * _divergence(failures / middle, rate) < -math.log(doubt):
            fewest = middle + 1
        else:
            most = middle
    return most


def _divergence(seen: float, rate: float) -> float:
    """Return how unlikely a share `seen` of failures is at `rate`, in nats a request (Kullback-Leibler); 0:
    it is no smaller."""
    if seen >= rate:
        return 0.0
    failed = seen * math.log(seen / rate) if seen else 0.0
    return failed + (1.0 - seen) * (math.log1p(-seen) - math.log1p(-rate))


def judge(
    stable: Outcomes | None,
    target: Outcomes,
    rollout: str,
    thresholds: Thresholds,
    limits: Limits,
    *,
    least_requests: int = 59,
    excess: float = 0.05,
    more: More = "",
    margin: float = 1.0,
    slowdown: float = 1.0,
    alpha: float = ALPHA,
) -> Judgement:
    """Judge by the cohorts of this rollout, and by what the stable did before all rollouts; `stable` is None
    for a model's first revision, which only has limits to keep to. `least_requests` must have ended well, and
    with `more` as many as exclude, whatever failed or was slow, an error rate that is `excess` above the
    stable's (`SHARE_EXCESS`: of the rest); at 100 % more than that aborts. `margin` says how many times as
    often as the stable beside it the target may fail, `slowdown` how many times as long it may take."""
    cohorts = _cohorts(stable or {}, target, rollout)
    gates = _limits(cohorts, limits, 1.0 if stable is None else SHARES["limits"])
    missing, why = 0, ""
    if stable is not None:
        questions = _questions(thresholds, slowdown, excess)
        alone = _alone(questions, stable.get("", Tally()), cohorts)
        gates = _comparisons(questions, cohorts, alone, thresholds, margin) + gates
        if more:
            missing, why = _missing(questions, cohorts) if more == "beside" else _missing_alone(alone)
    needed = 1.0 / alpha
    clean = sum(cohort.target.ends.get("ok", 0) for cohort in cohorts)
    needed_clean = max(least_requests, clean + missing)
    requests = _requests(clean, needed_clean, why)
    unlooked = 1.0 - sum(gate.share for gate in gates)  # gates without a view: an e-value of 1 each
    parts = [gate.log_part for gate in gates] + ([math.log(unlooked)] if unlooked > 1e-9 else [])
    joined = _log_sum(parts)
    failing: list[_Gate] = []
    if joined >= math.log(needed):
        # Most often one is enough; where only the sum is, the largest answers for it.
        failing = [gate for gate in gates if gate.log_part >= math.log(needed)]
        failing = failing or [max(gates, key=lambda gate: gate.log_part)]
    views = [requests, *(gate.view(needed, fails=gate in failing) for gate in gates)]
    failed = [view.message for view in views if view.state == "fails"]
    return Judgement(
        "fails" if failed else requests.state,
        " ".join(failed) or requests.message,
        views,
        clean,
        needed_clean,
        _shown(joined),
        needed,
    )


def hard_gates(
    *, load_error: str = "", failed_check: str = "", failed_probe: str = "", lost_replicas: int = 0
) -> list[GateView]:
    """Return the gates that need no statistics. A text says what happened; empty: it did not."""
    lost = "" if lost_replicas <= MOST_LOST_REPLICAS else f"It lost {lost_replicas} replicas."
    found = {"load": load_error, "selfCheck": failed_check, "probes": failed_probe, "restarts": lost}
    return [GateView(name, "fails" if text else "passes", text) for name, text in found.items()]


def log_e_value(
    failures: Iterable[tuple[float, float, float]],
    margin: float = 1.0,
    ratios: Mapping[float, float] = RATIOS,
) -> float:
    """Return the logarithm of the e-value of `failures`: (weight, those of the target, those of both).

    theta(r m, w) / theta(m, w) = r / (1 + (r - 1) theta(m, w)); for 1 - theta the same with 1 for r. Where up
    to k failures are one event, each is 1 / k of one: the mean of X^(1/k) is at most 1 where that of X is.
    """
    counted = [(w * margin / (w * margin + 1.0 - w), ours, both) for w, ours, both in failures]
    hits = sum(ours for _, ours, _ in counted)
    return _log_sum(
        math.log(part)
        + hits * math.log(ratio)
        - sum(both * math.log1p((ratio - 1.0) * theta) for theta, _, both in counted)
        for ratio, part in ratios.items()
    )


Measure = Callable[[Tally], tuple[int, int]]  # failures and requests


@dataclass(frozen=True, slots=True)
class _Cohort:
    """The requests of both revisions while the target had `weight` (a share)."""

    weight: float
    stable: Tally
    target: Tally


@dataclass(frozen=True, slots=True)
class _Question:
    """What a failure is for a gate: `what` names it, `words` say it of requests. `excess` is how much larger
    the target's share of failures may be; `ratios` are those that can be. Some come together."""

    gate: str
    what: str
    words: str
    measure: Measure
    excess: float = SHARE_EXCESS
    ratios: Mapping[float, float] = field(default_factory=lambda: RATIOS)
    comes_together: bool = False


@dataclass(frozen=True, slots=True)
class _Test:
    """One question to the counts: `what` names the failures, (failures, requests) of both revisions. `part`
    is how much it has of its gate's evidence."""

    what: str
    log_evidence: float
    target: tuple[int, int]
    stable: tuple[int, int] | None = None
    part: float = 1.0

    @property
    def log_part(self) -> float:
        return math.log(self.part) + self.log_evidence


@dataclass(frozen=True, slots=True)
class _Alone:
    """A question to the target at 100 %, of whose requests the share `allowed` may fail."""

    question: _Question
    allowed: float
    test: _Test


@dataclass(frozen=True, slots=True)
class _Gate:
    """Tests that share a gate's evidence; of those that have seen a request the one that says most speaks for
    it. `silence` is said where there is nothing to judge by."""

    name: str
    share: float
    tests: Sequence[_Test]
    silence: str

    @property
    def log_evidence(self) -> float:
        return _mean(self.tests)

    @property
    def log_part(self) -> float:
        return math.log(self.share) + self.log_evidence

    def view(self, needed: float, *, fails: bool) -> GateView:
        asked = [test for test in self.tests if test.target[1]] or self.tests
        test = max(asked, key=lambda each: each.log_part, default=_Test("", 0.0, (0, 0)))
        stable = test.stable or (0, 0)
        evidence, alone = _shown(self.log_evidence), needed / self.share
        message = self.silence
        if test.target[1]:
            against = f", {stable[0]} of {stable[1]} of the stable" if test.stable else ""
            message = (
                f"{test.what}: {test.target[0]} of {test.target[1]} requests of the target{against}; "
                f"e-value {_number(evidence)}, aborts at {_number(alone)}."
            )
        return GateView(
            self.name,
            "fails" if fails else "passes" if test.target[1] else "waits",
            message,
            evidence=evidence,
            needed=alone,
            stable_failures=stable[0],
            stable_requests=stable[1],
            target_failures=test.target[0],
            target_requests=test.target[1],
        )


def _cohorts(stable: Outcomes, target: Outcomes, rollout: str) -> list[_Cohort]:
    found: list[_Cohort] = []
    for label in sorted({*stable, *target}):
        name, _, weight = label.rpartition(".")
        if name == rollout and weight.isdecimal():
            found.append(_Cohort(int(weight) / 100, stable.get(label, Tally()), target.get(label, Tally())))
    return found


def _questions(thresholds: Thresholds, slowdown: float, excess: float) -> list[_Question]:
    found = [_Question("errors", "Errors", "failed", _errors, excess)]
    slack = buckets_within(slowdown)
    for gate, what, words, buckets, measure in (
        ("firstToken", "First token", "were slow to begin", thresholds.first_token, _first_tokens),
        ("betweenTokens", "Time between tokens", "were slow", thresholds.between_tokens, _between_tokens),
    ):
        for percent, bucket in zip(QUANTILES, buckets, strict=False):
            seconds, was = bucket_seconds(bucket + slack), bucket_seconds(bucket)
            found.append(
                _Question(
                    gate,
                    f"{what} above {seconds:.3g} s (the stable's p{percent} was at most {was:.3g} s)",
                    words,
                    measure(bucket + slack),
                    ratios=possible_ratios(percent),
                    comes_together=True,
                )
            )
    return found + [
        _Question("abnormalEnds", f"Abnormal ends ({what})", f"had {what}", _kind(end))
        for end, what in ABNORMAL_ENDS.items()
    ]


def _comparisons(
    questions: Sequence[_Question],
    cohorts: Sequence[_Cohort],
    alone: Sequence[_Alone],
    thresholds: Thresholds,
    margin: float,
) -> list[_Gate]:
    # Where only one revision has requests, a failure says nothing about which of them it hits.
    both = [cohort for cohort in cohorts if 0.0 < cohort.weight < 1.0]
    is_alone = any(cohort.target.ends or cohort.target.waiting_first for cohort in _served_alone(cohorts))
    gates: list[_Gate] = []
    for name in ("errors", "firstToken", "betweenTokens", "abnormalEnds"):
        asked = [each for each in questions if each.gate == name]
        compared = [_compared(each, both, margin, thresholds) for each in asked]
        later = [each.test for each in alone if each.question.gate == name]
        are_times = any(each.comes_together for each in asked)
        silence = UNKNOWN if not asked or (is_alone and not later) else SILENCE
        if is_alone and are_times:
            silence = OTHER_TIMES
        part = 0.0 if are_times else ALONE
        tests = [*_parted(compared, 1.0 - part), *_parted(later, part * len(later) / max(1, len(asked)))]
        gates.append(_Gate(name, SHARES[name], tests, silence))
    pairs = _pairs(cohorts, margin)
    return [*gates, _Gate("shadow", SHARES["shadow"], pairs, "")] if pairs else gates


def _alone(questions: Sequence[_Question], before: Tally, cohorts: Sequence[_Cohort]) -> list[_Alone]:
    """Ask the target at 100 % what its stable was asked before: `before` all rollouts, and in this one."""
    target = [cohort.target for cohort in _served_alone(cohorts)]
    beside = [cohort.stable for cohort in cohorts if cohort.weight < 1.0]
    found: list[_Alone] = []
    for question in questions:
        if question.comes_together:
            continue  # times follow the machine's load from hour to hour: only those beside it say something
        measure, together = question.measure, 1.0
        if measure is _errors:
            measure, together = _failed, _burst(target)
        stable, lately = _sum(measure, [before, *beside]), _sum(measure, beside)
        allowed = allowed_share(question.excess, stable, lately)
        if allowed >= 1.0:
            continue
        what = (
            f"{question.what} at 100 %, compared with what the stable did before (a share of {allowed:.3g} "
            "is allowed)"
        )
        found.append(_Alone(question, allowed, _bernoulli(what, allowed, measure, target, together, stable)))
    return found


def _served_alone(cohorts: Sequence[_Cohort]) -> list[_Cohort]:
    return [cohort for cohort in cohorts if cohort.weight == 1.0]


def _limits(cohorts: Sequence[_Cohort], limits: Limits, share: float) -> list[_Gate]:
    asked: list[tuple[str, str, float, Measure]] = []
    if limits.error_rate is not None:
        rate = limits.error_rate
        asked.append(("limits.errorRate", f"Errors, of which {rate:.3g} are allowed", rate, _failed))
    first, between = limits.first_token_seconds, limits.between_tokens_seconds
    for name, what, seconds, count in (
        ("limits.firstTokenSeconds", "First token", first, _first_tokens),
        ("limits.betweenTokensSeconds", "Time between tokens", between, _between_tokens),
    ):
        if seconds is not None:
            what = f"{what} above {seconds:.3g} s, of which {limits.slow_share:.3g} are allowed"
            asked.append((name, what, limits.slow_share, count(bucket_of(seconds))))
    silence = "The target has had no request: it neither passes nor fails."
    # At weight 0 the target only has copies, which wait behind all others.
    served = [cohort.target for cohort in cohorts if cohort.weight > 0.0]
    gates: list[_Gate] = []
    for name, what, allowed, measure in asked:
        together = _burst(served) if measure is _failed else 1.0
        test = _bernoulli(what, allowed, measure, served, together)
        gates.append(_Gate(name, share / len(asked), [test], silence))
    return gates


def _bernoulli(
    what: str,
    allowed: float,
    measure: Measure,
    target: Sequence[Tally],
    together: float,
    stable: tuple[int, int] | None = None,
) -> _Test:
    """It is the same formula: a request that fails is one of the target, one that does not is not, and the
    weight is the share that may fail."""
    failures, requests = _sum(measure, target)
    evidence = log_e_value([(allowed, failures / together, requests / together)])
    return _Test(what, evidence, (failures, requests), stable)


def _requests(clean: int, least: int, why: str) -> GateView:
    """Absence of an alarm is no evidence: so many requests must have ended well."""
    state: GateState = "waits" if clean < least else "passes"
    message = f"{clean} of {least} requests of the target ended well"
    if clean < least:
        message += f", and {why}: it waits for more." if why else ": it waits for more."
    else:
        message += "."
    if not least:
        message = f"No requests are asked for (minRequests: 0), it goes by the clock; {clean} ended well."
    return GateView("requests", state, message, target_requests=clean)


def _missing(questions: Sequence[_Question], cohorts: Sequence[_Cohort]) -> tuple[int, str]:
    """Return how many more requests of the target exclude that it does so much worse than the stable beside
    it, given those that did badly; and which of them ask for the most."""
    # Copies, which a target has at weight 0, wait behind all others.
    served = [each for each in cohorts if 0.0 < each.weight < 1.0]
    copied = [each for each in cohorts if each.weight < 1.0]
    found = [_more_requests(each, copied if each.measure is _errors else served) for each in questions]
    return max(found, key=lambda each: each[0])


def _more_requests(question: _Question, cohorts: Sequence[_Cohort]) -> tuple[int, str]:
    measure = question.measure
    bad, requests = _sum(measure, [cohort.target for cohort in cohorts])
    stable_bad, stable_requests = _sum(measure, [cohort.stable for cohort in cohorts])
    rate = question.excess + (stable_bad / stable_requests if stable_requests else 0.0)
    if rate >= 1.0 or not (requests or stable_requests or measure is _errors):
        # No target is so much worse, or there is nothing to measure: one token has no time between.
        return 0, ""
    return max(0, needed_requests(rate, bad) - requests), f"{bad} {question.words}" if bad else ""


def _missing_alone(alone: Sequence[_Alone]) -> tuple[int, str]:
    """Return the same of a target that has all requests, where any did badly."""
    found = [(0, "")]
    for each in alone:
        bad, requests = each.test.target
        if bad:
            left = needed_requests(each.allowed, bad) - requests
            found.append((max(0, left), f"{bad} {each.question.words}"))
    return max(found, key=lambda each: each[0])


def _compared(
    question: _Question, cohorts: Sequence[_Cohort], margin: float, thresholds: Thresholds
) -> _Test:
    failures, measure = [], question.measure
    for each in cohorts:
        events = thresholds.together(each.weight) if question.comes_together else 1.0
        ours, theirs = measure(each.target)[0], measure(each.stable)[0]
        failures.append((each.weight, ours / events, (ours + theirs) / events))
    return _Test(
        question.what,
        log_e_value(failures, margin, question.ratios),
        _sum(measure, [cohort.target for cohort in cohorts]),
        _sum(measure, [cohort.stable for cohort in cohorts]),
    )


def _parted(tests: Sequence[_Test], part: float) -> list[_Test]:
    return [replace(test, part=part / len(tests)) for test in tests]


def allowed_share(excess: float, stable: tuple[int, int], lately: tuple[int, int]) -> float:
    """Return the share of failures that a target at 100 % may have, given (failures, requests) of the stable
    in all and those of them in this rollout; 1 or more: it cannot be judged."""
    if stable[1] < LEAST_BASELINE:
        return 1.0
    # What has become worse lately is not the target's to answer for.
    return excess + max(upper_share(*stable), lately[0] / lately[1] if lately[1] else 0.0)


def upper_share(failures: int, requests: int, doubt: float = DOUBT) -> float:
    """Return the largest share of failures that so many of so many requests leave possible: a larger one
    gives so few with a probability of `doubt` at most (Chernoff's bound)."""
    seen = failures / requests
    low, high = seen, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if requests * _divergence(seen, middle) < -math.log(doubt) else (low, middle)
        )
    return high


def buckets_within(slowdown: float) -> int:
    """Return how many buckets further what takes so many times as long may be found."""
    return math.ceil(math.log2(slowdown) * BUCKETS_PER_DOUBLING - 1e-9)


def possible_ratios(percent: int) -> dict[float, float]:
    """Return the part of the mixture that a quantile can show: of the stable's requests one in two exceeds
    its p50, so no target exceeds it 60 times as often."""
    possible = {ratio: part for ratio, part in RATIOS.items() if ratio * (100 - percent) <= 100}
    return {ratio: part / sum(possible.values()) for ratio, part in possible.items()}


def _pairs(cohorts: Sequence[_Cohort], margin: float) -> list[_Test]:
    """Requests that ran on both revisions: where both ends are alike, nothing is learnt (McNemar)."""
    ends: Counter[str] = Counter()
    for cohort in cohorts:
        ends.update(cohort.target.pairs)
        ends.update(cohort.stable.pairs)
    if not ends.total():
        return []
    discordant = (0.5, ends["01"], ends["01"] + ends["10"])
    return [
        _Test(
            "Errors in the shadow",
            log_e_value([discordant], margin),
            (ends["01"] + ends["11"], ends.total()),
            (ends["10"] + ends["11"], ends.total()),
        )
    ]


def _errors(tally: Tally) -> tuple[int, int]:
    failures = tally.ends.get("error", 0) + tally.ends.get("lost", 0)
    return failures, failures + tally.ends.get("ok", 0)


def _failed(tally: Tally) -> tuple[int, int]:
    """All errors, also those that came together: what share of the requests failed."""
    failures = _errors(tally)[0] + tally.ends.get("again", 0)
    return failures, failures + tally.ends.get("ok", 0)


def _burst(tallies: Sequence[Tally]) -> float:
    """Return how many errors came together, which count as one failure."""
    return max(1.0, _sum(_failed, tallies)[0] / max(1, _sum(_errors, tallies)[0]))


def _kind(end: str) -> Measure:
    return lambda tally: (tally.ends.get(end, 0), tally.ends.get("ok", 0))


def _first_tokens(bucket: int) -> Measure:
    """A request without its first token counts once it is older than the bucket."""

    def measure(tally: Tally) -> tuple[int, int]:
        hanging = _above(bucket, tally.waiting_first)
        return _above(bucket, tally.first_token) + hanging, sum(tally.first_token.values()) + hanging

    return measure


def _between_tokens(bucket: int) -> Measure:
    return lambda tally: (_above(bucket, tally.between_tokens), sum(tally.between_tokens.values()))


def _above(bucket: int, counts: Mapping[int, int]) -> int:
    return sum(count for number, count in counts.items() if number > bucket)


def _sum(measure: Measure, tallies: Iterable[Tally]) -> tuple[int, int]:
    counts = [measure(tally) for tally in tallies]
    return sum(failures for failures, _ in counts), sum(requests for _, requests in counts)


def _quantiles(counts: Mapping[int, int]) -> tuple[int, ...]:
    total = sum(counts.values())
    if total < LEAST_BASELINE:
        return ()
    ordered = sorted(counts)
    reached = list(accumulate(counts[bucket] for bucket in ordered))
    return tuple(ordered[bisect_left(reached, math.ceil(total * percent / 100))] for percent in QUANTILES)


def _mean(tests: Sequence[_Test]) -> float:
    """The logarithm of the tests' mean by their parts; what is left of them is an e-value of 1."""
    left = 1.0 - sum(test.part for test in tests)
    return _log_sum([test.log_part for test in tests] + ([math.log(left)] if left > 1e-9 else []))


def _log_sum(logs: Iterable[float]) -> float:
    """The logarithm of a sum, of which neither the terms nor the sum need be a float."""
    terms = list(logs)
    most = max(terms)
    return most + math.log(sum(math.exp(term - most) for term in terms))


def _shown(log_evidence: float) -> float:
    return math.exp(min(log_evidence, math.log(MOST_EVIDENCE)))


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"

"""Evidence: the e-values keep their bound whatever the weights do, and read nothing but their own rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.control.evidence import (
    ALPHA,
    DOUBT,
    LEAST_BASELINE,
    QUANTILES,
    RATIOS,
    SHARES,
    Judgement,
    Limits,
    Thresholds,
    freeze,
    hard_gates,
    judge,
    log_e_value,
    needed_requests,
    possible_ratios,
    upper_share,
)
from tidegate.messages.outcomes import Outcomes, Tally, bucket_of, cohort_of
from tidegate.messages.rollouts import GateView

ID = "6929f0a1"
QUICK, SLOW, HANGS = bucket_of(0.3), bucket_of(0.9), bucket_of(30.0)
KNOWN = Thresholds((QUICK, QUICK, QUICK, SLOW), (QUICK, QUICK, QUICK, SLOW))


def ends(ok: int = 0, **others: int) -> Tally:
    return Tally(ends={"ok": ok, **others})


def at(weight: int, tally: Tally, rollout: str = ID) -> dict[str, Tally]:
    return {cohort_of(rollout, weight): tally}


def judged(stable: Outcomes | None, target: Outcomes, **options: Any) -> Judgement:
    thresholds = options.pop("thresholds", KNOWN)
    return judge(stable, target, ID, thresholds, options.pop("limits", Limits()), **options)


def gate(judgement: Judgement, name: str) -> GateView:
    return next(view for view in judgement.gates if view.name == name)


# --- the bound


def histories(
    odds: float, weight_after: Callable[[tuple[bool, ...]], float], events: int
) -> Iterator[tuple[float, list[tuple[float, bool]]]]:
    """Every way in which `events` failures can fall on the two revisions, with its probability. Before each
    the weight is chosen from all that has been seen."""
    for marks in product((True, False), repeat=events):
        chance, history = 1.0, []
        for i, is_target in enumerate(marks):
            weight = weight_after(marks[:i])
            theta = weight * odds / (weight * odds + 1.0 - weight)
            chance *= theta if is_target else 1.0 - theta
            history.append((weight, is_target))
        yield chance, history


def counted(history: list[tuple[float, bool]]) -> list[tuple[float, float, float]]:
    weights = sorted({weight for weight, _ in history})
    return [
        (
            weight,
            sum(mark for at, mark in history if at == weight),
            sum(at == weight for at, _ in history),
        )
        for weight in weights
    ]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([0.2, 1.0]), st.sampled_from([1.0, 1.5]))
def test_under_the_null_the_mean_is_at_most_1_for_any_weights_chosen_from_what_was_seen(
    data: st.DataObject, odds: float, margin: float
) -> None:
    weights = st.sampled_from([0.01, 0.05, 0.15, 0.5, 0.9, 0.99])
    policy = {seen: data.draw(weights) for n in range(6) for seen in product((True, False), repeat=n)}
    mean = sum(
        chance * math.exp(log_e_value(counted(history), margin))
        for chance, history in histories(odds * margin, lambda seen: policy[seen], 6)
    )
    assert mean <= 1.0 + 1e-9
    if odds == 1.0:  # at the edge of the null nothing is given away
        assert mean == pytest.approx(1.0)


def test_above_the_null_it_grows() -> None:
    mean = sum(
        chance * math.exp(log_e_value(counted(history)))
        for chance, history in histories(5.0, lambda _: 0.15, 8)
    )
    assert mean > 10


@pytest.mark.parametrize("margin", [1.0, 1.5])
def test_it_ever_reaches_its_bound_in_no_more_of_all_histories_than_it_says(margin: float) -> None:
    def grows_while_it_is_lucky(seen: tuple[bool, ...]) -> float:
        return min(0.95, 0.15 + 0.1 * sum(not mark for mark in seen))

    reached = sum(
        chance
        for chance, history in histories(margin, grows_while_it_is_lucky, 11)
        if any(log_e_value(counted(history[:n]), margin) >= math.log(10) for n in range(1, 12))
    )
    assert 0.0 < reached <= 0.1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_failures_that_come_together_keep_the_bound_where_they_count_as_one(size: int) -> None:
    limit = 5.0
    mean = sum(
        chance
        * math.exp(log_e_value([(w, m * size / limit, n * size / limit) for w, m, n in counted(history)]))
        for chance, history in histories(1.0, lambda _: 0.15, 8)
    )
    assert mean <= 1.0 + 1e-9


def test_all_gates_together_keep_the_bound() -> None:
    """Failures of every kind, one after another, each on either revision by its weight."""
    kinds: list[tuple[int, Callable[[], Tally]]] = [
        (15, lambda: ends(error=1)),
        (15, lambda: Tally(first_token={HANGS: 1})),
        (15, lambda: Tally(waiting_first={HANGS: 1})),
        (50, lambda: ends(ok=1, empty=1)),
        (50, lambda: Tally(between_tokens={HANGS: 1})),
        (50, lambda: ends(lost=1)),
        (50, lambda: ends(error=1)),
    ]
    mean = 0.0
    for marks in product((True, False), repeat=len(kinds)):
        chance = 1.0
        sides: tuple[dict[str, Tally], dict[str, Tally]] = ({}, {})
        for (weight, made), is_target in zip(kinds, marks, strict=True):
            chance *= weight / 100 if is_target else 1.0 - weight / 100
            into, one = sides[is_target].setdefault(cohort_of(ID, weight), Tally()), made()
            for name, count in one.ends.items():
                into.ends[name] = into.ends.get(name, 0) + count
            into.first_token |= one.first_token
            into.between_tokens |= one.between_tokens
            into.waiting_first |= one.waiting_first
        mean += chance * judged(*sides).evidence
    assert mean == pytest.approx(1.0)


def test_the_shares_and_each_mixture_sum_to_1() -> None:
    assert sum(SHARES.values()) == pytest.approx(1.0)
    for mixture in (RATIOS, *map(possible_ratios, QUANTILES)):
        assert sum(mixture.values()) == pytest.approx(1.0)
        assert min(mixture) > 1.0
    assert set(possible_ratios(50)) == {1.5}


@pytest.mark.parametrize("weight", [0, 100])
def test_where_one_revision_has_all_requests_failures_say_nothing_about_the_odds(weight: int) -> None:
    """And with fewer than 50 of the stable's nothing about its share either."""
    told = judged(at(15, ends(ok=40, error=2)), at(15, ends(ok=150, error=2)))
    more = judged(
        {**at(15, ends(ok=40, error=2)), **at(weight, ends(error=500 if weight else 7))},
        {**at(15, ends(ok=150, error=2)), **at(weight, ends(ok=10, error=500, empty=3))},
    )
    assert more.evidence == told.evidence
    assert [view.evidence for view in more.gates] == [view.evidence for view in told.gates]


# --- what it finds, and what it does not


def test_a_stable_without_an_error_does_not_break_it() -> None:
    none = judged(at(15, ends(ok=1_000)), at(15, ends(ok=170)))
    assert none.verdict == "passes"
    assert none.evidence == pytest.approx(1.0)
    some = judged(at(15, ends(ok=1_000)), at(15, ends(ok=165, error=5)))
    assert some.verdict == "fails"
    assert some.message.startswith(
        "Errors: 5 of 170 requests of the target, 0 of 1000 of the stable; e-value 3,9"
    )
    assert gate(some, "errors").needed == pytest.approx(100 / 0.87)


def test_a_lost_replica_is_an_error() -> None:
    assert judged(at(15, ends(ok=1_000)), at(15, ends(ok=165, lost=5))).verdict == "fails"


def test_the_stable_s_own_failures_abort_no_target() -> None:
    bad = Tally(ends={"ok": 500, "error": 500, "empty": 200}, first_token={HANGS: 900}, pairs={"10": 100})
    good = Tally(ends={"ok": 170}, first_token={QUICK: 170})
    judgement = judged(at(15, bad), at(15, good))
    assert judgement.verdict == "passes"
    assert max(view.evidence for view in judgement.gates) == pytest.approx(1.0)
    assert gate(judgement, "errors").evidence < 0.2


def test_an_equally_bad_target_passes() -> None:
    assert judged(at(15, ends(ok=8_500, error=850)), at(15, ends(ok=1_500, error=150))).verdict == "passes"


@pytest.mark.parametrize("other", ["", ".15", "5e1f.15", f"{ID}r.15", f"{ID}.x", f"{ID}.", f"x.{ID}.15"])
def test_counts_of_another_rollout_are_not_read(other: str) -> None:
    bad = Tally(ends={"ok": 10, "error": 5_000, "lost": 9}, first_token={HANGS: 90}, pairs={"01": 90})
    for stable, target in (({other: bad}, {}), ({}, {other: bad}), ({other: bad}, {other: bad})):
        judgement = judged(stable, target, limits=Limits(error_rate=0.01))
        assert (judgement.verdict, judgement.clean) == ("waits", 0)
        assert judgement.evidence == pytest.approx(1.0)


def test_nothing_begins_anew_at_a_step() -> None:
    first = at(15, ends(ok=1_000)), at(15, ends(ok=170, error=2))
    second = at(50, ends(ok=1_000)), at(50, ends(ok=990, error=5))
    assert judged(*first).verdict == judged(*second).verdict == "passes"
    assert judged(first[0] | second[0], first[1] | second[1]).verdict == "fails"


def test_a_margin_lets_a_target_be_that_much_worse() -> None:
    stable, target = at(50, ends(ok=100_000, error=1_000)), at(50, ends(ok=100_000, error=1_400))
    assert judged(stable, target).verdict == "fails"
    assert judged(stable, target, margin=1.5).verdict == "passes"
    assert judged(stable, at(50, ends(ok=100_000, error=3_000)), margin=1.5).verdict == "fails"


def test_a_hang_is_seen_before_any_request_has_ended() -> None:
    served = Tally(first_token={QUICK: 900, SLOW: 90, HANGS: 10})
    hanging = judged(at(15, served), at(15, Tally(waiting_first={HANGS: 20})))
    assert hanging.verdict == "fails"
    assert gate(hanging, "firstToken").target_failures == 20
    young = judged(at(15, served), at(15, Tally(waiting_first={QUICK: 20})))
    assert young.verdict == "waits"


@pytest.mark.parametrize(("rate", "failures"), [(0.05, 1), (0.05, 7), (0.02, 3), (0.3, 40)])
def test_each_failure_asks_for_more_requests(rate: float, failures: int) -> None:
    """So few failures are as unlikely as is said, and one request less does not say it by the bound."""
    needed = needed_requests(rate, failures)
    chance = sum(
        math.exp(
            math.lgamma(needed + 1)
            - math.lgamma(k + 1)
            - math.lgamma(needed - k + 1)
            + k * math.log(rate)
            + (needed - k) * math.log1p(-rate)
        )
        for k in range(failures + 1)
    )
    assert chance <= 0.05
    assert needed_requests(rate, failures - 1) < needed < 4 * (failures + 3) / rate
    assert failures / needed < rate


def test_as_many_good_requests_are_no_evidence_where_others_failed() -> None:
    """The complaint about thresholds: 5 % of errors passed for 59 good requests."""
    stable = at(15, ends(ok=340))
    assert judged(stable, at(15, ends(ok=60)), more="beside").verdict == "passes"
    failing = judged(stable, at(15, ends(ok=60, error=1)), more="beside")
    assert (failing.verdict, failing.needed_clean) == ("waits", needed_requests(0.05, 1) - 1)
    assert "60 of 112 requests" in failing.message
    assert judged(stable, at(15, ends(ok=112, error=1)), more="beside").verdict == "passes"
    # What fails as often on the stable is not the target's to prove.
    alike = judged(at(15, ends(ok=3_230, error=170)), at(15, ends(ok=600, error=30)), more="beside")
    assert alike.verdict == "passes"


@pytest.mark.parametrize(
    "bad",
    [
        Tally({"ok": 60}, first_token={HANGS: 60}),
        Tally({"ok": 60}, between_tokens={SLOW: 60}),
        Tally({"ok": 60, "empty": 30}),
        Tally({"ok": 60}, waiting_first={HANGS: 25}, first_token={QUICK: 60}),
    ],
    ids=["first token", "between tokens", "empty", "hang"],
)
def test_no_step_is_left_by_a_target_that_is_slow_or_says_nothing(bad: Tally) -> None:
    """Also before its gate is sure of it."""
    even = Tally({"ok": 100}, first_token={QUICK: 100}, between_tokens={QUICK: 100})
    thresholds, stable = freeze(even), at(15, even)
    found = judged(stable, at(15, bad), more="beside", thresholds=thresholds)
    assert (found.verdict, found.clean) in (("waits", 60), ("fails", 60))
    assert found.needed_clean > 100
    alike = at(15, Tally({"ok": 60}, first_token={QUICK: 60}, between_tokens={QUICK: 60}))
    assert judged(stable, alike, more="beside", thresholds=thresholds).verdict == "passes"


def test_where_the_stable_is_as_bad_the_target_is_not_held() -> None:
    thresholds = freeze(Tally(first_token={QUICK: 100}))
    stable = at(15, Tally({"ok": 850}, first_token={HANGS: 850}))
    target = at(15, Tally({"ok": 150}, first_token={HANGS: 150}))
    assert judged(stable, target, more="beside", thresholds=thresholds).verdict == "passes"


def test_copies_count_as_evidence_on_errors() -> None:
    stable, copies = at(0, Tally({"ok": 100})), at(0, Tally({"ok": 60}, first_token={HANGS: 60}))
    assert judged(stable, copies, more="beside").verdict == "passes"


def test_what_is_no_slower_than_is_allowed_is_no_failure() -> None:
    """A target in the next bucket may be slower by a hair only: buckets have ends."""
    thresholds = freeze(Tally(first_token={QUICK: 1000}, between_tokens={QUICK: 1000}))
    even = at(15, Tally({"ok": 1000}, first_token={QUICK: 1000}))
    slower = {each: at(15, Tally({"ok": 200}, first_token={QUICK + each: 200})) for each in (1, 2, 3)}

    def verdict(buckets: int, slowdown: float) -> str:
        return judged(even, slower[buckets], thresholds=thresholds, slowdown=slowdown).verdict

    assert verdict(1, 1.0) == verdict(2, 1.15) == verdict(3, 1.4) == "fails"
    assert verdict(1, 1.15) == verdict(2, 1.4) == "passes"


def test_of_a_quantile_the_one_that_says_most_is_named_with_its_seconds() -> None:
    served = Tally(first_token={QUICK: 500, SLOW: 490, HANGS: 10})
    judgement = judged(at(15, served), at(15, Tally(first_token={QUICK: 30, SLOW: 30, HANGS: 10})))
    assert gate(judgement, "firstToken").state == "passes"
    said = gate(judgement, "firstToken").message
    assert said.startswith(
        "First token above 1.02 s (the stable's p99 was at most 1.02 s): 10 of 70 requests"
    )


def test_requests_that_are_slow_together_count_as_one() -> None:
    """A replica that stands still for two seconds at 40 requests a second."""
    stalled = at(15, Tally(first_token={QUICK: 990})), at(15, Tally(first_token={QUICK: 150, HANGS: 12}))
    assert judged(*stalled).verdict == "fails"
    busy = msgspec.structs.replace(KNOWN, per_second=40.0)
    assert gate(judged(*stalled, thresholds=busy), "firstToken").state == "passes"


@pytest.mark.parametrize("end", ["empty", "instant", "length"])
def test_abnormal_ends_are_found_by_kind(end: str) -> None:
    stable = at(15, ends(ok=1_000, empty=1, instant=10, length=100))
    usual = {"empty": 0, "instant": 2, "length": 17}
    assert judged(stable, at(15, ends(ok=170, **usual))).verdict == "passes"
    judgement = judged(stable, at(15, ends(ok=170, **{**usual, end: 100})))
    assert [view.name for view in judgement.gates if view.state == "fails"] == ["abnormalEnds"]


def test_between_tokens_is_compared_as_well() -> None:
    stable, target = Tally(between_tokens={QUICK: 1_000}), Tally(between_tokens={HANGS: 30, QUICK: 100})
    judgement = judged(at(15, stable), at(15, target))
    assert [view.name for view in judgement.gates if view.state == "fails"] == ["betweenTokens"]


@pytest.mark.parametrize("weight", [0, 15])
def test_of_a_shadow_s_pairs_only_those_count_that_differ(weight: int) -> None:
    agree = judged({}, at(weight, Tally(pairs={"00": 5_000, "11": 700})))
    assert gate(agree, "shadow").evidence == pytest.approx(1.0)
    both = judged({}, at(weight, Tally(pairs={"00": 400, "11": 7, "01": 20, "10": 19})))
    assert gate(both, "shadow").state == "passes"
    worse = judged({}, at(weight, Tally(pairs={"00": 400, "11": 7, "01": 15})))
    assert gate(worse, "shadow").state == worse.verdict == "fails"
    assert worse.message.startswith("Errors in the shadow: 22 of 422 requests of the target, 7 of 422")
    mirrored = judged({}, at(weight, Tally(pairs={"00": 400, "11": 7, "10": 15})))
    assert gate(mirrored, "shadow").evidence < 0.5


def test_an_e_value_counts_by_its_gate_s_share() -> None:
    stable = Tally(ends={"ok": 1_000}, first_token={QUICK: 1_000})
    judgement = judged(at(15, stable), at(15, Tally(ends={"ok": 100}, first_token={HANGS: 5, QUICK: 60})))
    view = gate(judgement, "firstToken")
    assert 1 / ALPHA < view.evidence < view.needed == pytest.approx(1 / ALPHA / SHARES["firstToken"])
    assert view.state == judgement.verdict == "passes"


def test_gates_that_fail_only_together_abort_by_the_largest() -> None:
    stable = Tally(ends={"ok": 1_000}, first_token={QUICK: 1_000}, pairs={"00": 500})
    one = Tally(ends={"ok": 100, "error": 2}, pairs={"00": 500, "01": 8})
    for errors, pairs in product(range(2, 5), range(4, 14)):
        one.ends["error"], one.pairs["01"] = errors, pairs
        judgement = judged(at(15, stable), at(15, one))
        alone = [view for view in judgement.gates if view.needed and view.evidence >= view.needed]
        if judgement.verdict == "fails" and not alone:
            failing = [view for view in judgement.gates if view.state == "fails"]
            assert len(failing) == 1
            assert failing[0].evidence / failing[0].needed == max(
                view.evidence / view.needed for view in judgement.gates if view.needed
            )
            return
    raise AssertionError("no counts at which only the sum is enough")


def test_a_million_failures_overflow_nothing() -> None:
    many = Tally(
        ends={"ok": 10**6, "error": 10**6, "empty": 10**6},
        first_token={HANGS: 10**6, QUICK: 10**6},
        pairs={"01": 10**6},
    )
    for stable, target in ((Tally(), many), (many, Tally()), (many, many)):
        judgement = judged(at(15, stable), at(15, target), limits=Limits(error_rate=0.01))
        assert all(math.isfinite(view.evidence) for view in judgement.gates)
        assert "null" not in msgspec.json.encode(judgement.gates).decode()


# --- at 100 %

BEFORE = {
    "": Tally(
        ends={"ok": 9_950, "error": 50, "empty": 10, "length": 2_000},
        first_token={QUICK: 9_900, SLOW: 100},
        between_tokens={QUICK: 9_900, SLOW: 100},
    )
}


def alone(bad: float = 0.0, requests: int = 400, **kinds: int) -> dict[str, Tally]:
    """A target that has all requests, of which it fails a share."""
    failed = round(bad * requests)
    return at(100, ends(ok=requests - failed, error=failed, **kinds))


@pytest.mark.parametrize("bad", [0.2, 0.5, 1.0])
def test_at_100_percent_it_is_compared_with_what_the_stable_did_before(bad: float) -> None:
    judgement = judged(BEFORE, alone(bad, 100))
    assert [view.name for view in judgement.gates if view.state == "fails"] == ["errors"]
    assert judgement.message.startswith(
        "Errors at 100 %, compared with what the stable did before (a share of"
    )
    view = gate(judgement, "errors")
    assert (view.target_failures, view.target_requests) == (round(100 * bad), 100)
    assert (view.stable_failures, view.stable_requests) == (50, 10_000)


@pytest.mark.parametrize("requests", [20, 400, 40_000])
@pytest.mark.parametrize("base", [0.0, 0.005, 0.05])
def test_a_target_within_the_margin_of_what_was_before_passes(base: float, requests: int) -> None:
    """The figures of before are older: what differs by so little may be the day."""
    before = {"": ends(ok=round(1_000 * (1 - base)), error=round(1_000 * base))}
    for bad in (0.0, base, base + 0.04):
        assert judged(before, alone(bad, requests), least_requests=0).verdict == "passes"
    assert judged(before, alone(base + 0.15, 4_000)).verdict == "fails"


def test_the_margin_of_the_spec_is_what_it_may_be_worse() -> None:
    bad = alone(0.04, 4_000)
    assert judged(BEFORE, bad).verdict == "passes"
    assert judged(BEFORE, bad, excess=0.01).verdict == "fails"
    assert judged(BEFORE, alone(0.3, 4_000), excess=0.4).verdict == "passes"


def test_what_became_worse_on_the_stable_meanwhile_is_not_the_targets() -> None:
    beside = at(50, ends(ok=450, error=100))
    assert judged(BEFORE, alone(0.18)).verdict == "fails"
    assert judged({**BEFORE, **beside}, alone(0.18)).verdict == "passes"
    # And what was never worse there is.
    assert judged({**BEFORE, **at(50, ends(ok=550))}, alone(0.18)).verdict == "fails"


def test_the_stable_s_requests_beside_it_are_enough() -> None:
    assert judged(at(50, ends(ok=200)), alone(0.5)).verdict == "fails"


def test_of_few_requests_of_the_stable_nothing_is_known() -> None:
    few = {"": ends(ok=LEAST_BASELINE - 1)}
    judgement = judged(few, alone(0.9), thresholds=Thresholds())
    for name in ("errors", "firstToken", "betweenTokens", "abnormalEnds"):
        view = gate(judgement, name)
        assert view.state == "waits"
        assert view.evidence == pytest.approx(1.0)
        assert "fewer than 50 requests" in view.message
    assert judged({"": ends(ok=LEAST_BASELINE)}, alone(0.9)).verdict == "fails"


def test_of_a_stable_with_few_requests_more_may_have_failed_than_was_seen() -> None:
    bad = alone(0.12, 600)
    assert judged({"": ends(ok=60)}, bad).verdict == "passes"
    assert judged({"": ends(ok=6_000)}, bad).verdict == "fails"


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (ends(ok=250, error=150), "errors"),
        (Tally({"ok": 400, "empty": 200}), "abnormalEnds"),
        (Tally({"ok": 400, "length": 400}), "abnormalEnds"),
    ],
    ids=["errors", "empty", "to the limit"],
)
def test_gates_judge_at_100_percent(bad: Tally, name: str) -> None:
    judgement = judged(BEFORE, at(100, bad))
    assert [view.name for view in judgement.gates if view.state == "fails"] == [name]
    assert "at 100 %" in gate(judgement, name).message


def test_a_good_target_passes_every_gate_and_shows_both() -> None:
    good = Tally(
        {"ok": 3_980, "error": 20, "empty": 4, "length": 800},
        first_token={QUICK: 3_950, SLOW: 50},
        between_tokens={QUICK: 3_950, SLOW: 50},
    )
    judgement = judged(BEFORE, at(100, good), more="alone")
    assert judgement.verdict == "passes"
    for name in ("errors", "abnormalEnds"):
        view = gate(judgement, name)
        assert (view.state, view.stable_requests > 0) == ("passes", True)


def test_at_100_percent_times_are_not_compared_with_another_hour_s() -> None:
    slow = Tally({"ok": 400}, first_token={HANGS: 400}, between_tokens={HANGS: 400})
    judgement = judged(BEFORE, at(100, slow))
    assert judgement.verdict == "passes"
    for name in ("firstToken", "betweenTokens"):
        view = gate(judgement, name)
        assert (view.state, view.evidence) == ("waits", 1.0)
        assert "rollout.limits" in view.message


def test_errors_that_came_together_count_as_one_and_are_all_in_the_share() -> None:
    """A tenant's burst is one event; one whose every second answer fails is no burst."""
    burst, failing = at(100, ends(ok=60, error=1, again=39)), at(100, ends(ok=300, error=30, again=270))
    assert judged(BEFORE, burst).verdict == "passes"
    assert gate(judged(BEFORE, burst), "errors").target_failures == 40
    assert judged(BEFORE, failing).verdict == "fails"
    limits = Limits(error_rate=0.2)
    assert judged(None, failing, limits=limits).verdict == "fails"
    # The stable's bursts are in its share as well.
    assert judged({"": ends(ok=1_000, error=40, again=360)}, failing).verdict != "fails"


def test_evidence_against_a_share_shrinks_as_the_share_grows() -> None:
    """So an upper bound of what may fail is enough, however it was found."""
    shares = [0.01, 0.05, 0.2, 0.5, 0.9]
    for failures, requests in ((0, 50), (10, 50), (50, 50), (300, 1_000)):
        found = [log_e_value([(share, failures, requests)]) for share in shares]
        assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(("failures", "requests"), [(0, 50), (3, 50), (50, 1_000), (999, 1_000), (60, 60)])
def test_a_share_s_bound_is_exceeded_as_seldom_as_it_says(failures: int, requests: int) -> None:
    bound = upper_share(failures, requests)
    assert failures / requests < bound <= 1.0 or failures == requests
    chance = sum(
        math.comb(requests, k) * bound**k * (1.0 - bound) ** (requests - k) for k in range(failures + 1)
    )
    assert chance <= DOUBT * 1.001 or bound == 1.0
    assert upper_share(failures, requests, 0.5) <= bound


def test_at_100_percent_no_good_requests_outweigh_those_that_failed() -> None:
    """With a short hold it would be over before the gate is sure."""
    bad = alone(0.1, 70)
    assert judged(BEFORE, bad).verdict == "passes"
    held = judged(BEFORE, bad, more="alone")
    assert (held.verdict, held.clean) == ("waits", 63)
    assert "7 failed: it waits for more" in held.message
    assert judged(BEFORE, alone(0.0, 59), more="alone").verdict == "passes"
    # What failed beside the stable can be outweighed no more: the stable has no requests.
    late = {**at(50, ends(ok=60, error=20)), **alone(0.0, 100)}
    assert judged({**BEFORE, **at(50, ends(ok=60, error=20))}, late, more="alone").verdict == "passes"


# --- limits


def test_a_limit_is_kept_to_whatever_the_stable_does() -> None:
    same = ends(ok=900, error=100)
    limits = Limits(error_rate=0.01)
    judgement = judged(at(50, same), at(50, same), limits=limits)
    assert [view.name for view in judgement.gates if view.state == "fails"] == ["limits.errorRate"]
    assert judged(at(50, same), at(50, ends(ok=992, error=8)), limits=limits).verdict == "passes"


def test_a_model_s_first_revision_has_only_limits() -> None:
    limits = Limits(error_rate=0.01, first_token_seconds=1.0, between_tokens_seconds=0.1)
    empty = judged(None, {}, limits=limits)
    assert [view.name for view in empty.gates] == [
        "requests",
        "limits.errorRate",
        "limits.firstTokenSeconds",
        "limits.betweenTokensSeconds",
    ]
    assert {view.state for view in empty.gates} == {"waits"}
    bad = judged(None, at(100, ends(ok=185, error=15)), limits=limits)
    assert bad.message.startswith(
        "Errors, of which 0.01 are allowed: 15 of 200 requests of the target; e-value"
    )
    slow = judged(None, at(100, Tally(first_token={QUICK: 30}, waiting_first={HANGS: 20})), limits=limits)
    assert [view.name for view in slow.gates if view.state == "fails"] == ["limits.firstTokenSeconds"]
    stutters = judged(None, at(100, Tally(between_tokens={QUICK: 30})), limits=limits)
    assert [view.name for view in stutters.gates if view.state == "fails"] == ["limits.betweenTokensSeconds"]
    assert judged(None, at(100, ends(ok=59))).verdict == "passes"


def test_no_gate_of_a_first_revision_passes_or_fails_on_what_it_did_not_see() -> None:
    assert judged(None, {}).verdict == "waits"


def test_a_request_within_its_limit_breaks_none_and_copies_at_weight_0_break_none() -> None:
    limits = Limits(first_token_seconds=0.3)
    just_in_time = judged(None, at(100, Tally(first_token={QUICK: 5_000})), limits=limits)
    assert gate(just_in_time, "limits.firstTokenSeconds").target_failures == 0
    copies = judged({}, at(0, Tally(first_token={HANGS: 5_000})), limits=limits)
    assert gate(copies, "limits.firstTokenSeconds").state == "waits"


# --- promotion


def test_so_many_requests_exclude_an_error_rate() -> None:
    assert [needed_requests(rate) for rate in (0.05, 0.02, 0.01)] == [59, 149, 299]
    for rate in (0.05, 0.02, 0.01):
        assert (1 - rate) ** needed_requests(rate) <= 0.05 < (1 - rate) ** (needed_requests(rate) - 1)


def test_silence_neither_passes_nor_fails() -> None:
    served = Tally(ends={"ok": 5_000}, first_token={QUICK: 5_000}, between_tokens={QUICK: 5_000})
    for stable in ({}, at(15, served)):
        for target in ({}, at(15, Tally())):
            judgement = judged(stable, target, limits=Limits(error_rate=0.01))
            assert judgement.verdict == "waits"
            assert {view.state for view in judgement.gates} == {"waits"}


def test_fewer_requests_than_asked_for_wait_and_say_how_many() -> None:
    judgement = judged(at(15, ends(ok=300)), at(15, ends(ok=41, error=0)))
    assert judgement.verdict == "waits"
    assert "41 of 59 requests" in judgement.message


def test_requests_of_all_steps_are_evidence_and_failed_ones_are_none() -> None:
    steps = {**at(5, ends(ok=20)), **at(15, ends(ok=30, error=1)), **at(100, ends(ok=9, empty=2))}
    judgement = judged({}, steps)
    assert (judgement.clean, judgement.verdict) == (59, "passes")


def test_a_quiet_model_goes_by_the_clock_where_its_spec_says_so_and_says_that_it_did() -> None:
    judgement = judged({}, {}, least_requests=0)
    assert judgement.verdict == "passes"
    assert "by the clock" in judgement.message


def test_enough_requests_do_not_outweigh_a_failed_gate() -> None:
    judgement = judged(at(15, ends(ok=10_000)), at(15, ends(ok=2_000, error=9)))
    assert judgement.clean > 59
    assert judgement.verdict == "fails"


# --- thresholds


@given(st.lists(st.integers(0, 95), min_size=LEAST_BASELINE, max_size=200))
def test_the_frozen_bucket_holds_the_quantile(buckets: list[int]) -> None:
    counts = {bucket: buckets.count(bucket) for bucket in buckets}
    frozen = freeze(Tally(first_token=counts), 20.0)
    ordered = sorted(buckets)
    for percent, bucket in zip(QUANTILES, frozen.first_token, strict=True):
        assert bucket == ordered[math.ceil(len(ordered) * percent / 100) - 1]
    assert frozen.between_tokens == ()


def test_of_few_requests_no_quantile_is_known_and_nothing_is_slow() -> None:
    few = Tally(first_token={QUICK: LEAST_BASELINE - 1})
    assert freeze(few, 0.0) == Thresholds()
    hung = judged(at(15, few), at(15, Tally(first_token={HANGS: 500})), thresholds=Thresholds())
    view = gate(hung, "firstToken")
    assert (view.state, view.evidence) == ("waits", 1.0)
    assert "fewer than 50 requests" in view.message


def test_thresholds_are_kept_as_json() -> None:
    frozen = freeze(Tally(first_token={QUICK: 99, SLOW: 9}), 12.5)
    assert msgspec.json.decode(msgspec.json.encode(frozen), type=Thresholds) == frozen


# --- hard gates


@pytest.mark.parametrize(
    ("seen", "failing"),
    [
        ({}, []),
        ({"load_error": "CUDA out of memory"}, ["load"]),
        ({"failed_check": "logits differ"}, ["selfCheck"]),
        ({"failed_probe": "answered 5 for 4"}, ["probes"]),
        ({"lost_replicas": 2}, []),
        ({"lost_replicas": 3}, ["restarts"]),
    ],
)
def test_hard_gates_need_no_statistics(seen: dict[str, Any], failing: list[str]) -> None:
    views = hard_gates(**seen)
    assert [view.name for view in views if view.state == "fails"] == failing
    assert all(bool(view.message) == (view.state == "fails") for view in views)
    assert {view.needed for view in views} == {0.0}

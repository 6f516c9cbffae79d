"""From one Ray cluster to the next: nothing leaves the old one before it has arrived."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.control.builders import model
from tidegate.control.observed import ApplicationState, ReplicaState, ServeState
from tidegate.control.serve_config import Application
from tidegate_operator.moving import has_arrived, merged, move

ALL = tuple(Application(name, "r", model(name).spec, "", keep_awake=False) for name in "abcde")


def serve(**statuses: str) -> ServeState:
    """`starting` and `awake` want one replica, `asleep` none."""
    found = {}
    for name, kind in statuses.items():
        status = "DEPLOYING" if kind == "starting" else "RUNNING"
        replicas = (ReplicaState("r", "RUNNING", 1, "n"),) if kind == "awake" else ()
        found[f"{name}--r"] = ApplicationState(
            f"{name}--r", status, wanted_replicas=0 if kind == "asleep" else 1, replicas=replicas
        )
    return ServeState("c", found)


def names(applications: tuple[Application, ...]) -> str:
    return "".join(item.model for item in applications)


OLD = serve(**dict.fromkeys("abcde", "awake"))


def test_a_few_at_a_time_and_each_leaves_when_it_has_arrived() -> None:
    first = move(ALL, OLD, serve(), 2)
    assert (names(first.old), names(first.new), first.is_done) == ("abcde", "ab", False)
    second = move(ALL, OLD, serve(a="awake", b="starting"), 2)
    assert (names(second.old), names(second.new)) == ("bcde", "abc")
    asleep = move(ALL, OLD, serve(a="awake", b="asleep"), 2)
    assert (names(asleep.old), names(asleep.new)) == ("cde", "abcd")
    last = move(ALL, serve(), serve(**dict.fromkeys("abcde", "awake")), 2)
    assert (names(last.old), names(last.new), last.is_done) == ("", "abcde", True)


def test_all_stay_while_the_new_cluster_does_not_answer() -> None:
    assert names(move(ALL, OLD, None, 2).old) == "abcde"


def test_a_replica_that_runs_is_needed_to_leave() -> None:
    waits = ApplicationState("a--r", "RUNNING", wanted_replicas=1)
    assert not has_arrived(waits)


def test_one_view_of_both() -> None:
    view = merged(OLD, serve(a="awake", b="starting"))
    assert view is not None
    assert view.applications["b--r"].ready_replicas == 1
    assert merged(None, OLD) == merged(OLD, None) == OLD


kinds = st.sampled_from(["starting", "awake", "asleep"])
states = st.dictionaries(st.sampled_from("abcde"), kinds)


@given(states, states, st.integers(1, 4))
def test_what_serves_stands_somewhere(old: dict[str, str], new: dict[str, str], bound: int) -> None:
    there = serve(**new)
    found = move(ALL, serve(**old), there, bound)
    for item in ALL:
        if item.name in serve(**old).applications:
            stands = item in found.old or (item in found.new and has_arrived(there.applications[item.name]))
            assert stands
    unbuilt = [item for item in found.new if item.model not in new]
    assert len(unbuilt) <= bound

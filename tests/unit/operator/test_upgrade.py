from typing import Any

from tests.unit.control.builders import model
from tests.unit.operator.bodies import cluster_body
from tidegate.control.observed import ApplicationState, ReplicaState, ServeState
from tidegate.control.serve_config import Application
from tidegate_operator.upgrade import choose, kept_configs, may_go, shared_out, standing

OLD, NEW = cluster_body("old"), cluster_body("new")
READY = (ReplicaState("r", "RUNNING", 1, "n"),)


def serve(*names: str, status: str = "RUNNING", wanted: int = 1, ready: bool = True) -> ServeState:
    return ServeState(
        "c",
        {
            name: ApplicationState(
                name, status, config={"name": name}, wanted_replicas=wanted, replicas=READY if ready else ()
            )
            for name in names
        },
    )


def answers(*bodies: dict[str, Any]) -> Any:
    return lambda body: body in bodies


def test_a_pool_without_a_cluster_gets_one() -> None:
    choice = choose("new", [], "Surge", "", answers())
    assert (choice.create, choice.active) == (True, None)


def test_a_cluster_that_is_still_being_deleted_keeps_its_name() -> None:
    gone = cluster_body("new", deletionTimestamp="2026-01-01T00:00:00Z")
    assert not choose("new", [gone], "Surge", "", answers()).create


def test_with_surge_the_old_cluster_serves_until_the_new_one_answers() -> None:
    begin = choose("new", [OLD], "Surge", "default-old", answers(OLD))
    assert (begin.create, begin.active, begin.retiring) == (True, OLD, ())
    coming = choose("new", [OLD, NEW], "Surge", "default-old", answers(OLD))
    assert (coming.create, coming.active, coming.retiring) == (False, OLD, ())
    there = choose("new", [OLD, NEW], "Surge", "default-old", answers(OLD, NEW))
    assert (there.active, there.retiring) == (NEW, (OLD,))


def test_a_new_cluster_that_has_taken_over_stays_active_while_its_head_is_away() -> None:
    choice = choose("new", [OLD, NEW], "Surge", "default-new", answers(OLD))
    assert (choice.active, choice.retiring) == (NEW, (OLD,))


def test_a_cluster_that_never_took_over_goes_when_the_pool_changes_again() -> None:
    middle = cluster_body("middle")
    choice = choose("new", [OLD, middle], "Surge", "default-old", answers(OLD))
    assert (choice.active, choice.retiring, choice.abandoned, choice.create) == (OLD, (), (middle,), True)


def test_a_second_change_goes_on_emptying_the_first_cluster() -> None:
    middle = cluster_body("middle")
    choice = choose("new", [OLD, middle], "Surge", "default-middle", answers(OLD, middle))
    assert (choice.active, choice.retiring, choice.abandoned) == (middle, (OLD,), ())


def test_with_recreate_the_new_cluster_waits_until_the_old_is_gone() -> None:
    begin = choose("new", [OLD], "Recreate", "default-old", answers(OLD))
    assert (begin.create, begin.active, begin.retiring) == (False, None, (OLD,))
    going = cluster_body("old", deletionTimestamp="2026-01-01T00:00:00Z")
    assert not choose("new", [going], "Recreate", "default-old", answers()).create
    assert choose("new", [], "Recreate", "default-old", answers()).create
    assert choose("new", [NEW], "Recreate", "", answers()).active == NEW


def applications(*names: str) -> list[Application]:
    return [Application(name, "a", model(name).spec, "", keep_awake=False) for name in names]


MOVING = choose("new", [OLD, NEW], "Surge", "default-new", answers(OLD, NEW))
FULL = serve("m--a", "n--a")


def both(old: ServeState | None, new: ServeState | None) -> dict[str, ServeState | None]:
    return {"default-old": old, "default-new": new}


def test_models_leave_the_old_cluster_one_by_one() -> None:
    wanted = applications("m", "n")
    begin = shared_out(MOVING, both(FULL, serve()), wanted, 1)
    assert [item.model for item in begin.new] == ["m"]
    assert len(kept_configs(FULL, begin.old)) == 2
    second = shared_out(MOVING, both(FULL, serve("m--a")), wanted, 1)
    assert [item.model for item in second.new] == ["m", "n"]
    assert kept_configs(FULL, second.old) == {"n--a": {"name": "n--a"}}
    assert not may_go(serve("n--a"), second)


def test_the_old_cluster_goes_when_it_has_drained() -> None:
    done = shared_out(MOVING, both(FULL, FULL), applications("m", "n"), 1)
    assert kept_configs(FULL, done.old) == {}
    assert not may_go(serve("m--a", status="DELETING"), done)
    assert may_go(serve(), done)


def test_an_old_cluster_that_does_not_answer_goes_only_when_all_has_arrived() -> None:
    wanted = applications("m", "n")
    assert not may_go(None, shared_out(MOVING, both(None, serve("m--a")), wanted, 1))
    assert may_go(None, shared_out(MOVING, both(None, FULL), wanted, 1))


def test_nothing_leaves_while_the_new_head_is_away() -> None:
    half = serve("n--a")
    part = shared_out(MOVING, both(half, None), applications("m", "n"), 1)
    assert kept_configs(half, part.old) == {"n--a": {"name": "n--a"}}
    assert not may_go(half, part)
    assert standing(MOVING, both(half, None)) == half


def test_a_deleted_model_does_not_hold_the_old_cluster() -> None:
    part = shared_out(MOVING, both(FULL, serve("n--a")), applications("n"), 1)
    assert kept_configs(FULL, part.old) == {}


def test_the_plan_sees_what_stands_on_either_cluster() -> None:
    seen = standing(MOVING, both(serve("m--a"), serve("n--a")))
    assert seen is not None
    assert set(seen.applications) == {"m--a", "n--a"}


def test_with_recreate_everything_leaves_at_once() -> None:
    ray = choose("new", [OLD], "Recreate", "default-old", answers(OLD))
    part = shared_out(ray, both(FULL, None), applications("m", "n"), 4)
    assert kept_configs(FULL, part.old) == {}
    assert not may_go(FULL, part)
    assert may_go(serve(), part)
    assert standing(ray, both(FULL, None)) is None


def test_without_an_old_cluster_all_applications_are_written() -> None:
    ray = choose("new", [NEW], "Surge", "", answers(NEW))
    wanted = applications("m", "n")
    assert shared_out(ray, both(None, None), wanted, 1).new == tuple(wanted)

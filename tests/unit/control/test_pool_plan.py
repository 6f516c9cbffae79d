"""What a decision about models becomes for a host."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.control.builders import NOW, World, model
from tidegate.control.pool_plan import (
    PROGRESSING_SECONDS,
    SETTLED_SECONDS,
    PoolSnapshot,
    pause_seconds,
    plan_pool,
    queues_of,
)


def snapshot(world: World) -> PoolSnapshot:
    return PoolSnapshot(world.models, world.pool, world.records, world.seen, deleting=world.deleting)


def test_only_entries_that_differ_are_put() -> None:
    world = World(model("one"), model("two"))
    first = plan_pool(snapshot(world), world.now)
    assert [entry.name for entry in first.registry.put] == ["one", "two"]
    assert first.pause_seconds == PROGRESSING_SECONDS
    world.settle("one")
    world.settle("two")
    world.step()
    settled = plan_pool(snapshot(world), world.now)
    assert settled.registry.put == ()
    assert settled.pause_seconds == SETTLED_SECONDS


def test_what_is_published_and_wanted_no_more_is_forgotten() -> None:
    world = World(model("one"))
    world.settle("one")
    world.models.clear()
    plan = plan_pool(snapshot(world), world.now)
    assert (plan.registry.delete, plan.applications, plan.entries) == (("one",), (), {})


def test_a_refused_spec_is_told_beside_what_runs_with_a_transition_time_that_stays() -> None:
    world = World(model("one"))
    world.settle("one")
    refused = replace(snapshot(world), refused={"one": ("InvalidConfig", "wrong")})
    (first,) = plan_pool(refused, NOW + 100).registry.put
    assert first.ready
    by_type = {item.type: (item.status, item.message) for item in first.conditions}
    assert (by_type["Ready"][0], by_type["ConfigValid"]) == ("True", ("False", "wrong"))
    world.see(entries={"one": first})
    again = replace(refused, seen=world.seen)
    assert plan_pool(again, NOW + 150).registry.put == ()


def test_a_pause_ends_when_time_changes_something() -> None:
    assert pause_seconds([None], NOW) == SETTLED_SECONDS
    assert pause_seconds([NOW + 2, None, NOW + 1.5], NOW) == 1.5
    assert pause_seconds([NOW + 0.1], NOW) == PROGRESSING_SECONDS
    assert pause_seconds([NOW + 100], NOW) == SETTLED_SECONDS


def test_the_queues_of_a_pool_are_all_recorded_revisions_and_the_newest() -> None:
    world = World(model("one"))
    first = world.settle("one")
    changed = model("one", contextLength=64)
    found = queues_of([changed], world.records)
    assert found[0] == ("one", first)
    assert [name for name, _ in found] == ["one", "one"]
    assert queues_of([model("one")], world.records) == [("one", first)]

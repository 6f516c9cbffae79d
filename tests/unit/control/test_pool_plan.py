"""What a decision about models becomes for a host."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.control.builders import NOW, World, model
from tidegate.control.plan import (
    PROGRESSING_SECONDS,
    SETTLED_SECONDS,
    plan_pool,
    queues_of,
)


def test_only_entries_that_differ_are_put() -> None:
    world = World(model("one"), model("two"))
    first = plan_pool(world.snapshot(), world.now)
    assert [entry.name for entry in first.registry.put] == ["one", "two"]
    assert first.pause_seconds(world.now) == PROGRESSING_SECONDS
    world.settle("one")
    world.settle("two")
    world.step()
    settled = plan_pool(world.snapshot(), world.now)
    assert settled.registry.put == ()
    assert settled.pause_seconds(world.now) == SETTLED_SECONDS


def test_what_is_published_and_wanted_no_more_is_forgotten() -> None:
    world = World(model("one"))
    world.settle("one")
    world.models.clear()
    plan = plan_pool(world.snapshot(), world.now)
    assert (plan.registry.delete, plan.applications, plan.entries) == (("one",), (), {})


def test_a_refused_spec_is_told_beside_what_runs_with_a_transition_time_that_stays() -> None:
    world = World(model("one"))
    world.settle("one")
    refused = replace(world.snapshot(), refused={"one": ("InvalidConfig", "wrong")})
    (first,) = plan_pool(refused, NOW + 100).registry.put
    assert first.ready
    by_type = {item.type: (item.status, item.message) for item in first.conditions}
    assert (by_type["Ready"][0], by_type["ConfigValid"]) == ("True", ("False", "wrong"))
    world.see(entries={"one": first})
    again = replace(refused, seen=world.seen)
    assert plan_pool(again, NOW + 150).registry.put == ()


def test_a_pause_ends_when_time_changes_something() -> None:
    world = World(model("one"))
    world.settle("one")
    world.step()
    settled = world.plan()
    assert settled.next_at is None
    assert settled.pause_seconds(NOW) == SETTLED_SECONDS
    assert settled.pause_seconds(NOW, NOW + 1.5) == 1.5
    later = replace(settled, next_at=NOW + 2)
    assert (later.pause_seconds(NOW, NOW + 1.5), later.pause_seconds(NOW)) == (1.5, 2)
    assert later.pause_seconds(NOW + 1.9) == PROGRESSING_SECONDS
    assert replace(settled, next_at=NOW + 100).pause_seconds(NOW) == SETTLED_SECONDS
    assert replace(later, is_settled=False).pause_seconds(NOW) == PROGRESSING_SECONDS


def test_the_queues_of_a_pool_are_all_recorded_revisions_and_the_newest() -> None:
    world = World(model("one"))
    first = world.settle("one")
    changed = model("one", contextLength=64)
    found = queues_of([changed], world.records)
    assert found[0] == ("one", first)
    assert [name for name, _ in found] == ["one", "one"]
    assert queues_of([model("one")], world.records) == [("one", first)]

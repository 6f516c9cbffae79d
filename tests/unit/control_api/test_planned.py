"""What a dry run says of the controller's decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.unit.control.builders import World, model
from tidegate.control.observed import ServeState, SourceState
from tidegate.control.plan import PoolSnapshot
from tidegate.control_api.planned import plan_view
from tidegate.control_api.views import PlanView

SOURCE = {"uri": "hf://owner/name"}
FOUND = SourceState("resolved", "/weights", 1 << 20, "none", "float16", commit="c1", digest="d1")


def serving(**spec: Any) -> World:
    world = World(model(**spec))
    if "source" in spec:
        world.step()
        world.source(0, FOUND)
    world.settle("one")
    return world


def view(world: World, **spec: Any) -> PlanView:
    """The plan with another spec, of what stands."""
    past = world.snapshot()
    snapshot = PoolSnapshot([model(**spec)], past.pool, past.records, past.seen)
    return plan_view(snapshot, "one", world.now)


def test_nothing_to_do_is_no_action() -> None:
    assert view(serving()).actions == []


def test_a_source_that_is_looked_at_first_is_taken_for_what_it_held() -> None:
    world = serving(source=SOURCE, engine={"name": "transformers"})
    world.see(sources={})  # as in a cluster: each spec has a Job of its own
    plan = view(world, source=SOURCE, engine={"name": "transformers"}, contextLength=64)
    assert plan.actions[0].startswith("The source hf://owner/name is looked at;")
    assert plan.actions[0].endswith("If that is what it held:")
    assert any("starts with 1 replicas" in action for action in plan.actions[1:])
    assert plan.rollout is not None
    assert plan.rollout.stable in world.records["one"].revisions


def test_of_a_source_that_nobody_has_seen_nothing_is_guessed() -> None:
    world = serving(source=SOURCE, engine={"name": "transformers"})
    plan = view(world, source={"uri": "hf://owner/other"}, engine={"name": "transformers"})
    assert plan.actions == ["The source hf://owner/other is looked at; what it holds names the revision."]


def test_a_revision_that_has_to_wait_is_said_to_start_later() -> None:
    """Here while Serve still takes up another change of the model, as right after an undo."""
    spec: dict[str, Any] = {"rollout": {"steps": [{"weight": 25}, {"weight": 100}]}}
    world = serving(**spec)
    assert world.seen.serve is not None
    ((name, state),) = world.seen.serve.applications.items()
    world.see(serve=ServeState("c", {name: replace(state, status="DEPLOYING")}))
    past = world.snapshot()
    changed = model(engine={"name": "simulated", "args": {"step_ms": 7}}, **spec)
    plan = plan_view(PoolSnapshot([changed], past.pool, past.records, past.seen, wave=1), "one", world.now)
    assert plan.rollout is not None
    later = f"Revision {plan.rollout.target} starts when its turn comes."
    assert plan.actions[0] == f"{later} The revision waits for its turn to be built."


def test_the_peak_is_that_of_the_whole_rollout() -> None:
    canary = {"steps": [{"weight": 25}, {"weight": 100}]}
    world = serving(scaling={"minReplicas": 4, "maxReplicas": 4}, rollout=canary)
    assert world.seen.serve is not None
    ((name, state),) = world.seen.serve.applications.items()
    world.see(serve=ServeState("c", {name: replace(state, wanted_replicas=4)}))
    plan = view(world, scaling={"minReplicas": 4, "maxReplicas": 4}, rollout=canary, contextLength=64)
    assert (plan.replicas_now, plan.replicas_peak) == (4, 8)
    frugal = canary | {"stableScalesDown": True}
    plan = view(world, scaling={"minReplicas": 4, "maxReplicas": 4}, rollout=frugal, contextLength=64)
    assert plan.replicas_peak < 8

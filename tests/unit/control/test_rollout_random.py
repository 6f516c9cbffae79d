"""Random rollouts in virtual time. What holds at all times is looked at in each tick (`rolling.Rolling`):
weights sum to one, none is raised by a gate that fails, before its replicas, its hold or its evidence,
replicas keep to their bounds, what was given up has no traffic, no request is lost. Here: that all of them
end, and how.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.control.builders import model
from tests.unit.control.rolling import Crash, Fault, Rolling
from tidegate.control.desired import WHOLE

# `make test` plays a part of them; TIDEGATE_ROLLOUTS=3000 many.
COUNT = int(os.environ.get("TIDEGATE_ROLLOUTS", "60"))
BATCH = 20
CRASHES: tuple[Crash, ...] = ("before", "records", "registry")
SHARES = (0.2, 0.3, 0.67, 1, 2)  # of a GPU
BAD = (
    Fault(load="LoadFailed"),
    Fault(load="ProbeFailed"),
    Fault(errors=0.5),
    Fault(slow=8.0),
    Fault(end="empty"),
    Fault(lost=0.6),
)


def drawn_rollout(draw: random.Random) -> dict[str, Any]:
    strategy = draw.choice(["Canary", "Canary", "Canary", "BlueGreen", "Recreate"])
    found: dict[str, Any] = {
        "strategy": strategy,
        "minRequests": draw.choice([0, 5, 30]),
        "abortScaleDownSeconds": draw.choice([0, 5, 20]),
    }
    weights = sorted(draw.sample(range(5, 96, 5), draw.randint(0, 3))) if strategy == "Canary" else []
    found["steps"] = [
        {"weight": weight, "holdSeconds": draw.choice([0, 1, 7]), "pause": draw.random() < 0.1}
        for weight in [*weights, 100]
    ]
    if strategy != "Recreate":
        found["stableScalesDown"] = draw.random() < 0.5
        found["minAvailable"] = draw.choice([0, 0, 1])
        if draw.random() < 0.25:
            found["shadow"] = {"requests": draw.choice([0, 10]), "holdSeconds": 3}
    return found


def drawn_model(draw: random.Random, name: str) -> Any:
    """A model that may roll: `maxSurge` is raised until the plan fits. One that counts accelerators
    instead is drawn without a look at that: what others of its revisions take is not known yet."""
    least = draw.choice([0, 1, 1, 2])
    scaling = {"minReplicas": least, "maxReplicas": max(1, least) + draw.choice([0, 1, 2]), "idleSeconds": 1}
    rollout = drawn_rollout(draw)
    if draw.random() < 0.4:
        rollout["maxSurgeAccelerators"] = draw.choice([0.1, 0.3, 0.5, 1, 2, 4])
        if rollout.pop("minAvailable", 0):
            rollout["minAvailableAccelerators"] = draw.choice([0.2, 0.5])
        return model(name, rollout=rollout, scaling=scaling, resources={"gpus": draw.choice(SHARES)})
    surge = draw.choice([None, 0, 1, 2])
    for more in range(surge if surge is not None else 9, 9):
        try:
            return model(name, rollout={**rollout, "maxSurge": more}, scaling=scaling)
        except ValueError:
            continue
    return model(name, rollout=rollout, scaling=scaling)


def play(seed: int, *, crashes: bool = True, jumps: bool = True) -> Rolling:
    """Change models at random for a while, then let all end; people end the pauses, and raise what is too
    small for a rollout."""
    draw = random.Random(seed)
    names = ["one", "two", "three"][: draw.choice([1, 1, 2, 3])]
    world = Rolling(
        *(drawn_model(draw, name) for name in names),
        seed=seed,
        cpus=draw.choice([1024.0, 0.1 * len(names) * 6]),
        gpus=128,  # more than they can take
    )
    world.ticks(12)
    world.rates = {name: draw.choice([0, 3, 20, 60]) for name in names}
    seeds = iter(range(2, 1000))
    for _ in range(draw.randint(60, 250)):
        name = draw.choice(names)
        if draw.random() < 0.03:
            takes = {"resources": {"gpus": draw.choice(SHARES)}} if counts_accelerators(world, name) else {}
            revision = world.change(name, draw.choice([1, next(seeds), next(seeds)]), **takes)
            if draw.random() < 0.5 and revision not in world.starts_of:
                world.faults.setdefault(revision, draw.choice(BAD))
        if draw.random() < 0.03:
            world.ask(name, draw.choice(["pause", "resume", "promote", "abort", "retry", "undo"]))
        if draw.random() < 0.05:
            world.rates[name] = draw.choice([0, 3, 20, 60])
        if crashes and draw.random() < 0.05:
            world.crash = draw.choice(CRASHES)
        if jumps and draw.random() < 0.01:
            world.offset += draw.choice([-3600.0, -5.0, 5.0, 3600.0])
        world.tick()
    world.rates = dict.fromkeys(names, 20)
    world.faults = {name: replace(fault, lost=0.0) for name, fault in world.faults.items()}
    for _ in range(900):
        for name in names:
            if world.view(name).phase == "Paused" and name not in world.actions:
                world.ask(name, "resume")
            if world.said(name, "Scheduled") == ("False", "SurgeTooSmall"):
                world.change_rollout(name, maxSurgeAccelerators=64, minAvailableAccelerators=0)
        world.tick()
        if all(is_over(world, name) for name in names):
            break
    world.ticks(5)  # gateways follow
    return world


def counts_accelerators(world: Rolling, name: str) -> bool:
    (found,) = (each.spec.rollout for each in world.models if each.name == name)
    return found is not None and found.max_surge_accelerators is not None


def is_over(world: Rolling, name: str) -> bool:
    """Nothing is under way, and what it left behind has gone."""
    standing = {key for key in world.standing if key.startswith(f"{name}--")}
    lead = {f"{name}--{revision}" for revision in world.records[name].weights}
    has_ended = world.view(name).phase in ("Completed", "Aborted")
    return has_ended and standing == lead and not world.actions.get(name)


@pytest.mark.parametrize("batch", range(COUNT // BATCH))
def test_every_rollout_ends_and_nothing_is_broken_on_the_way(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        try:
            world = play(seed)
            for name in (each.name for each in world.models):
                assert is_over(world, name), f"{name} goes on: {world.view(name)}"
                ends_well(world, name)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def ends_well(world: Rolling, name: str) -> None:
    """A revision that is bad has the traffic only where there was no other."""
    record, view = world.records[name], world.view(name)
    assert sum(record.weights.values()) == WHOLE
    assert len(record.weights) == 1
    (lead,) = record.weights
    if view.phase == "Completed":
        assert lead == view.target
    else:
        assert lead == (view.stable or view.target)
    left = {key: queue for key, queue in world.queues.items() if queue and key[1] != lead}
    assert not {key for key in left if key[0] == name}, "requests are left behind"


# One story, cut at each of its seconds ----------------------------------------------------------------------

STORIES: dict[str, tuple[dict[str, Any], Fault | None, str]] = {
    "good": ({"steps": [{"weight": 30, "holdSeconds": 6}, {"weight": 100, "holdSeconds": 4}]}, None, "new"),
    "shadowed": ({"shadow": {"requests": 30, "holdSeconds": 5}, "minRequests": 20}, None, "new"),
    "bad": ({}, Fault(errors=0.5), "old"),
    "broken": ({}, Fault(load="OutOfMemory"), "old"),
    "recreated": ({"strategy": "Recreate", "steps": [{"weight": 100, "holdSeconds": 4}]}, None, "new"),
    "recreated badly": ({"strategy": "Recreate"}, Fault(load="OutOfMemory"), "old"),
    "at once, badly": ({"strategy": "BlueGreen"}, Fault(errors=0.5), "old"),
    "recreated, then bad": ({"strategy": "Recreate"}, Fault(end="empty"), "old"),
}


def tell(story: str, cut_at: int, crash: Crash, *, most: int = 300) -> tuple[str, str, list[str]]:
    """The phase, the revision that has the traffic and all that stands in the end."""
    rollout, fault, _ = STORIES[story]
    world = Rolling(model(rollout=rollout))
    world.up()
    world.rates = {"one": 20}
    world.ticks(8)
    new = world.change("one", 2)
    if fault is not None:
        world.faults[new] = fault
    for tick in range(most):
        if tick == cut_at:
            world.crash = crash
        world.tick()
        if tick > cut_at and world.view().target == new and is_over(world, "one"):
            break
    (lead,) = world.records["one"].weights
    return world.view().phase, "new" if lead == new else "old", sorted(world.standing)


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("story", STORIES)
def test_a_crash_at_any_second_gives_the_same_end(story: str, crash: Crash) -> None:
    expected = tell(story, -1, "")
    assert expected[1] == STORIES[story][2]
    for second in range(0, 36, 3):
        assert tell(story, second, crash) == expected, f"crashed in second {second}"


def test_an_undo_at_any_second_starts_nothing() -> None:
    for second in range(0, 60, 3):
        world = Rolling(model(rollout={"steps": [{"weight": 50, "holdSeconds": 20}, {"weight": 100}]}))
        (old,) = world.up()
        world.rates = {"one": 20}
        world.change("one", 2)
        world.ticks(second + 1)
        starts = world.starts
        world.ask("one", "undo")
        world.tick()
        assert world.entries["one"].revisions == {old: WHOLE}
        world.ticks(60)
        assert world.starts <= starts + 1  # one may have been ordered in that second
        assert (world.view().target, list(world.records["one"].weights)) == (old, [old])

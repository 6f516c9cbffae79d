"""What the version before stored (`before_weights/README.md`), and the models that it stored it of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from tests.unit.control.builders import NOW, World, model
from tidegate.control.desired import ModelRecord
from tidegate.control.observed import ApplicationState, Group, ServeState, SourceState
from tidegate.control.plan import PoolPlan
from tidegate.control.resources import Model
from tidegate.messages.registry import ModelEntry

FOLDER = Path(__file__).parent / "before_weights"
RECORDS = FOLDER / "control.json"
GROUPS = (Group("cpu", cpus=8, memory_bytes=16 << 30),)


def statuses() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((FOLDER / "statuses.json").read_text())
    return found


def entries() -> dict[str, ModelEntry]:
    return msgspec.json.decode((FOLDER / "entries.json").read_bytes(), type=dict[str, ModelEntry])


def models() -> list[Model]:
    changed = {"name": "simulated", "args": {"tokens_per_second": 5}}
    return [
        model("steady"),
        model("changing", engine=changed),
        model("failing", engine=changed),
        model("draining", engine=changed),
        model("asleep", scaling={"minReplicas": 0, "maxReplicas": 1}),
        model(
            "weights",
            engine={"name": "transformers", "maxSlots": 2},
            source={"uri": "/w"},
            resources={"memory": "4Gi"},
        ),
        model("coming"),
    ]


def first_plan(records: dict[str, ModelRecord], groups: tuple[Group, ...]) -> PoolPlan:
    """What this version decides first, where all that was built stands and the queues are not empty. The
    source's content has a name now; that of before is not known."""
    world = World(*models())
    world.records = records
    world.now = NOW + 10
    keys = [(name, revision) for name, record in records.items() for revision in record.revisions]
    standing = {
        f"{name}--{revision}": ApplicationState(f"{name}--{revision}", "RUNNING") for name, revision in keys
    }
    world.see(serve=ServeState("c", standing), groups=groups, entries=entries())
    number = next(number for number, each in enumerate(world.models) if each.spec.source is not None)
    world.source(number, SourceState("resolved", "/w", 7, "none", "float32", digest="d"))
    for name, revision in keys:
        world.depth(name, revision, 0, 1)
    return world.plan()


def assert_nothing_is_lost(records: dict[str, ModelRecord], groups: tuple[Group, ...]) -> None:
    """Traffic goes where it went, and no revision with a proof is dropped, moved or proved again."""
    before = entries()
    traffic = {name: entry.revisions for name, entry in before.items()}
    assert {name: record.weights for name, record in records.items()} == {**traffic, "coming": {}}
    plan = first_plan(records, groups)
    assert {name: entry.revisions for name, entry in plan.entries.items()} == traffic
    assert (plan.registry.delete, plan.registry.drop, plan.resolve) == ((), (), ())
    assert [name for name, entry in plan.entries.items() if entry.reason == "Unproven"] == []
    assert {app.model for app in plan.applications if app.keep_awake} == {"changing", "coming"}
    proved = {
        (name, r) for name, record in records.items() for r, kept in record.revisions.items() if kept.proof
    }
    assert {key for key in proved if plan.records[key[0]].revisions[key[1]].proof is None} == set()
    assert {(app.model, app.revision) for app in plan.applications} >= proved
    assert len(proved) == 7

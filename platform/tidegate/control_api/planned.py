"""What the controller would do about one model, in sentences and numbers. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec

from tidegate.control.desired import ModelRecord, recorded_spec, revision_of
from tidegate.control.observed import SourceState
from tidegate.control.plan import PoolPlan, PoolSnapshot, plan_pool
from tidegate.control.reasons import PROGRESSING
from tidegate.control.resources import Model
from tidegate.control.rollout_view import REFUSED
from tidegate.control.room import hundredths
from tidegate.control.serve_config import Application, split_application_name
from tidegate.control.surge import extra_replicas
from tidegate.control_api.views import PlanView
from tidegate.messages.registry import ModelEntry


def plan_view(snapshot: PoolSnapshot, name: str, now: float) -> PlanView:
    """Return what the controller, at this moment, does first about the model of this name. Where a source is
    to be looked at before anything else, also what follows if it holds what it held."""
    plan = plan_pool(snapshot, now)
    view = _view(snapshot, plan, name)
    model = next(model for model in snapshot.models if model.name == name)
    asked = (name, revision_of(model.spec))
    known = _last_content(model, snapshot.records.get(name))
    if asked not in plan.resolve or known is None:
        return view
    seen = replace(snapshot.seen, sources={**snapshot.seen.sources, asked: known})
    follows = _view(replace(snapshot, seen=seen), plan_pool(replace(snapshot, seen=seen), now), name)
    then = f"{view.actions[0]} If that is what it held:"
    return msgspec.structs.replace(follows, actions=[then, *follows.actions])


def _last_content(model: Model, record: ModelRecord | None) -> SourceState | None:
    """Return what the source of the model's spec held when it was last looked at."""
    uri = model.spec.source.uri if model.spec.source is not None else ""
    kept = reversed(record.revisions.values()) if record is not None else ()
    same = (one for one in kept if one.checkpoint and (one.spec.get("source") or {}).get("uri") == uri)
    return next((one.source for one in same), None)


def _view(snapshot: PoolSnapshot, plan: PoolPlan, name: str) -> PlanView:
    model = next(model for model in snapshot.models if model.name == name)
    planned = {item.revision: item for item in plan.applications if item.model == name}
    now = _standing(snapshot, name)
    first = now | {revision: _most(item, now.get(revision, 0)) for revision, item in planned.items()}
    gpus = _gpus(snapshot, plan, model)
    gpus_now = sum(gpus[revision] * count for revision, count in now.items())
    gpus_peak = sum(gpus[revision] * count for revision, count in first.items())
    peak = sum(first.values())
    record = plan.records.get(name)
    state = record.rollout if record is not None else None
    if record is not None and state is not None and not state.has_ended:  # the steps to come need more
        size = max(state.size, sum(now.values()))
        extra = extra_replicas(model.spec, record, size, hundredths(gpus.get(state.target, 0.0)))
        peak = max(peak, size + extra)
        gpus_peak = max(gpus_peak, gpus_now + gpus.get(state.target, 0.0) * extra)
    entry, rollout = plan.entries.get(name), plan.rollouts.get(name)
    notes = [note for note in plan.notes if note.model == name]
    return PlanView(
        model=name,
        actions=list(_sentences(snapshot, plan, model, planned)),
        replicas_now=sum(now.values()),
        replicas_peak=peak,
        gpus_now=gpus_now,
        gpus_peak=gpus_peak,
        conditions=list(entry.conditions) if entry is not None else [],
        rollout=rollout,
        refusal=next((note.message for note in notes if note.reason == REFUSED), ""),
        ends_at=rollout.ends_at if rollout is not None else 0.0,
    )


def _sentences(
    snapshot: PoolSnapshot, plan: PoolPlan, model: Model, planned: dict[str, Application]
) -> Iterator[str]:
    name, past = model.name, snapshot.records.get(model.name)
    source = model.spec.source
    if source is not None and any(key[0] == name for key in plan.resolve):
        yield f"The source {source.uri} is looked at; what it holds names the revision."
    standing = _standing(snapshot, name)
    for revision, item in planned.items():
        kept = past.revisions.get(revision) if past is not None else None
        new = item.spec.scaling
        if revision not in standing:
            yield f"Revision {revision} starts with {_most(item, 0)} replicas."
        elif kept is not None and (old := recorded_spec(kept, None).scaling) != new:
            yield (
                f"Revision {revision} may have {new.min_replicas} to {new.max_replicas} replicas, and had "
                f"{old.min_replicas} to {old.max_replicas}."
            )
    after = plan.records.get(name)
    state = after.rollout if after is not None else None
    is_begun = state is not None and not state.has_ended and state.phase != "Queued"
    if state is not None and is_begun and state.target not in {*planned, *standing}:
        yield f"Revision {state.target} starts when its turn comes.{_wait(plan.entries.get(name))}"
    before = dict(past.weights) if past is not None else {}
    if after is not None and before != after.weights:
        shares = ", ".join(f"{weight} % {revision}" for revision, weight in after.weights.items())
        yield f"Traffic moves to {shares}."
    for (owner, revision), why in plan.registry.drop:
        if owner == name:
            yield f"Revision {revision} goes: {why}"
    yield from (note.message for note in plan.notes if note.model == name and note.reason != REFUSED)
    for revision in standing:
        if revision not in planned:
            yield f"The replicas of revision {revision} stop when their requests have ended."


def _wait(entry: ModelEntry | None) -> str:
    """Return what a target that may not start yet waits for."""
    found = entry.conditions if entry is not None else []
    return next((f" {each.message}" for each in found if each.type == PROGRESSING), "")


def _standing(snapshot: PoolSnapshot, name: str) -> dict[str, int]:
    """Return the replicas that Serve wants now, by revision."""
    applications = snapshot.seen.serve.applications if snapshot.seen.serve is not None else {}
    named = {split_application_name(key): state for key, state in applications.items()}
    return {key[1]: state.wanted_replicas for key, state in named.items() if key and key[0] == name}


def _most(item: Application, now: int) -> int:
    """Return the replicas that this application has at once at least by the plan, load aside."""
    scaling = item.spec.scaling
    most = scaling.max_replicas if item.granted is None else item.granted
    return min(max(scaling.min_replicas, now, int(item.keep_awake)), most)


def _gpus(snapshot: PoolSnapshot, plan: PoolPlan, model: Model) -> dict[str, float]:
    """Return the GPUs of one replica, by revision."""
    found: dict[str, float] = {}
    for record in (snapshot.records.get(model.name), plan.records.get(model.name)):
        for revision, kept in record.revisions.items() if record is not None else ():
            asked = recorded_spec(kept, None).resources.gpus
            found[revision] = kept.placement.gpus if kept.placement is not None else asked
    for revision in _standing(snapshot, model.name):
        found.setdefault(revision, 0.0)
    return found

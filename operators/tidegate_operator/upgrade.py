"""A Pool's Ray cluster is replaced by one of another generation. Pure.

Surge: the new cluster comes up beside the old one. Once its Serve answers it is the active one, and
applications move to it a few at a time (`moving`): what has arrived there leaves the old cluster's
config, drains, and frees its GPUs for the next. The old cluster goes when it is empty.

Recreate: the old cluster's applications leave, drain, and the cluster goes; only then the new one comes.
Requests wait in the queue meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tidegate.control.observed import ServeState
from tidegate.control.serve_config import Application
from tidegate_operator.cache import Body, is_deleting, labels
from tidegate_operator.moving import Move, merged, move
from tidegate_operator.pod_template import GENERATION_LABEL

Policy = Literal["Surge", "Recreate"]


@dataclass(frozen=True, slots=True)
class Clusters:
    """A Pool's clusters have these parts now. `active` takes the Serve config, `retiring` give theirs up,
    `abandoned` never took over and go at once. `create`: the wanted one is missing and may come."""

    wanted: Body | None
    active: Body | None
    retiring: tuple[Body, ...]
    abandoned: tuple[Body, ...]
    create: bool


def choose(
    generation: str,
    found: Sequence[Body],
    policy: Policy,
    last_active: str,
    answers: Callable[[Body], bool],
) -> Clusters:
    """`found` are the Pool's RayClusters, oldest first; `last_active` is the name that its status says."""
    live = [body for body in found if not is_deleting(body)]
    wanted = next((body for body in live if labels(body).get(GENERATION_LABEL) == generation), None)
    others = [body for body in live if body is not wanted]
    if policy == "Recreate":
        is_free = not others and len(live) == len(found)
        return Clusters(
            wanted=wanted,
            active=wanted if is_free else None,
            retiring=tuple(others),
            abandoned=(),
            create=wanted is None and is_free,
        )
    has_taken_over = wanted is not None and wanted["metadata"]["name"] == last_active
    if wanted is not None and (not others or has_taken_over or answers(wanted)):
        return Clusters(wanted, active=wanted, retiring=tuple(others), abandoned=(), create=False)
    named = next((body for body in others if body["metadata"]["name"] == last_active), None)
    active = named or (others[0] if others else None)
    after = others.index(active) if active is not None else 0
    return Clusters(
        wanted=wanted,
        active=active,
        retiring=tuple(others[:after]),
        abandoned=tuple(others[after + 1 :]),
        create=wanted is None and not _stands(generation, found),
    )


def standing(ray: Clusters, states: Mapping[str, ServeState | None]) -> ServeState | None:
    """Return what the plan sees: the active cluster's Serve, and what still stands elsewhere. `states` are by
    the names of clusters."""
    if ray.active is None:
        return None
    found = states.get(_name(ray.active))
    for body in ray.retiring:
        found = merged(states.get(_name(body)), found)
    return found


def shared_out(
    ray: Clusters,
    states: Mapping[str, ServeState | None],
    applications: Sequence[Application],
    max_unbuilt: int,
) -> Move:
    """Return what the active cluster should hold, and what the retiring ones are still needed for."""
    if ray.active is None:
        return Move((), (), is_done=True)
    if not ray.retiring:
        return Move((), tuple(applications), is_done=True)
    old: ServeState | None = None
    for body in ray.retiring:
        old = merged(states.get(_name(body)), old)
    return move(applications, old, states.get(_name(ray.active)), max_unbuilt)


def kept_configs(old: ServeState, needed: Sequence[Application]) -> dict[str, Mapping[str, Any]]:
    """Return the configs that a retiring cluster keeps, by application, as Serve reported them: what is
    planned now may name groups of workers, or scaling, that this cluster does not have."""
    names = {item.name for item in needed}
    return {
        name: state.config
        for name, state in old.applications.items()
        if name in names and state.config is not None and state.status != "DELETING"
    }


def may_go(old: ServeState | None, part: Move) -> bool:
    """Tell whether a retiring cluster can be deleted: nothing needs it, and nothing is left on it to drain.
    One that does not answer has nothing to lose once all has arrived elsewhere."""
    if old is None:
        return part.is_done
    return not part.old and not old.applications


def _stands(generation: str, found: Sequence[Body]) -> bool:
    """Also one that is being deleted: its name is free only once it is gone."""
    return any(labels(body).get(GENERATION_LABEL) == generation for body in found)


def _name(body: Body) -> str:
    return str(body["metadata"]["name"])

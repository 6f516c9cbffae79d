"""The applications of a pool move from one Ray cluster to the next. Pure.

Both clusters run while a change of the pool that needs new pods comes in. Their replicas pull from the same
queues, so an application may stand in both: it is added to the new one, a few at a time, and leaves the old
one when it has arrived. Its replicas there then drain as after any change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.control.observed import ApplicationState, ServeState
from tidegate.control.serve_config import Application


@dataclass(frozen=True, slots=True)
class Move:
    """Each cluster's Serve should hold this now. With `is_done` the old cluster may go."""

    old: tuple[Application, ...]
    new: tuple[Application, ...]
    is_done: bool


def move(
    applications: Sequence[Application], old: ServeState | None, new: ServeState | None, max_unbuilt: int
) -> Move:
    """`applications` as planned, in their order. While the new Serve does not answer, all stay where they
    are; what the old one does not hold any more is not put back into it."""
    if new is None:
        return Move(tuple(applications), (), is_done=False)
    there = {
        application.name: state
        for application in applications
        if (state := new.applications.get(application.name)) is not None and state.status != "DELETING"
    }
    # Those on their way hold machines twice; no more of them than Serve may build at once.
    room = max_unbuilt - sum(not has_arrived(state) for state in there.values())
    starting: set[str] = set()
    for application in applications:
        if application.name not in there and len(starting) < room:
            starting.add(application.name)
    arrived = {name for name, state in there.items() if has_arrived(state)}
    kept = old.applications if old is not None else {}
    return Move(
        old=tuple(item for item in applications if item.name not in arrived and item.name in kept),
        new=tuple(item for item in applications if item.name in there or item.name in starting),
        is_done=len(arrived) == len(applications),
    )


def merged(old: ServeState | None, new: ServeState | None) -> ServeState | None:
    """One view of both, for the plan: where an application stands in both, that of the one that serves."""
    if old is None or new is None:
        return old or new
    applications = dict(old.applications)
    for name, state in new.applications.items():
        if name not in applications or has_arrived(state):
            applications[name] = state
    return ServeState(new.controller or old.controller, applications)


def has_arrived(state: ApplicationState) -> bool:
    """Tell whether requests need no other cluster: a replica runs, or none is wanted."""
    return state.status == "RUNNING" and state.ready_replicas >= min(1, state.wanted_replicas)

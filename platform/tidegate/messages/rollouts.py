"""A rollout as people and programs see it, and what they may ask of it.

The control loop makes the views; status, events, the control API and the CLI show them unchanged.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Verb = Literal["pause", "resume", "promote", "abort", "undo", "retry", "recheck", "restart"]
Phase = Literal["Queued", "Warming", "Shadow", "Progressing", "Paused", "Aborted", "Completed"]
GateState = Literal["passes", "waits", "fails"]
ENDED: tuple[Phase, ...] = ("Completed", "Aborted")


class Action(msgspec.Struct, frozen=True):
    """What a person asks of a model's rollout. `revision` is undo's goal (empty: the one before)."""

    verb: Verb
    revision: str = ""
    author: str = ""
    at: float = 0.0  # unix seconds


class GateView(msgspec.Struct, frozen=True):
    """One gate's judgement. `evidence` is an e-value, and this gate alone aborts the rollout where it reaches
    `needed`; several may do so together before. A gate that needs no statistics has `needed` 0."""

    name: str
    state: GateState
    message: str
    evidence: float = 0.0
    needed: float = 0.0
    stable_failures: int = 0
    stable_requests: int = 0
    target_failures: int = 0
    target_requests: int = 0


class StepView(msgspec.Struct, frozen=True):
    """A step: the target's share in percent, the least time for it, and whether a person ends it."""

    weight: int
    hold_seconds: float = 0.0
    pause: bool = False


# Whether the source still has what an undo asks for: it is being looked at, or has it no more.
UndoState = Literal["", "LookedAt", "Refused"]


class RolloutView(msgspec.Struct, frozen=True):
    """A model's rollout, or its last one. `step` indexes `steps`, -1 before the first."""

    model: str
    id: str
    strategy: str
    phase: Phase
    stable: str
    target: str
    weight: int
    step: int
    steps: list[StepView]
    reason: str = ""  # of the last decision
    message: str = ""
    gates: list[GateView] = []
    clean_requests: int = 0  # of the target, ended well
    needed_requests: int = 0
    started: float = 0.0  # unix seconds
    step_since: float = 0.0
    ended: float = 0.0
    ends_at: float = 0.0  # predicted; 0: nothing can be said
    position: int = 0  # in the Pool's line of rollouts; 0: it does not wait
    replicas: dict[str, str] = {}  # by revision: ready/wanted
    undo: UndoState = ""  # of one that was asked for after it


class RevisionView(msgspec.Struct, frozen=True):
    """One revision in a model's history, newest first where several are listed."""

    revision: str
    number: int  # 1, 2, 3, ... per model
    created: float
    cause: str
    author: str = ""
    source: str = ""
    commit: str = ""
    digest: str = ""
    weight: int = 0
    state: str = ""  # Serving, Standing, Stored, Refused
    message: str = ""
    spec: dict[str, object] = {}

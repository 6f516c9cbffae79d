"""What lasts of a rollout from one decision to the next. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from tidegate.control.evidence import Thresholds
from tidegate.messages.rollouts import GateView, Phase, StepView


class RolloutState(msgspec.Struct, frozen=True):
    """A model's rollout, or its last one. JSON in the host's store.

    `target` takes over from `stable` (empty: it is the model's first revision); `strategy` and `steps` are
    those of the spec when it began. `step` indexes them, -1 is what comes before the first. `phase` is never
    `Paused`: `is_paused` says that a person holds it, `released` of which step a person has ended the pause,
    `skipped` of which all waiting.

    `weight` is the share of the step, which began at `step_since`; `ready_for` is the share for which
    replicas are made ready. `size` is how many replicas the stable had; `looked_at` and `looked_ended` are
    when its requests were first counted, and how many had ended by then. Times are unix seconds, 0: not yet.
    `is_refused`: the target was given up. `leaving` are revisions whose queues are emptied into the one with
    the traffic. What has ended keeps `gates`, its last judgement; `note` is said of the last refused action.
    """

    id: str
    target: str
    stable: str
    strategy: str
    phase: Phase
    started: float
    steps: list[StepView] = []
    step: int = -1
    step_since: float = 0.0
    ended: float = 0.0
    weight: int = 0
    ready_for: int = 0
    size: int = 0
    is_paused: bool = False
    released: int = -2
    skipped: int = -2
    is_refused: bool = False
    looked_at: float = 0.0
    looked_ended: int = 0
    thresholds: Thresholds = Thresholds()
    leaving: list[str] = []
    reason: str = ""
    message: str = ""
    note: str = ""
    author: str = ""
    gates: list[GateView] = []
    clean_requests: int = 0
    needed_requests: int = 0

    @property
    def has_ended(self) -> bool:
        return self.phase in ("Completed", "Aborted")

    @property
    def durable(self) -> RolloutState:
        """It as it is worth storing: what every round finds out anew is left out until its end."""
        return (
            self
            if self.has_ended
            else replace(self, message="", gates=[], clean_requests=0, needed_requests=0)
        )

    def refuses(self, revision: str) -> bool:
        """Tell whether `revision` was given up, and stays so."""
        return self.is_refused and self.target == revision


@dataclass(frozen=True, slots=True)
class Note:
    """A decision of this round about a rollout, for logs and Events. `is_trouble`: worth a warning."""

    model: str
    reason: str
    message: str
    is_trouble: bool = False

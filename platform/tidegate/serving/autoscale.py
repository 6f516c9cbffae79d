"""Decide how many replicas a revision should have; Ray Serve asks through the policy.

The decision is a pure function of the queue's depth. Serve puts its own bounds and delays around it
(`min_replicas`, `max_replicas`, `downscale_delay_s`, `downscale_to_zero_delay_s`), counted from the first of
an unbroken row of decisions for fewer; so the policy keeps no clock of idleness, it only has to say "stay"
whenever something happened. Serve goes below one replica only from one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from tidegate.replica_args import SLOTS_UNTIL_KNOWN, PolicyArgs
from tidegate.serving import spare
from tidegate.serving.queue_watch import Sighting, shared_watch

FRESH_SECONDS = 3.0  # an older sighting decides nothing

Reason = Literal["QueueUnknown", "WakeUp", "ScaleUp", "Steady", "ScaleDown", "Active", "Idle"]


@dataclass(frozen=True, slots=True)
class Decision:
    replicas: int
    reason: Reason


def desired_replicas(
    *,
    waiting: int,
    running: int,
    replicas: int,
    target_in_flight: float,
    is_active: bool,
    minimum: int,
    maximum: int,
) -> Decision:
    """The number of replicas that holds `waiting + running` requests at `target_in_flight` each.

    `replicas` is the present target, `is_active` whether requests came and went since the last decision
    (short ones are never seen waiting or running). Raises `ValueError` where `target_in_flight` is not
    above 0. The result lies within `minimum` and `maximum`.
    """
    if target_in_flight <= 0:
        raise ValueError(f"target_in_flight must be above 0, not {target_in_flight}")
    load = waiting + running
    wanted = math.ceil(load / target_in_flight)
    if wanted == 0 and is_active and replicas > 0:
        return Decision(_bounded(1, minimum, maximum), "Active")
    wanted = _bounded(wanted, minimum, maximum)
    if wanted > replicas:
        return Decision(wanted, "WakeUp" if replicas == 0 else "ScaleUp")
    if wanted == replicas:
        return Decision(wanted, "Steady")
    return Decision(wanted, "ScaleDown" if load or wanted else "Idle")


class QueueDepthPolicy:
    """Serve makes one instance per application and calls it about ten times a second on the controller's
    event loop. Where Redis is slow or gone it answers with the present number at once."""

    def __init__(self, **args: Any) -> None:
        """`args` are the fields of `PolicyArgs`."""
        found = msgspec.convert(args, PolicyArgs)
        self._watch = shared_watch(found.redis_url, found.key_prefix)
        self._queue = (found.model, found.revision)
        self._tokens_total = -1

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """`ctx` is Serve's `AutoscalingContext`. A `target_ongoing_requests` below 1 stands for the engine's
        own number of slots."""
        spare.keep()
        sighting = self._watch.latest(self._queue)
        present = int(ctx.target_num_replicas)
        if sighting is None or time.monotonic() - sighting.at > FRESH_SECONDS:
            return present, {"reason": "QueueUnknown"}
        target = float(ctx.config.get_target_ongoing_requests())
        most = int(ctx.capacity_adjusted_max_replicas)
        is_held = ctx.config.upscale_delay_s > 0  # the pool has no room for more (`control.serve_config`)
        decision = desired_replicas(
            waiting=sighting.waiting,
            running=sighting.running,
            replicas=present,
            target_in_flight=target if target >= 1 else sighting.slots or SLOTS_UNTIL_KNOWN,
            is_active=self._was_active(sighting),
            minimum=int(ctx.capacity_adjusted_min_replicas),
            maximum=min(most, present) if is_held else most,
        )
        return decision.replicas, {
            "reason": decision.reason,
            "waiting": sighting.waiting,
            "running": sighting.running,
        }

    def _was_active(self, sighting: Sighting) -> bool:
        """Say whether tokens were generated since the last call. A replica that left takes its count with it,
        which is no activity."""
        before, self._tokens_total = self._tokens_total, sighting.tokens_total
        return 0 <= before < sighting.tokens_total


def _bounded(number: int, minimum: int, maximum: int) -> int:
    return max(minimum, min(maximum, number))

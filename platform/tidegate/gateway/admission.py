"""Decide whether a call may wait for a model. Pure: values in, values or typed errors out.

Order of the checks: the model exists, it can come, (the queue takes the call), the wait is bearable.
The queue's own bounds are checked inside its atomic submit; `queue_full` turns its answer into the refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from tidegate.errors import InvalidRequest, ModelNotFound, ModelUnavailable, QueueFull
from tidegate.messages.queue import Depth, Rejected
from tidegate.messages.registry import ModelEntry

UNKNOWN_DRAIN_RETRY_SECONDS = 5.0
WAKING_RETRY_SECONDS = 10.0
SHORTEST_WAIT_SECONDS = 1.0  # less could pass before a free replica has claimed the request
_NAMES_SHOWN = 20
_NO_NAMES = ("", "tgi", "dummy")  # huggingface_hub, and who follows TGI's docs, send the latter two


def find_listed(name: str, models: Mapping[str, ModelEntry]) -> ModelEntry:
    """A name of nothing means the only model. Raises `ModelNotFound`, which names the models that exist."""
    entry = models.get(name)
    if entry is None and name in _NO_NAMES and len(models) == 1:
        [entry] = models.values()
    if entry is None:
        said = f"The model {name!r} does not exist." if name else "The call names no model."
        raise ModelNotFound(f"{said} {_existing(models)}", param="model")
    return entry


def find_model(name: str, models: Mapping[str, ModelEntry]) -> ModelEntry:
    """A model that takes requests. Raises `ModelNotFound`, and `ModelUnavailable` with the model's own
    sentence."""
    entry = find_listed(name, models)
    if not entry.accepts or not entry.revisions:
        said = entry.message or "It has no revision that can serve yet."
        reason = f" ({entry.reason})" if entry.reason else ""
        raise ModelUnavailable(
            f"The model {name!r} takes no requests now{reason}: {said}",
            param="model",
            retry_after_seconds=WAKING_RETRY_SECONDS,
        )
    return entry


def check_task(entry: ModelEntry, task: str, paths: Mapping[str, str]) -> None:
    """Raise `InvalidRequest` where an endpoint of `task` (empty: of any) is not the model's. `paths` names an
    endpoint for each task."""
    own = entry.task if entry.task in paths else "generate"  # hosts of the version before call it otherwise
    if task and task != own:
        raise InvalidRequest(
            f"model: {entry.name!r}: it is served to {own}, not to {task}: send this to {paths[own]}, or "
            f"name a model that GET /v1/models shows with the task {task}.",
            param="model",
            code="wrong_task",
        )


def choose_revision(weights: Mapping[str, int], key: str) -> str:
    """Choose by weight. One `key` gets the same revision in every gateway, as long as the table stays. The
    first of the table keeps its keys as its weight grows: so the one that is rolled out is first.

    Where no weight is positive the last revision is taken. `weights` is not empty.
    """
    total = sum(weight for weight in weights.values() if weight > 0)
    if total and len(weights) > 1:
        point = _point(key, total)
        for revision, weight in weights.items():
            if weight > 0 and point < weight:
                return revision
            point -= max(0, weight)
    return list(weights)[-1]


def session_of(tenant: str, named: str) -> str:
    """The session that a call names, as a short key of this tenant's own; empty: it names none."""
    return blake2b(f"{tenant}\0{named}".encode(), digest_size=8).hexdigest() if named else ""


def is_shadowed(entry: ModelEntry, call_id: str, revision: str) -> bool:
    """Whether a copy of this call goes to the revision that is tried out."""
    if entry.shadow in ("", revision):
        return False
    return _point(f"shadow {call_id}", 100) < entry.shadow_share


def wait_budget_seconds(entry: ModelEntry, header: str | None) -> float:
    """Return how long the call may wait: the model's bound, or less where the client says so.

    Raises `InvalidRequest` for a header that is not a number of at least 1.
    """
    budget = entry.limits.max_wait_seconds
    if header is None:
        return budget
    try:
        wanted = float(header)
    except ValueError:
        wanted = -1.0
    if not SHORTEST_WAIT_SECONDS <= wanted < float("inf"):
        raise InvalidRequest(
            f"x-tidegate-max-wait-seconds: {header[:40]!r}: send a number of seconds, 1 or more.",
            param="x-tidegate-max-wait-seconds",
        )
    return min(budget, wanted)


def predicted_wait_seconds(departures: int, depth: Depth, entry: ModelEntry) -> float:
    """Until `departures` requests have left the queue, and a replica is there at all. 0: nothing is known
    that would make it wait."""
    wake = entry.wake_seconds if entry.replicas_ready == 0 else 0.0
    return wake + departures * depth.drain_seconds


def check_wait(waiting_ahead: int, depth: Depth, entry: ModelEntry, budget_seconds: float) -> None:
    """Refuse now what would expire in the queue. Raises `ModelUnavailable` where the model's waking alone
    takes longer than the budget, `QueueFull` where the queue does."""
    predicted = predicted_wait_seconds(waiting_ahead, depth, entry)
    if predicted <= budget_seconds:
        return
    if entry.replicas_ready == 0 and entry.wake_seconds > budget_seconds:
        raise ModelUnavailable(
            f"The model {entry.name!r} sleeps and takes {entry.wake_seconds:.0f} s to wake; the request "
            f"may wait {budget_seconds:.0f} s. Allow a longer wait or try again later.",
            retry_after_seconds=entry.wake_seconds,
        )
    raise QueueFull(
        f"The wait for the model {entry.name!r} would be about {predicted:.0f} s behind {waiting_ahead} "
        f"requests; the request may wait {budget_seconds:.0f} s.",
        code="wait_too_long",
        retry_after_seconds=predicted - budget_seconds,
    )


def queue_full(rejected: Rejected, entry: ModelEntry, sequences: int) -> QueueFull:
    """The refusal for a submit that the queue's bounds turned down.

    Retry-After is the time in which a quarter of the queue (and at least this call's size) drains: many
    are refused at once, and all coming back for one free place would be refused again.
    """
    whose = {
        "model": f"The queue of the model {entry.name!r} is full",
        "key": f"Your key's share of the queue of the model {entry.name!r} is full",
        "tenant": "Your tenant's share of the queue is full",
        "total": "The queue is full",
    }[rejected.bound]
    drain = rejected.depth.drain_seconds
    departures = max(sequences, rejected.depth.waiting // 4)
    retry = departures * drain if drain > 0 else UNKNOWN_DRAIN_RETRY_SECONDS
    return QueueFull(
        f"{whose}: it holds at most {rejected.limit} {rejected.unit}, "
        f"{rejected.depth.waiting} requests wait and {rejected.depth.running} run.",
        retry_after_seconds=retry,
    )


def kept_full(whose: str, seconds: float) -> QueueFull:
    """The refusal for a call that is to be kept where what is kept already has too many bytes."""
    of = "of your tenant " if whose == "tenant" else ""
    return QueueFull(
        f"The calls {of}that are kept to be read again have too many bytes; each is kept for {seconds:.0f} s "
        "after its end. Send the call later, or one that is not kept: without event ids, with store: false.",
        code="too_much_kept",
        retry_after_seconds=seconds / 4,
    )


def _point(key: str, total: int) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % total


def _existing(models: Mapping[str, ModelEntry]) -> str:
    if not models:
        return "No model is registered yet."
    names = sorted(models)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return "Models that exist: " + ", ".join(names[:_NAMES_SHOWN]) + more + "."

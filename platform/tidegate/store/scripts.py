"""The Lua scripts of the store: what each is given and what it answers, beside its name.

A method of `Scripts` is one script, `lua/{name}.lua`, and the only place that knows the order of its
arguments and of its reply. All but `submit` and `sweep` may be carried out twice and are sent again where a
connection breaks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from tidegate.errors import QueueOutOfMemory, RequestTooLarge
from tidegate.messages.codec import (
    decode_request,
    decode_segments,
    encode_kept,
    encode_prompt,
    encode_request,
    encode_segment,
    frame,
)
from tidegate.messages.kept import KeptCall
from tidegate.messages.prefixes import prefix_chain, prefix_salt
from tidegate.messages.queue import NO_LABEL, Accepted, Bounds, Depth, Label, Place, Rejected
from tidegate.messages.work import (
    Claim,
    Inputs,
    PairPrompt,
    Prompt,
    Request,
    Segment,
    TextPrompt,
    TokenPrompt,
)
from tidegate.replica_args import DEFAULT_TIMES, Times
from tidegate.store import names
from tidegate.store.connection import Connection, Script
from tidegate.store.wire import Argument

SHARED = ("base", "waiting", "affinity", "common")
# The first line of each. Where Redis has no memory left, what frees some in the end goes on.
MAY_GROW, FREES, READS = "#!lua", "#!lua flags=allow-oom", "#!lua flags=no-writes"
# Of shadows: how many may wait in a queue, and for how long.
MOST_SHADOWS, SHADOW_SECONDS = 64, 30
RECORD_SECONDS = 3600  # a replica's own record outlives its leases by far, and no longer
SUBMIT_FIELDS = 7  # of the reply, per call


def load(name: str, first_line: str) -> Script:
    """A script behind its first line, with those parts of the shared files that it uses: Redis makes all
    functions of a script anew each time it runs. A part is what stands between two empty lines; it uses only
    parts before it."""
    folder = files("tidegate.store") / "lua"
    shared = "\n\n".join((folder / f"{part}.lua").read_text("utf-8").strip() for part in SHARED)
    text = (folder / f"{name}.lua").read_text("utf-8")
    used = _words(text)
    for part in reversed(shared.split("\n\n")):
        if not used.isdisjoint(_locals(part)):
            text, used = f"{part}\n\n{text}", used | _words(part)
    text = f"{first_line}\n{text}"
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _words(lua: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", re.sub(r"--.*", "", lua)))


def _locals(lua: str) -> frozenset[str]:
    """The names that a part of a shared file defines."""
    defined = re.findall(r"^local (?:function )?([\w, ]+)", lua, re.MULTILINE)
    return frozenset(name.strip() for listed in defined for name in listed.split(","))


SUBMIT = load("submit", MAY_GROW)
CLAIM = load("claim", FREES)
EMIT, EMIT_WHEN_FULL = load("emit", MAY_GROW), load("emit", FREES)
RENEW = load("renew", FREES)
RELEASE = load("release", FREES)
CANCEL = load("cancel", FREES)
FORGET = load("forget", FREES)
DROP = load("drop", FREES)
SWEEP = load("sweep", FREES)
GIVE_WAY = load("give_way", FREES)
MOVE = load("move", FREES)
SHADOW = load("shadow", MAY_GROW)
DEPTHS = load("depths", READS)
AGES = load("ages", READS)
BEAT = load("beat", FREES)
BEATING = load("beating", READS)
PUT = load("put", FREES)
PROBE = load("probe", MAY_GROW)
KEEP = load("keep", MAY_GROW)
ATTEND = load("attend", FREES)
UNKEEP = load("unkeep", FREES)


@dataclass(frozen=True, slots=True)
class SubmitCall:
    """One call of `submit`, encoded: requests that share model, revision, tenant, key and gateway."""

    queue: str
    request_ids: list[str]
    size_bytes: int
    arguments: list[Argument]

    @classmethod
    def of(cls, requests: Sequence[Request], bounds: Bounds, label: Label = NO_LABEL) -> SubmitCall:
        _check_number(requests, bounds)
        first = requests[0]
        queue = names.queue_name(first.model, first.revision)
        arguments: list[Argument] = [
            len(requests),
            queue,
            first.tenant,
            first.key,
            first.gateway,
            label.cohort,
            label.session,
            int(label.is_shadowed),
            bounds.model.max_requests,
            bounds.model.max_bytes,
            bounds.key_max_requests,
            bounds.key_max_bytes,
            bounds.tenant_max_requests,
            bounds.tenant_max_bytes,
            bounds.total_max_requests,
            bounds.total_max_bytes,
        ]
        prompts = _encoded_prompts(requests, bounds)
        chains = {id(request.work.prompt): request.work for request in requests}
        prefixes = {key: prefix_chain(prefix_salt(first.tenant), work) for key, work in chains.items()}
        size_bytes = 0
        for request in requests:
            body = encode_request(request, prompts[id(request.work.prompt)])
            size_bytes += len(body)
            prefix = prefixes[id(request.work.prompt)]
            arguments += (request.id, request.deadline, request.priority, len(body), body, prefix)
        return cls(queue, [request.id for request in requests], size_bytes, arguments)


def _check_number(requests: Sequence[Request], bounds: Bounds) -> None:
    """Raise `RequestTooLarge` for more requests than an empty queue would take."""
    limit, whose = min(
        (bounds.model.max_requests, f"the queue of the model {requests[0].model!r}"),
        (bounds.key_max_requests, f"one key's share of the queue of the model {requests[0].model!r}"),
        (bounds.tenant_max_requests, "a tenant's share of the queue"),
        (bounds.total_max_requests, "the queue"),
    )
    if len(requests) <= limit:
        return
    number, what = _parts(requests)
    if isinstance(prompt := requests[0].work.prompt, Inputs):
        remedy = f"Send at most {limit * len(prompt.items)} inputs (of a rerank, documents) in one call."
    else:
        remedy = "Ask for fewer choices, or send fewer prompts in one call."
    raise RequestTooLarge(
        f"The call's {number} {what} make {len(requests)} requests, and {whose} holds {limit}. {remedy}"
    )


def _encoded_prompts(requests: Sequence[Request], bounds: Bounds) -> dict[int, bytes]:
    """Each prompt by its identity, encoded once: the choices of a call share one. Raises `RequestTooLarge`
    before the requests are made for what no empty queue would take, and before anything is encoded where the
    lengths alone show it: a small body may name one long query and many documents that each go with it."""
    limit, whose = min(
        (bounds.key_max_bytes, f"one key's share of the queue of the model {requests[0].model!r}"),
        (bounds.tenant_max_bytes, "a tenant's share of the queue"),
        (bounds.total_max_bytes, "the queue"),
    )
    if sum(_least_bytes(request.work.prompt) for request in requests) > limit:
        raise _too_many_bytes(requests, limit, whose)
    prompts: dict[int, bytes] = {}
    size_bytes = 0
    for request in requests:
        prompt = request.work.prompt
        if id(prompt) not in prompts:
            prompts[id(prompt)] = encode_prompt(prompt)
        size_bytes += len(prompts[id(prompt)])
        if size_bytes > limit:
            raise _too_many_bytes(requests, limit, whose)
    return prompts


def _least_bytes(prompt: Prompt | PairPrompt | Inputs) -> int:
    """How many bytes it has at least once it is encoded."""
    match prompt:
        case Inputs(items):
            return sum(map(_least_bytes, items))
        case PairPrompt(text, pair):
            return len(text) + len(pair)
        case TextPrompt(text):
            return len(text)
        case TokenPrompt(token_ids):
            return len(token_ids)
    return 0


def _too_many_bytes(requests: Sequence[Request], limit: int, whose: str) -> RequestTooLarge:
    number, what = _parts(requests)
    return RequestTooLarge(
        f"The prompts of the call's {number} {what} have more than {limit} bytes together, which is all that "
        f"{whose} holds. Ask for fewer {what} or send less."
    )


def _parts(requests: Sequence[Request]) -> tuple[int, str]:
    """What the requests of a call are to its client, and how many that are."""
    inputs = [prompt for request in requests if isinstance(prompt := request.work.prompt, Inputs)]
    return (sum(len(each.items) for each in inputs), "inputs") if inputs else (len(requests), "sequences")


class Scripts:
    """Runs scripts for one key prefix. Every method raises `QueueUnavailable` while Redis is away."""

    def __init__(self, connection: Connection, key_prefix: str, times: Times = DEFAULT_TIMES) -> None:
        self._connection = connection
        self._prefix = names.prefix(key_prefix)
        self._times = times

    async def submit(
        self, calls: Iterable[SubmitCall], *, now: float, is_repeat: bool = False
    ) -> list[Accepted | Rejected]:
        """Accept or refuse each call by itself. `now` is the clock that set the deadlines. A
        repeat finds what a former try has written."""
        arguments = [argument for call in calls for argument in call.arguments]
        reply = await self._connection.run(
            SUBMIT, self._prefix, now, int(is_repeat), *arguments, repeat=is_repeat
        )
        return [_outcome(*reply[at : at + SUBMIT_FIELDS]) for at in range(0, len(reply), SUBMIT_FIELDS)]

    async def claim(
        self, queue: str, replica: str, *, number: int, most: int, takes_all: bool
    ) -> tuple[list[Claim], bool]:
        """Lease up to `most` requests; returns also whether something was left to another replica, as it may
        be where not `takes_all`. The same `number` again gets the same requests again."""
        times = self._times
        ages = times.lease_seconds, times.expire_seconds, RECORD_SECONDS
        left, leased = await self._run(CLAIM, queue, replica, number, most, *ages, int(takes_all))
        claims = [Claim(decode_request(body), attempt, decode_segments(log)) for attempt, body, log in leased]
        return claims, left > 0

    async def shadow(self, original: str, shadow: Request, bounds: Bounds, cohort: str) -> bool:
        """Copy a client's request; returns whether there was room for that."""
        body = encode_request(shadow, encode_prompt(shadow.work.prompt))
        is_taken = await self._connection.run(
            SHADOW,
            self._prefix,
            original,
            shadow.id,
            names.queue_name(shadow.model, shadow.revision),
            shadow.key,
            shadow.priority,
            cohort,
            MOST_SHADOWS,
            bounds.model.max_requests,
            bounds.model.max_bytes,
            bounds.total_max_requests,
            bounds.total_max_bytes,
            SHADOW_SECONDS,
            len(body),
            body,
        )
        return bool(is_taken)

    async def give_way(self, queues: Collection[str]) -> int:
        """Drop the shadows that wait in these queues (empty: in all); returns how many that were."""
        dropped: int = await self._run(GIVE_WAY, *queues)
        return dropped

    async def emit(
        self, replica: str, segments: Sequence[tuple[int, Segment]], ends: Mapping[str, str]
    ) -> list[str]:
        """Write (attempt, segment) pairs; returns the ids whose attempt is not current. `ends`: the outcomes
        that the end of a request counts as, by its id. Where Redis has no memory left, the requests with the
        largest logs end instead."""
        arguments: list[Argument] = []
        for attempt, segment in segments:
            end = ""
            if segment.finish is not None:
                end = f"{segment.finish.reason} {ends.get(segment.request_id, '')}"
            framed = frame(encode_segment(segment))
            arguments += (segment.request_id, attempt, segment.seq, end, framed)
        ttl = self._times.expire_seconds
        try:
            return _ids(await self._run(EMIT, ttl, replica, 0, *arguments))
        except QueueOutOfMemory:
            return _ids(await self._run(EMIT_WHEN_FULL, ttl, replica, 1, *arguments))

    async def renew(self, replica: str, leases: Sequence[tuple[str, int]]) -> list[str]:
        """Renew (id, attempt) leases; returns the ids that are no longer this replica's."""
        return _ids(
            await self._run(RENEW, replica, self._times.lease_seconds, RECORD_SECONDS, *_flat(leases))
        )

    async def release(
        self, replica: str, leases: Sequence[tuple[str, int]], *, is_fault: bool, reason: str
    ) -> None:
        """Give (id, attempt) leases back, as after the replica's death where it is a fault."""
        ttl = self._times.expire_seconds
        await self._run(RELEASE, replica, int(is_fault), reason, ttl, *_flat(leases))

    async def cancel(self, request_ids: Sequence[str], message: str) -> None:
        await self._run(CANCEL, message, self._times.expire_seconds, *request_ids)

    async def forget(self, request_ids: Sequence[str]) -> None:
        """Remove what has ended, before its time to live is over."""
        await self._run(FORGET, *request_ids)

    async def drop(self, queue: str, *, code: str, message: str, most: int) -> int:
        """Cancel up to `most` that wait in a queue that goes away; returns how many are left."""
        left: int = await self._run(DROP, queue, code, message, self._times.expire_seconds, most)
        return left

    async def move(
        self, queue: str, other: str, *, may_continue: bool, code: str, message: str, most: int
    ) -> int:
        """Move up to `most` that wait to another queue; returns how many are left. One that has emitted and
        may not be continued there fails with `code` and `message`."""
        ttl = self._times.expire_seconds
        left: int = await self._run(MOVE, queue, other, int(may_continue), code, message, ttl, most)
        return left

    async def sweep(self, gateway: str, queue: str, *, most: int) -> tuple[int, int]:
        """Do what time does; returns how much was done, and how many wait in `queue` (empty: 0)."""
        times = self._times
        done, waiting = await self._connection.run(
            SWEEP,
            self._prefix,
            gateway,
            queue,
            times.orphan_seconds,
            times.expire_seconds,
            most,
            times.sweep_pause_seconds,
            times.sweep_grace_seconds,
        )
        return done, waiting

    async def depths(
        self, queues: Sequence[str], waiting: Sequence[tuple[str, str]] = ()
    ) -> tuple[dict[str, Depth], list[Place]]:
        """Return the depth of each queue, and the place of each (id, which of `queues` it was submitted to):
        it may be in another one by now."""
        index = {queue: position for position, queue in enumerate(queues, 1)}
        pairs = [part for request_id, queue in waiting for part in (request_id, index[queue])]
        reply: list[Any] = await self._run(DEPTHS, len(queues), *queues, *pairs)
        depths = dict(zip(queues, (_depth(*found) for found in reply[: len(queues)]), strict=True))
        places = []
        for (ahead, *moved), (_, queue) in zip(reply[len(queues) :], waiting, strict=True):
            places.append(Place(None if ahead < 0 else ahead, _depth(*moved) if moved else depths[queue]))
        return depths, places

    async def ages(self, queue: str, replicas: Sequence[str], *, most: int) -> list[tuple[str, float]]:
        """Return (cohort, seconds since its submit) of the requests that have no segment yet."""
        now, *found = await self._run(AGES, most, queue, *replicas)
        return [
            (cohort.decode(), max(0.0, float(now) - float(created)))
            for cohort, created in zip(found[::2], found[1::2], strict=True)
        ]

    async def beat(self, replica: str, stats: bytes, metrics: bytes = b"", *, listed_seconds: float) -> None:
        """List a replica's statistics for so long; 0 seconds: it is gone. No `metrics`: those from before."""
        await self._run(BEAT, replica, stats, listed_seconds, metrics)

    async def beating(self, what: Literal["stats", "metrics"] = "stats") -> list[bytes]:
        """The statistics of the replicas that are listed, or their engines' own metrics."""
        found: list[bytes] = await self._run(BEATING, what)
        return found

    async def probe(self) -> None:
        """Raises what a submit would raise now."""
        await self._run(PROBE)

    async def put(self, what: str, name: str, text: bytes) -> None:
        """Write a model, key or report: few and small, and a revoked key must not wait for memory."""
        await self._run(PUT, what, name, text)

    async def keep(
        self, call: KeptCall, *, seconds: float, linger_seconds: float, tenant_bytes: int, total_bytes: int
    ) -> Literal["", "tenant", "total"]:
        """Keep a call; returns whose bound on the bytes of all that is kept it would pass."""
        about = (call.id, call.tenant, call.sequences, seconds, linger_seconds)
        reply = await self._run(KEEP, *about, tenant_bytes, total_bytes, encode_kept(call))
        return reply.decode()  # type: ignore[no-any-return]  # the words of keep.lua

    async def attend(self, call_ids: Sequence[str]) -> None:
        """Somebody reads these kept calls now."""
        await self._run(ATTEND, *call_ids)

    async def unkeep(self, call_ids: Sequence[str], message: str) -> None:
        """Remove kept calls with all that is kept of them; what of them runs is cancelled."""
        await self._run(UNKEEP, message, self._times.expire_seconds, *call_ids)

    async def _run(self, script: Script, *arguments: Argument) -> Any:
        return await self._connection.run(script, self._prefix, *arguments, repeat=True)


def _outcome(
    is_accepted: int, ahead: int, waiting: int, running: int, drain: bytes, limit: int, refused: bytes
) -> Accepted | Rejected:
    depth = _depth(waiting, running, drain)
    if is_accepted:
        return Accepted(ahead, depth)
    bound, unit, *shadows = refused.decode().split()
    return Rejected(bound, unit, limit, depth, bool(shadows))  # type: ignore[arg-type]  # the words of submit.lua


def _depth(waiting: int, running: int, drain: bytes) -> Depth:
    return Depth(waiting, running, float(drain))


def _ids(reply: list[bytes]) -> list[str]:
    return [request_id.decode() for request_id in reply]


def _flat(leases: Sequence[tuple[str, int]]) -> list[Argument]:
    return [part for lease in leases for part in lease]

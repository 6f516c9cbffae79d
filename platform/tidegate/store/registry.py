"""Models, proofs of their revisions, and the replicas that are alive, as Redis holds them.

Written by the control loop (models) and by replicas (reports, statistics); read by gateways, the control loop
and the CLI. Implements `tidegate.gateway.ports.ModelRegistry` and `tidegate.serving.ports.ReplicaRegistry`.

    {prefix}:models   hash  name -> ModelEntry          {prefix}:stats  hash  replica -> ReplicaStats
    {prefix}:reports  hash  queue -> RevisionReport     {prefix}:beats  zset  replica -> when it falls silent
                                                        {prefix}:metrics  hash  replica -> its engine's own
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

import msgspec

from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport
from tidegate.replica_args import DEFAULT_TIMES, Times
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.follower import Follower
from tidegate.store.outcomes import OutcomeStore
from tidegate.store.scripts import Scripts

LISTED_BEATS = 3  # that a replica may miss
MOST_CANCELLED_PER_STEP = 200
MOST_MOVE_STEPS = 50  # of one call

_encode = msgspec.json.Encoder().encode
_entry = msgspec.json.Decoder(ModelEntry)
_report = msgspec.json.Decoder(RevisionReport)
_stats = msgspec.json.Decoder(ReplicaStats)


class Registry:
    """Uses `connection`, which its owner opens and closes. `changed` is called after each change of the
    snapshot."""

    def __init__(
        self,
        connection: Connection,
        *,
        key_prefix: str,
        times: Times = DEFAULT_TIMES,
        changed: Callable[[], None] | None = None,
    ) -> None:
        self.outcomes = OutcomeStore(connection, key_prefix)
        self._connection = connection
        self._scripts = Scripts(connection, key_prefix, times)
        self._prefix = names.prefix(key_prefix)
        self._channel = names.change_channel(key_prefix, "models")
        self._listed_seconds = LISTED_BEATS * times.beat_seconds
        self._changed = changed
        self._models: dict[str, ModelEntry] = {}
        self._follower = Follower(connection, self._channel, self._load)

    async def start(self) -> None:
        """Load the models and follow their changes from now on. Raises `QueueUnavailable`."""
        await self._follower.start()

    async def close(self) -> None:
        await self._follower.close()

    def models(self) -> Mapping[str, ModelEntry]:
        """The snapshot that `start` keeps."""
        return MappingProxyType(self._models)

    async def read_models(self, wanted: Collection[str] | None = None) -> dict[str, ModelEntry]:
        """All models, or those of the `wanted` names that are there, read now."""
        if wanted is None:
            found = await self._connection.call("HGETALL", self._prefix + "models", repeat=True)
            return {name.decode(): _entry.decode(text) for name, text in found.items()}
        asked = list(wanted)
        texts = await self._fields("models", asked)
        return {
            name: _entry.decode(text) for name, text in zip(asked, texts, strict=True) if text is not None
        }

    async def put_model(self, entry: ModelEntry) -> None:
        await self._scripts.put("models", entry.name, _encode(entry))

    async def delete_model(self, name: str, message: str = "") -> None:
        """Forget a model, its reports and its queues. Waiting requests are cancelled with `message`; running
        ones finish where their replica lets them."""
        text = await self._connection.call("HGET", self._prefix + "models", name, repeat=True)
        await self._connection.call("HDEL", self._prefix + "models", name, repeat=True)
        await self._publish(name)
        known = await self._connection.call("HKEYS", self._prefix + "reports", repeat=True)
        revisions = {
            queue.decode().rpartition("--")[2]
            for queue in known
            if queue.decode().rpartition("--")[0] == name
        }
        if text is not None:
            revisions.update(_entry.decode(text).revisions)
        for revision in revisions:
            await self.drop_revision(name, revision, message or f"The model {name!r} was removed.")

    async def drop_revision(self, model: str, revision: str, message: str) -> None:
        """Forget one revision's report and queue. Its waiting requests are cancelled with `message`."""
        queue = names.queue_name(model, revision)
        await self._connection.call("HDEL", self._prefix + "reports", queue, repeat=True)
        while await self._scripts.drop(
            queue, code="ModelRemoved", message=message, most=MOST_CANCELLED_PER_STEP
        ):
            continue  # a long queue goes in steps, so that none holds Redis up

    async def move_revision(
        self, model: str, from_revision: str, to_revision: str, may_continue: bool
    ) -> int:
        """Let what waits for one revision wait for another one, at its old place. What has emitted goes along
        where `may_continue`, and fails else. What runs is left alone; it goes with a later call, if it comes
        back to the line. Returns how many are left waiting."""
        left = 0
        for _ in range(MOST_MOVE_STEPS):
            left = await self._scripts.move(
                names.queue_name(model, from_revision),
                names.queue_name(model, to_revision),
                may_continue=may_continue,
                code="RevisionAborted",
                message=f"The answer had begun on a revision of the model {model!r} that was rolled back, "
                "and another revision cannot go on with it. Send the request again.",
                most=MOST_CANCELLED_PER_STEP,
            )
            if not left:
                break
        return left

    async def reports(
        self, wanted: Collection[tuple[str, str]] | None = None
    ) -> dict[tuple[str, str], RevisionReport]:
        """The newest report of each (model, revision), or of those `wanted` that have one."""
        if wanted is None:
            found = await self._connection.call("HVALS", self._prefix + "reports", repeat=True)
        else:
            found = await self._fields("reports", [names.queue_name(*key) for key in wanted])
        reports = [_report.decode(text) for text in found if text is not None]
        return {(report.model, report.revision): report for report in reports}

    async def report(self, report: RevisionReport) -> None:
        queue = names.queue_name(report.model, report.revision)
        await self._scripts.put("reports", queue, _encode(report))

    async def replicas(self) -> list[ReplicaStats]:
        """The replicas that have beaten within the last seconds, by name."""
        found = await self._scripts.beating()
        return sorted((_stats.decode(text) for text in found), key=lambda stats: stats.replica)

    async def engine_metrics(self) -> list[bytes]:
        return await self._scripts.beating("metrics")

    async def beat(self, stats: ReplicaStats, metrics: bytes = b"") -> None:
        await self._scripts.beat(stats.replica, _encode(stats), metrics, listed_seconds=self._listed_seconds)

    async def gone(self, stats: ReplicaStats) -> None:
        await self._scripts.beat(stats.replica, b"", listed_seconds=0)

    async def _fields(self, key: str, fields: Sequence[str]) -> list[bytes | None]:
        """These fields of a hash, in their order; None for each that is not there."""
        if not fields:
            return []
        found: list[bytes | None] = await self._connection.call(
            "HMGET", self._prefix + key, *fields, repeat=True
        )
        return found

    async def _publish(self, name: str) -> None:
        await self._connection.call("PUBLISH", self._channel, name, repeat=True)

    async def _load(self, changed: Collection[str] | None) -> None:
        if changed is None:
            self._models = await self.read_models()
        else:
            asked = sorted(changed)
            texts = await self._fields("models", asked)
            models = {name: entry for name, entry in self._models.items() if name not in changed}
            for name, text in zip(asked, texts, strict=True):
                if text is not None:
                    models[name] = _entry.decode(text)
            self._models = models
        if self._changed is not None:
            self._changed()

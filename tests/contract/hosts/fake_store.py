"""Registry and queues in memory, for hosts and replicas; `test_fakes.py` holds them to the real ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from tidegate.errors import QueueUnavailable
from tidegate.messages.outcomes import Outcomes, rollout_of
from tidegate.messages.queue import Depth
from tidegate.messages.registry import ModelEntry, ReplicaStats, RevisionReport

LISTED_SECONDS = 6.0  # after its last beat
Queue = tuple[str, str]
Journal = list[tuple[str, object]]


class FakeStore:
    """`journal` gets every write of a host; `dropped` says with which sentence queues went."""

    def __init__(self, now: Callable[[], float], journal: Journal | None = None) -> None:
        self._now = now
        self.journal: Journal = journal if journal is not None else []
        self.entries: dict[str, ModelEntry] = {}
        self.dropped: dict[Queue, str] = {}
        self.waiting: dict[Queue, int] = {}
        self.ended: dict[Queue, Outcomes] = {}
        self.is_away = False
        self.away = QueueUnavailable("Redis is away.")
        self._reports: dict[Queue, RevisionReport] = {}
        self._beats: dict[str, tuple[float, ReplicaStats]] = {}

    # What hosts ask --------------------------------------------------------------------------------

    async def reports(self, wanted: Collection[Queue]) -> dict[Queue, RevisionReport]:
        self._answer()
        return {queue: report for queue, report in self._reports.items() if queue in wanted}

    async def replicas(self) -> list[ReplicaStats]:
        self._answer()
        alive = [stats for at, stats in self._beats.values() if self._now() < at + LISTED_SECONDS]
        return sorted(alive, key=lambda stats: stats.replica)

    async def read_models(self, wanted: Collection[str] | None = None) -> dict[str, ModelEntry]:
        self._answer()
        return {name: entry for name, entry in self.entries.items() if wanted is None or name in wanted}

    async def put_model(self, entry: ModelEntry) -> None:
        self._answer()
        self.journal.append(("put_model", entry))
        self.entries[entry.name] = entry

    async def delete_model(self, name: str) -> None:
        self._answer()
        self.journal.append(("delete_model", name))
        entry = self.entries.pop(name, None)
        revisions = {revision for model, revision in self._reports if model == name}
        for revision in revisions | set(entry.revisions if entry is not None else ()):
            self._drop((name, revision), f"The model {name!r} was removed.")

    async def drop_revision(self, model: str, revision: str, message: str) -> None:
        self._answer()
        self.journal.append(("drop_revision", (model, revision)))
        self._drop((model, revision), message)

    async def move_revision(
        self, model: str, from_revision: str, to_revision: str, may_continue: bool
    ) -> int:
        self._answer()
        self.journal.append(("move_revision", (model, from_revision, to_revision)))
        moved = self.waiting.pop((model, from_revision), 0)
        self.waiting[model, to_revision] = self.waiting.get((model, to_revision), 0) + moved
        return 0

    @property
    def outcomes(self) -> FakeStore:
        return self

    async def read(self, queues: Sequence[Queue]) -> Mapping[Queue, Outcomes]:
        self._answer()
        return {queue: self.ended.get(queue, {}) for queue in queues}

    async def forget(self, queues: Sequence[Queue], rollout: str) -> None:
        self._answer()
        for queue in queues:
            kept = self.ended.get(queue, {})
            self.ended[queue] = {
                cohort: tally for cohort, tally in kept.items() if not "" < rollout_of(cohort) <= rollout
            }

    async def poll(self, queues: Sequence[Queue], *, timeout_seconds: float) -> Mapping[Queue, Depth]:
        self._answer()
        return {queue: Depth(self.waiting.get(queue, 0), 0, 0.0) for queue in queues}

    # What replicas say -----------------------------------------------------------------------------

    async def report(self, report: RevisionReport) -> None:
        self._reports[(report.model, report.revision)] = report

    async def beat(self, stats: ReplicaStats, metrics: bytes = b"") -> None:
        self._beats[stats.replica] = (self._now(), stats)

    async def gone(self, stats: ReplicaStats) -> None:
        self._beats.pop(stats.replica, None)

    def _drop(self, queue: Queue, message: str) -> None:
        self._reports.pop(queue, None)
        self.waiting.pop(queue, None)
        self.dropped[queue] = message

    def _answer(self) -> None:
        if self.is_away:
            raise self.away

"""Both hosts of the control loop in one fake world: the laptop's loop and the operator's reconciler.

A rig has what a test acts on (resources, queues, Serve's faults) and looks at (entries of the registry, what
Serve holds, the journal of all writes). Its clock goes on by a second with each round.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from tests.contract.hosts.fake_api_server import FakeApiServer
from tests.contract.hosts.fake_serve import FakeServe, Faults
from tests.contract.hosts.fake_store import FakeStore, Journal
from tests.control_api import MemoryAudit
from tests.unit.control.builders import NOW, REPLICAS, document
from tidegate.control.bounded_yaml import dump
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.looks import Question
from tidegate.control.observed import Capacity, SourceState
from tidegate.control.source_answer import read_answer
from tidegate.control_api.ports import Host
from tidegate.errors import QueueUnavailable
from tidegate.local.api_port import LaptopHost
from tidegate.local.asked import Asked
from tidegate.local.control_loop import ControlLoop
from tidegate.local.history_folder import HistoryFolder
from tidegate.local.record_file import RecordFile
from tidegate.local.watch import ResourceFiles
from tidegate.messages.registry import Condition, ModelEntry
from tidegate.sources.facts import DecoderShape, Resolved
from tidegate_operator.api_port import ClusterHost
from tidegate_operator.apply import Applier
from tidegate_operator.cache import Cache
from tidegate_operator.cluster import ApiConflict, Object
from tidegate_operator.gather import Gatherer, Troubles
from tidegate_operator.kinds import WATCHED, Kind
from tidegate_operator.objects import ResourceReader
from tidegate_operator.pod_template import RayDefaults
from tidegate_operator.reconcile import Reconciler
from tidegate_operator.revision_objects import read_history
from tidegate_operator.serves import Serves

DEFAULTS = RayDefaults(image="ray:1", ray_version="2.60.0")
KEY = ("default", "default")
MOST_CONFLICTS = 5  # of one test


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Rig(Protocol):
    """One host and its world."""

    clock: Clock
    store: FakeStore
    faults: Faults
    journal: Journal
    audit: MemoryAudit
    outage: str  # what the last round said of Redis being away
    contents: dict[str, str]  # the digest of what each source holds

    @property
    def serve(self) -> FakeServe:
        """The Serve that replicas run in now."""

    @property
    def host(self) -> Host:
        """The host behind the control API."""

    def model(self, name: str, **spec: Any) -> None:
        """Declare a model, or change it."""

    def remove(self, name: str) -> None: ...

    def start(self) -> None:
        """Start the host, or start it anew with nothing but what is stored."""

    async def round(self) -> None: ...

    def history(self, name: str) -> list[RevisionRecord]:
        """The stored history of a model, the newest revision last."""


class LaptopRig:
    """Resource files and a file of records in a folder; one Serve."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.journal: Journal = []
        self.store = FakeStore(self.clock, self.journal)
        self.faults = Faults()
        self.serve = FakeServe(
            self.store, self.faults, self.clock, journal=self.journal, queues=self.store.waiting
        )
        self.outage = ""
        self.audit = MemoryAudit()
        self.contents: dict[str, str] = {}
        self.changed = asyncio.Event()
        self.published = asyncio.Event()  # set with the first entry that gateways read
        self._folder = folder / "models"
        self._folder.mkdir()
        self._records = folder / "control.json"
        self._files = ResourceFiles([self._folder], lambda: None)
        self._files.load()
        self._asked = folder / "asked.json"
        self.start()

    @property
    def host(self) -> LaptopHost:
        return LaptopHost(self.loop, self.asked, self.store, self.store, self.changed.set, self.clock)

    def model(self, name: str, **spec: Any) -> None:
        (self._folder / f"{name}.yaml").write_text(dump(document(name, **spec)), encoding="utf-8")
        self._files.load()

    def remove(self, name: str) -> None:
        (self._folder / f"{name}.yaml").unlink()
        self._files.load()

    def start(self) -> None:
        self.asked = Asked(self._files, self._asked)
        self.loop = ControlLoop(
            self.asked,
            self.store,
            self.store,
            FakeSources(self.contents),
            JournaledRecords(self._records, self.journal),
            HistoryFolder(self._records.parent / "revisions"),
            REPLICAS,
            Capacity(4, 4),
            self.changed,
            self.audit,
            wave=4,
            on_entries=lambda entries: self.published.set(),
            now=self.clock,
        )
        self.loop.use(self.serve)

    async def round(self) -> None:
        self.clock.now += 1
        await self.serve.beat()
        self.outage = ""
        try:
            await self.loop.round()
        except QueueUnavailable as error:
            self.outage = error.message

    def history(self, name: str) -> list[RevisionRecord]:
        return list(HistoryFolder(self._records.parent / "revisions").read().get(name, ()))


class JournaledRecords(RecordFile):
    def __init__(self, path: Path, journal: Journal) -> None:
        super().__init__(path)
        self._file = path
        self._journal = journal

    def write(self, records: Mapping[str, ModelRecord]) -> None:
        before = self._inode()
        super().write(records)
        if self._inode() != before:
            self._journal.append(("records", dict(records)))

    def _inode(self) -> int:
        """Another one after each write, which replaces the file."""
        return self._file.stat().st_ino if self._file.exists() else 0


class FakeSources:
    """Looks at `contents` (`Rig.contents`), each time anew."""

    def __init__(self, contents: Mapping[str, str]) -> None:
        self._contents = contents
        self._states: dict[str, SourceState] = {}

    def begin(self, question: Question) -> None:
        answer = answer_about(self._contents, question.arguments)
        self._states[question.identity] = read_answer(answer) or SourceState("failed")

    def states(self) -> Mapping[str, SourceState]:
        return dict(self._states)

    def keep(self, asked: Collection[str]) -> None:
        self._states = {name: state for name, state in self._states.items() if name in asked}


def answer_about(contents: Mapping[str, str], arguments: Sequence[str]) -> str:
    """What `python -m tidegate.sources resolve` says of a source with these contents."""
    uri, *pins = arguments
    wanted = dict(zip(pins[::2], pins[1::2], strict=True)).get("--digest")
    digest = contents[uri]
    if wanted not in (None, digest):
        return json.dumps({"error": {"reason": "SourceChanged", "message": f"{uri} holds {digest}."}})
    found = Resolved(uri, "none", "float32", 7, digest=digest, shape=DecoderShape(2, 1, 8, 16, 9, 64))
    return msgspec.json.encode(found).decode()


class OperatorRig:
    """Objects in an API server, with a KubeRay that makes each RayCluster's head ready; a Serve for each."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.journal: Journal = []
        self.store = FakeStore(self.clock, self.journal)
        self.faults = Faults()
        self.serves: dict[str, FakeServe] = {}
        self.api = FakeApiServer(self.clock, self.journal)
        self.outage = ""
        self.audit = MemoryAudit()
        self.contents: dict[str, str] = {}
        self.conflicts = 0
        self._made = 0
        self.declare("Pool", "default", {})
        self.start()

    @property
    def serve(self) -> FakeServe:
        pool = self.api.get("Pool", "default")
        assert pool is not None
        name = pool["status"].get("rayCluster") or next(iter(self.serves), "none-yet")
        return self._connect(name)

    @property
    def host(self) -> ClusterHost:
        return ClusterHost(
            self.api,
            self.store,
            self.store,
            self._serves,
            REPLICAS,
            "redis://queue",
            DEFAULTS,
            ["default"],
            self.clock,
        )

    def model(self, name: str, **spec: Any) -> None:
        self.declare("Model", name, {"engine": {"name": "simulated"}, **spec})

    def remove(self, name: str) -> None:
        self.delete("Model", name)

    def declare(self, kind: Kind, name: str, spec: Mapping[str, Any]) -> None:
        """As a person does: none of it is in the journal."""
        manifest = {
            "apiVersion": "tidegate.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": "default"},
            "spec": dict(spec),
        }
        self.api.put(kind, manifest)

    def delete(self, kind: Kind, name: str) -> None:
        self.api.remove(kind, name)

    def start(self) -> None:
        self.cache = Cache()
        self.api.changed = self._watch
        for kind, body in self.api.everything():
            self._watch(kind, "MODIFIED", body)
        self._serves = Serves(
            lambda service, namespace, cluster: cluster, self.api, lambda url, token: self._connect(url)
        )
        gatherer = Gatherer(
            self.cache,
            ResourceReader(self.cache),
            self.store,
            self.store,
            self._serves,
            Troubles(self.api),
            REPLICAS,
            "redis://queue",
            DEFAULTS,
        )
        applier = Applier(
            self.api,
            self.cache,
            self.store,
            self._serves,
            "operator-0",
            "default",
            self.audit,
            self.clock,
            self.clock,
        )
        self.reconciler = Reconciler(gatherer, applier, self.clock)

    async def round(self) -> None:
        """One reconcile; after a conflict another, as the queue has it."""
        self.clock.now += 1
        self._kuberay()
        self._run_jobs()
        for serve in self.serves.values():
            await serve.beat()
        while True:
            try:
                await self.reconciler.reconcile(KEY)
            except ApiConflict:
                self.conflicts += 1
                assert self.conflicts < MOST_CONFLICTS
            else:
                break
        self.outage = self.condition("Pool", "default", "Ready").message if self.store.is_away else ""

    def history(self, name: str) -> list[RevisionRecord]:
        owner = self.api.get("Model", name)
        assert owner is not None
        found = [body for kind, body in self.api.everything() if kind == "ControllerRevision"]
        assert all(body["metadata"]["name"] == f"{name}-{body['data']['revision']}" for body in found)
        return list(read_history(found))

    def condition(self, kind: Kind, name: str, wanted: str) -> Condition:
        body = self.api.get(kind, name)
        assert body is not None, name
        found = next(item for item in body["status"]["conditions"] if item["type"] == wanted)
        return Condition(wanted, found["status"], found["reason"], found["message"])

    def _connect(self, cluster: str) -> FakeServe:
        if cluster not in self.serves:
            self.serves[cluster] = FakeServe(
                self.store, self.faults, self.clock, cluster, journal=self.journal, queues=self.store.waiting
            )
        return self.serves[cluster]

    def _watch(self, kind: Kind, verb: str, body: Object) -> None:
        if kind not in WATCHED:
            return
        if verb == "DELETED":
            self.cache.drop(kind, body)
        else:
            self.cache.put(kind, body)

    def _run_jobs(self) -> None:
        """Each Job has a pod that has looked, with its answer in the termination message; where a test says
        what sources hold."""
        if not self.contents:
            return
        for kind, body in list(self.api.everything()):
            name = body["metadata"]["name"]
            if kind != "Job" or self.api.get("Pod", f"{name}-pod") is not None:
                continue
            (container,) = body["spec"]["template"]["spec"]["containers"]
            message = answer_about(self.contents, container["command"][4:])
            ended = {"name": container["name"], "state": {"terminated": {"message": message}}}
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{name}-pod",
                    "namespace": "default",
                    "labels": {"job-name": name},
                    "ownerReferences": [{"uid": body["metadata"]["uid"]}],
                },
                "spec": {},
                "status": {"phase": "Succeeded", "containerStatuses": [ended]},
            }
            self.api.put("Pod", pod)

    def _kuberay(self) -> None:
        """Each RayCluster has a head that is ready; its pods go with it."""
        for kind, body in list(self.api.everything()):
            name = body["metadata"]["name"]
            if kind != "RayCluster" or self.api.get("Pod", f"{name}-head") is not None:
                continue
            labels = {"ray.io/cluster": name, "ray.io/node-type": "head"}
            owner = {"uid": body["metadata"]["uid"]}
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{name}-head",
                    "namespace": "default",
                    "labels": labels,
                    "ownerReferences": [owner],
                },
                "spec": {},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
            }
            self.api.put("Pod", pod)
            self.api.put("RayCluster", {**body, "status": {"state": "ready"}})


async def rounds(rig: Rig, count: int) -> None:
    for _ in range(count):
        await rig.round()


def entry(rig: Rig, name: str) -> ModelEntry:
    return rig.store.entries[name]


def condition(rig: Rig, name: str, wanted: str) -> Condition:
    """A condition as gateways and the CLI read it."""
    return next(item for item in entry(rig, name).conditions if item.type == wanted)

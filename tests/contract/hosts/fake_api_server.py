"""The Kubernetes API server in memory, behind what the operator asks of `tidegate_operator.cluster.Cluster`.

`api_server_contract.py` holds it to the real one. It knows what the operator relies on: versions and
conflicts, generations, the status apart from the rest, finalizers, what goes with its owner. It validates
nothing and runs no controller.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.contract.hosts.fake_store import Journal
from tidegate_operator.cluster import FIELD_MANAGER, ApiConflict, ApiError, ApiGone, Object
from tidegate_operator.kinds import OURS, Kind

Objects = list[Object]
Changed = Callable[[Kind, str, Object], None]  # (kind, "MODIFIED" or "DELETED", object)


class FakeApiServer:
    """`changed` is told every change, as a watch is; `journal` gets every write that was taken. `refused`
    says, by kind, why none of it is made."""

    def __init__(self, now: Callable[[], float], journal: Journal | None = None) -> None:
        self._now = now
        self._objects: dict[tuple[Kind, str, str], Object] = {}
        self._version = 0
        self.journal: Journal = journal if journal is not None else []
        self.managers: list[str] = []  # who patched
        self.counted: list[tuple[str, str]] = []  # every such write as (kind, verb)
        self.changed: Changed = lambda *_: None
        self.refused: dict[Kind, ApiError] = {}

    async def list(
        self, kind: Kind, namespace: str, selector: str = "", *, field_selector: str = ""
    ) -> tuple[list[Object], int]:
        assert selector in ("", OURS), "no other is needed so far"
        return [copy.deepcopy(item) for item in self._of(kind, namespace)], self._version

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        return copy.deepcopy(self._standing(kind, body))

    async def apply(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        meta = manifest["metadata"]
        past = self._objects.get((kind, meta["namespace"], meta["name"]))
        if past is None:
            return self._write("apply", kind, self._fresh(kind, manifest))
        if kind == "ControllerRevision" and past["data"] != manifest["data"]:
            raise ApiError("data: Invalid value: field is immutable")
        new = {**past, **manifest, "metadata": {**past["metadata"], **meta}, "status": past.get("status", {})}
        return self._write("apply", kind, new)

    async def apply_status(self, kind: Kind, body: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        past = self._of_version(kind, body)
        return self._write("status", kind, {**past, "status": dict(status)})

    async def set_finalizers(self, kind: Kind, body: Mapping[str, Any], finalizers: Sequence[str]) -> Object:
        past = self._of_version(kind, body)
        new = {**past, "metadata": {**past["metadata"], "finalizers": list(finalizers)}}
        return self._write("finalizers", kind, new)

    async def annotate(
        self, kind: Kind, body: Mapping[str, Any], annotations: Mapping[str, str | None], manager: str
    ) -> Object:
        past = self._standing(kind, body)
        if past["metadata"]["uid"] != body["metadata"]["uid"]:
            raise ApiConflict(f"{kind} {body['metadata']['name']} is another")
        merged = {**(past["metadata"].get("annotations") or {}), **annotations}
        kept = {name: value for name, value in merged.items() if value is not None}
        self.managers.append(manager)
        return self._write("annotate", kind, {**past, "metadata": {**past["metadata"], "annotations": kept}})

    async def patch(
        self,
        kind: Kind,
        body: Mapping[str, Any],
        operations: Sequence[Mapping[str, Any]],
        manager: str = FIELD_MANAGER,
    ) -> Object:
        self.managers.append(manager)
        new = copy.deepcopy(self._standing(kind, body))
        if new["metadata"]["uid"] != body["metadata"]["uid"]:
            raise ApiConflict(f"{kind} {body['metadata']['name']} is another")
        for operation in operations:
            *path, last = (part.replace("~1", "/") for part in operation["path"].strip("/").split("/"))
            part: Any = new
            for key in path:
                part = part[int(key)] if isinstance(part, list) else part.get(key) or {}
            if operation["op"] == "test":
                if part.get(last) != operation["value"]:
                    raise ApiConflict(f"{operation} does not hold")
            elif operation["op"] == "remove":
                del part[last]
            else:
                part[last] = operation["value"]
        return self._write("patch", kind, new)

    async def create(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        meta = dict(manifest["metadata"])
        if "generateName" in meta:
            meta["name"] = f"{meta['generateName']}{self._version}"
        if (kind, meta["namespace"], meta["name"]) in self._objects:
            raise ApiConflict(f"{kind} {meta['name']} exists")
        return self._write("create", kind, self._fresh(kind, {**manifest, "metadata": meta}))

    async def delete(self, kind: Kind, body: Mapping[str, Any]) -> None:
        meta = body["metadata"]
        past = self._objects.get((kind, meta["namespace"], meta["name"]))
        if past is None or ("uid" in meta and past["metadata"]["uid"] != meta["uid"]):
            return
        stamped = {**past["metadata"], "deletionTimestamp": self._stamp()}
        self._write("delete", kind, {**past, "metadata": stamped})

    def put(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        """Make an object what somebody else says, its status included."""
        meta = manifest["metadata"]
        past = self._objects.get((kind, meta["namespace"], meta["name"])) or self._fresh(kind, manifest)
        kept = {"status": past["status"], **manifest, "metadata": {**past["metadata"], **meta}}
        return self._write("", kind, kept)

    def remove(self, kind: Kind, name: str, namespace: str = "default") -> None:
        """Delete an object, as somebody else."""
        past = self._objects[(kind, namespace, name)]
        self._write("", kind, {**past, "metadata": {**past["metadata"], "deletionTimestamp": self._stamp()}})

    def get(self, kind: Kind, name: str, namespace: str = "default") -> Object | None:
        return copy.deepcopy(self._objects.get((kind, namespace, name)))

    def everything(self) -> Iterator[tuple[Kind, Object]]:
        for (kind, _, _), item in self._objects.items():
            yield kind, copy.deepcopy(item)

    def _of(self, kind: Kind, namespace: str) -> Objects:
        return [
            item for (other, where, _), item in self._objects.items() if (other, where) == (kind, namespace)
        ]

    def _standing(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        meta = body["metadata"]
        past = self._objects.get((kind, meta["namespace"], meta["name"]))
        if past is None:
            raise ApiGone(f"{kind} {meta['name']}")
        return past

    def _of_version(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        past = self._standing(kind, body)
        if past["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise ApiConflict(f"{kind} {body['metadata']['name']} has changed")
        return past

    def _fresh(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        if kind in self.refused:
            raise self.refused[kind]
        meta = {
            **manifest["metadata"],
            "uid": f"uid-{self._version + 1}",
            "creationTimestamp": self._stamp(),
        }
        return {**manifest, "kind": kind, "metadata": meta, "status": {}}

    def _write(self, verb: str, kind: Kind, new: Object) -> Object:
        """Store a version, where it is another. `verb` is empty where no client asks for it."""
        new = copy.deepcopy(new)
        meta = new["metadata"]
        key = (kind, meta["namespace"], meta["name"])
        if verb:
            self.journal.append((f"{kind} {verb}", meta["name"]))
            self.counted.append((kind, verb))
        past = self._objects.get(key)
        if past == new:
            return copy.deepcopy(new)
        self._version += 1
        meta["resourceVersion"] = str(self._version)
        is_another = past is None or past.get("spec") != new.get("spec")
        meta["generation"] = (meta.get("generation") or 0) + is_another
        if meta.get("deletionTimestamp") and not meta.get("finalizers"):
            self._objects.pop(key, None)
            self.changed(kind, "DELETED", copy.deepcopy(new))
            self._collect(meta["uid"])
        else:
            self._objects[key] = new
            self.changed(kind, "MODIFIED", copy.deepcopy(new))
        return copy.deepcopy(new)

    def _collect(self, owner: str) -> None:
        """What is owned goes with its owner."""
        for (kind, _, _), item in list(self._objects.items()):
            owners = item["metadata"].get("ownerReferences") or ()
            if any(reference["uid"] == owner for reference in owners):
                stamped = {**item["metadata"], "deletionTimestamp": self._stamp()}
                self._write("", kind, {**item, "metadata": stamped})

    def _stamp(self) -> str:
        return datetime.datetime.fromtimestamp(self._now(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

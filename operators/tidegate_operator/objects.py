"""Models and Pools as the operator reads them: valid, refused, or of a name that another has. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.packing import Refusal
from tidegate.control.reasons import Reason
from tidegate.control.resource_files import parse_resource
from tidegate.control.resources import API_VERSION, STORED, Model, ModelSpec, Pool
from tidegate_operator.cache import Body, Cache, is_deleting, labels, pool_of
from tidegate_operator.pod_template import MODEL_LABEL
from tidegate_operator.revision_objects import owned_by, read_history
from tidegate_operator.status_patch import record_of

Versions = tuple[tuple[str, str], ...]  # (uid, resource version) of each object


@dataclass(frozen=True, slots=True)
class ModelObject:
    """One Model. `model` is what should run: its spec, or the last valid one where that is refused; None:
    nothing of it may run. `refusal` says why its spec is not what runs. `revisions` are the objects of its
    `history`, which is read from them (the newest last)."""

    body: Body
    model: Model | None
    record: ModelRecord | None
    refusal: Refusal | None = None
    revisions: Sequence[Body] = ()
    history: Sequence[RevisionRecord] = ()

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def is_deleting(self) -> bool:
        return is_deleting(self.body)

    @property
    def generation(self) -> int:
        return int(self.body["metadata"].get("generation") or 0)

    @property
    def status(self) -> Mapping[str, object]:
        return self.body.get("status") or {}


class ResourceReader:
    """Reads resources from the cache: each spec once, and the record in a status once per version."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._parsed: dict[str, tuple[int, Model | Pool | str]] = {}
        self._records: dict[str, tuple[str, ModelRecord | None]] = {}  # (resource version, record), by uid
        self._histories: dict[str, tuple[Versions, tuple[RevisionRecord, ...]]] = {}  # by the Model's uid
        self._valid_pools: dict[str, Pool] = {}  # the last valid one, by uid

    def models(self, namespace: str, pool: str) -> list[ModelObject]:
        """Return the pool's Models, oldest first."""
        found = self._cache.of("Model", namespace, lambda body: pool_of(body) == pool)
        by_model: defaultdict[str, list[Body]] = defaultdict(list)
        for body in self._cache.of("ControllerRevision", namespace) if found else ():
            by_model[labels(body).get(MODEL_LABEL, "")].append(body)
        return [
            self._with_history(self._model(body), owned_by(body, by_model[body["metadata"]["name"]]))
            for body in found
        ]

    def pool(self, body: Body) -> tuple[Pool | None, str]:
        """Return the Pool as it should stand and, where its spec is refused, why. A refused one stays as it
        last was; None where that is not known."""
        uid = body["metadata"]["uid"]
        found = self._parse(body)
        if isinstance(found, Pool):
            self._valid_pools[uid] = found
            return found, ""
        return self._valid_pools.get(uid), str(found)

    def forget(self, uids: frozenset[str]) -> None:
        """Keep only these objects' readings."""
        self._parsed = {uid: found for uid, found in self._parsed.items() if uid in uids}
        self._records = {uid: found for uid, found in self._records.items() if uid in uids}
        self._histories = {uid: found for uid, found in self._histories.items() if uid in uids}
        self._valid_pools = {uid: pool for uid, pool in self._valid_pools.items() if uid in uids}

    def _model(self, body: Body) -> ModelObject:
        name = body["metadata"]["name"]
        oldest = self._cache.named("Model", name)[0]
        if oldest["metadata"]["uid"] != body["metadata"]["uid"]:
            return ModelObject(body, None, None, _name_taken(name, oldest))
        record = self._record(name, body)
        found = self._parse(body)
        if isinstance(found, Model):
            return ModelObject(body, found, record)
        return ModelObject(body, _last_valid(name, record), record, (Reason.InvalidConfig, str(found)))

    def _with_history(self, found: ModelObject, bodies: Sequence[Body]) -> ModelObject:
        uid = found.body["metadata"]["uid"]
        versions = tuple((body["metadata"]["uid"], body["metadata"]["resourceVersion"]) for body in bodies)
        known = self._histories.get(uid)
        if known is None or known[0] != versions:
            known = self._histories[uid] = (versions, read_history(bodies))
        return replace(found, revisions=bodies, history=known[1])

    def _record(self, name: str, body: Body) -> ModelRecord | None:
        meta = body["metadata"]
        known = self._records.get(meta["uid"])
        if known is None or known[0] != meta["resourceVersion"]:
            known = (meta["resourceVersion"], record_of(name, body.get("status") or {}))
            self._records[meta["uid"]] = known
        return known[1]

    def _parse(self, body: Body) -> Model | Pool | str:
        """Return the resource, or what is wrong with it."""
        meta = body["metadata"]
        generation = int(meta.get("generation") or 0)
        known = self._parsed.get(meta["uid"])
        if known is not None and known[0] == generation:
            return known[1]
        document = {
            "apiVersion": API_VERSION,
            "kind": body["kind"],
            "metadata": {"name": meta["name"]},
            **({"spec": body["spec"]} if "spec" in body else {}),
        }
        found = parse_resource(document, meta["namespace"])
        read = "; ".join(map(str, found)) if isinstance(found, list) else found
        self._parsed[meta["uid"]] = (generation, read)
        return read


def _name_taken(name: str, oldest: Body) -> Refusal:
    where = oldest["metadata"]["namespace"]
    return (
        Reason.NameTaken,
        f"metadata.name: {name!r}: an older Model of this name is in the namespace {where!r}, and gateways "
        "know one Model of each name; give this one another name.",
    )


def _last_valid(name: str, record: ModelRecord | None) -> Model | None:
    """Return what ran before the spec became invalid: the revision with the largest share of the traffic, or
    the one on its first way up."""
    if record is None or record.lead is None:
        return None
    try:
        spec = ModelSpec.model_validate(record.lead.spec, context=STORED)
    except ValidationError:  # of an operator whose schema was another
        return None
    return Model.model_validate(
        {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": name}, "spec": spec}
    )

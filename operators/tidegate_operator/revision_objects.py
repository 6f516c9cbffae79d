"""A Model's history in a cluster: one ControllerRevision for each revision, owned by the Model. Pure.

The API server keeps the data of one as it was first written. A proof comes later and is an annotation; where
other data has changed after all, as of a record of the version before, the object goes and is made anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from tidegate.control.desired import RevisionRecord
from tidegate.messages.registry import RevisionReport
from tidegate_operator.cache import Body, pool_of
from tidegate_operator.pod_template import MODEL_LABEL, POOL_LABEL, common_labels
from tidegate_operator.ray_state import owned
from tidegate_operator.status_patch import from_wire, to_wire

PROOF = "tidegate.dev/proof"


def controller_revision(model: Body, kept: RevisionRecord) -> dict[str, Any]:
    """Return the whole manifest."""
    meta = model["metadata"]
    proof = {PROOF: msgspec.json.encode(kept.proof).decode()} if kept.proof is not None else {}
    manifest = {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": object_name(model, kept),
            "namespace": meta["namespace"],
            "labels": {
                **common_labels("history"),
                MODEL_LABEL: meta["name"],
                POOL_LABEL: pool_of(model),
            },
            "annotations": proof,
        },
        "revision": kept.number,
        "data": to_wire(replace(kept, proof=None)),
    }
    return owned(manifest, model)


def read_revision(body: Body) -> RevisionRecord | None:
    """Return the entry of the history; None where it cannot be read."""
    proof = (body["metadata"].get("annotations") or {}).get(PROOF)
    try:
        kept = msgspec.convert(from_wire(body.get("data") or {}), RevisionRecord)
        return replace(kept, proof=msgspec.json.decode(proof, type=RevisionReport) if proof else None)
    except msgspec.MsgspecError:
        return None


def owned_by(model: Body, bodies: Iterable[Body]) -> list[Body]:
    uid = model["metadata"]["uid"]
    return [
        body
        for body in bodies
        if any(owner["uid"] == uid for owner in body["metadata"].get("ownerReferences") or ())
    ]


def read_history(bodies: Sequence[Body]) -> tuple[RevisionRecord, ...]:
    """Return a Model's history, the newest last."""
    found = (read_revision(body) for body in bodies)
    return tuple(sorted((kept for kept in found if kept is not None), key=lambda kept: kept.number))


def history_writes(
    model: Body, bodies: Sequence[Body], stored: Sequence[RevisionRecord], history: Sequence[RevisionRecord]
) -> tuple[list[Mapping[str, Any]], list[Body]]:
    """Return the objects to write, and those to delete, so that `bodies`, of which `stored` was read, become
    this history. What has to go first is written in the next round."""
    standing = {body["metadata"]["name"]: body for body in bodies}
    read = {object_name(model, kept): kept for kept in stored}
    written: list[Mapping[str, Any]] = []
    for kept in history:
        name = object_name(model, kept)
        found = read.get(name)
        is_other = found is None or replace(found, proof=None) != replace(kept, proof=None)
        if name in standing and is_other:
            continue
        standing.pop(name, None)
        if found != kept:
            written.append(controller_revision(model, kept))
    return written, list(standing.values())


def object_name(model: Body, kept: RevisionRecord) -> str:
    return f"{model['metadata']['name']}-{kept.revision}"

"""What the operator relies on of the API server; the fake and the real one (tests/cluster) are held to it."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
from msgspec.structs import replace

from tidegate.control.desired import RevisionRecord
from tidegate.messages.registry import RevisionReport
from tidegate_operator import api_port, apply
from tidegate_operator.asked import annotations_of, removal
from tidegate_operator.cluster import ApiConflict, ApiError, ApiGone, Object
from tidegate_operator.revision_objects import controller_revision, read_revision

SPEC = {"engine": {"name": "simulated"}}


class Api(api_port.Writer, apply.Writer, Protocol):
    """The part of `tidegate_operator.cluster.Cluster` that the contract is about."""


class Calls:
    """A connection and the writes that it counted."""

    def __init__(self, cluster: Api, writes: list[tuple[str, str]]) -> None:
        self.cluster = cluster
        self.writes = writes

    async def model(self, name: str, **metadata: Any) -> Object:
        return await self.cluster.apply(
            "Model",
            {
                "apiVersion": "tidegate.dev/v1alpha1",
                "kind": "Model",
                "metadata": {"name": name, "namespace": "default", **metadata},
                "spec": SPEC,
            },
        )


class ApiServerContract:
    """`calls` is a fixture of whoever is held to it; it leaves no Model behind."""

    async def test_an_entry_of_a_history_stays_as_written_but_for_its_proof(self, calls: Calls) -> None:
        model = await calls.model("one")
        kept = RevisionRecord("r", SPEC, number=1, digest="d", cause="precision: auto → float16")
        first = await calls.cluster.apply("ControllerRevision", controller_revision(model, kept))
        again = await calls.cluster.apply("ControllerRevision", controller_revision(model, kept))
        assert read_revision(first) == kept
        assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        proved = replace(kept, proof=RevisionReport("one", "r", 1.0, True))
        written = await calls.cluster.apply("ControllerRevision", controller_revision(model, proved))
        assert read_revision(written) == proved
        with pytest.raises(ApiError):
            other = controller_revision(model, replace(kept, digest="another"))
            await calls.cluster.apply("ControllerRevision", other)
        await calls.cluster.delete("ControllerRevision", written)

    async def test_the_same_apply_twice_is_one_version(self, calls: Calls) -> None:
        first = await calls.model("one")
        second = await calls.model("one")
        assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
        assert calls.writes == [("Model", "apply"), ("Model", "apply")]

    async def test_a_status_is_replaced_whole_and_leaves_the_spec_alone(self, calls: Calls) -> None:
        body = await calls.model("one")
        await calls.cluster.apply_status("Model", body, {"waiting": 3, "accelerator": "a10"})
        with pytest.raises(ApiConflict):
            await calls.cluster.apply_status("Model", body, {"waiting": 4})
        ((newest,), _) = await calls.cluster.list("Model", "default")
        after = await calls.cluster.apply_status("Model", newest, {"waiting": 4})
        assert after["status"] == {"waiting": 4}
        assert after["metadata"]["generation"] == body["metadata"]["generation"]
        again = await calls.cluster.apply_status("Model", after, {"waiting": 4})
        assert again["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]

    async def test_the_status_of_a_deleted_object_does_not_land_on_its_successor(self, calls: Calls) -> None:
        body = await calls.model("one")
        await calls.cluster.delete("Model", body)
        with pytest.raises(ApiError):
            await calls.cluster.apply_status("Model", body, {"waiting": 3})
        await calls.model("one")
        with pytest.raises(ApiConflict):
            await calls.cluster.apply_status("Model", body, {"waiting": 3})

    async def test_finalizers_are_set_on_the_version_that_was_seen(self, calls: Calls) -> None:
        body = await calls.model("one")
        held = await calls.cluster.set_finalizers("Model", body, ["tidegate.dev/drain"])
        with pytest.raises(ApiConflict):
            await calls.cluster.set_finalizers("Model", body, [])
        await calls.cluster.delete("Model", held)
        ((waiting,), _) = await calls.cluster.list("Model", "default")
        assert "deletionTimestamp" in waiting["metadata"]
        gone = await calls.cluster.set_finalizers("Model", waiting, [])
        assert not gone["metadata"].get("finalizers")
        assert (await calls.cluster.list("Model", "default"))[0] == []
        with pytest.raises(ApiGone):
            await calls.cluster.set_finalizers("Model", waiting, [])

    async def test_a_json_patch_whose_test_fails_is_a_conflict(self, calls: Calls) -> None:
        body = await calls.model("one")
        replace = {"op": "add", "path": "/spec/contextLength", "value": 64}
        wrong = {"op": "test", "path": "/spec/device", "value": "cuda"}
        with pytest.raises(ApiConflict):
            await calls.cluster.patch("Model", body, [wrong, replace])
        patched = await calls.cluster.patch("Model", body, [replace])
        assert patched["spec"]["contextLength"] == 64
        assert calls.writes.count(("Model", "patch")) == 1

    async def test_a_patch_at_a_version_that_has_passed_is_a_conflict(self, calls: Calls) -> None:
        body = await calls.model("one")
        same = {
            "op": "test",
            "path": "/metadata/resourceVersion",
            "value": body["metadata"]["resourceVersion"],
        }
        spec = {"op": "replace", "path": "/spec", "value": {**body["spec"], "contextLength": 64}}
        patched = await calls.cluster.patch("Model", body, [same, spec], "key:anna")
        assert patched["spec"]["contextLength"] == 64
        with pytest.raises(ApiConflict):
            await calls.cluster.patch("Model", patched, [same, spec], "key:anna")

    async def test_annotations_are_set_at_any_version_and_taken_off_only_as_they_are(
        self, calls: Calls
    ) -> None:
        body = await calls.model("one")
        await calls.cluster.apply_status("Model", body, {"waiting": 3})
        asked = {"tidegate.dev/rollout": "pause", "tidegate.dev/rollout-author": "anna"}
        written = await calls.cluster.annotate("Model", body, asked, "key:anna")
        assert annotations_of(written) == asked
        off = removal(written)
        newer = await calls.cluster.annotate(
            "Model", body, {"tidegate.dev/rollout": "abort", "tidegate.dev/rollout-author": None}, "key:anna"
        )
        assert annotations_of(newer) == {"tidegate.dev/rollout": "abort"}
        with pytest.raises(ApiConflict):
            await calls.cluster.patch("Model", written, off)
        after = await calls.cluster.patch("Model", newer, removal(newer))
        assert not annotations_of(after)
        await calls.cluster.delete("Model", body)
        await calls.model("one")
        with pytest.raises(ApiConflict):
            await calls.cluster.annotate("Model", body, asked, "key:anna")

    async def test_deleting_what_is_gone_or_another_is_fine(self, calls: Calls) -> None:
        body = await calls.model("one")
        await calls.cluster.delete("Model", body)
        await calls.cluster.delete("Model", body)
        successor = await calls.model("one")
        await calls.cluster.delete("Model", body)
        ((standing,), _) = await calls.cluster.list("Model", "default")
        assert standing["metadata"]["uid"] == successor["metadata"]["uid"]

    async def test_an_event_is_taken(self, calls: Calls) -> None:
        body = await calls.model("one")
        event = await calls.cluster.create(
            "Event",
            {
                "apiVersion": "events.k8s.io/v1",
                "kind": "Event",
                "metadata": {"generateName": "one-", "namespace": "default"},
                "eventTime": "2026-01-01T00:00:00.000000Z",
                "reportingController": "tidegate.dev/operator",
                "reportingInstance": "test",
                "action": "ReadyFalse",
                "reason": "KubeRayMissing",
                "note": "It is missing.",
                "type": "Warning",
                "regarding": {
                    "apiVersion": body["apiVersion"],
                    "kind": "Model",
                    "name": "one",
                    "namespace": "default",
                },
            },
        )
        assert event["metadata"]["name"].startswith("one-")

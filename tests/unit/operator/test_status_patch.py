import json
from typing import Any

import msgspec

from tests.unit.control import stored_before
from tests.unit.operator.bodies import NOW
from tidegate.control.conditions import condition
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate.control.observed import PodProblem
from tidegate.control.packing import Placement
from tidegate.messages.registry import ModelEntry, RevisionReport
from tidegate.sources.facts import DecoderShape
from tidegate_operator import status_patch
from tidegate_operator.crd import MODEL_COLUMNS
from tidegate_operator.crd_status import revision_schema
from tidegate_operator.status_patch import (
    conditions_of,
    is_due,
    is_trouble,
    model_status,
    outage_status,
    pool_status,
    record_of,
    record_on_wire,
    refused_status,
    transitions,
    without_pool_status,
)

SPEC = {"engine": {"name": "simulated", "args": {"tokens_per_second": 5}}, "contextLength": 0}
REPORT = RevisionReport(
    "one", "aaaa", at=NOW + 0.123456, proved=True, notes=["a fallback"], kv_bytes_per_token=12, slots=4
)
FULL = RevisionRecord(
    revision="aaaa",
    spec=SPEC,
    checkpoint="/var/lib/tidegate/weights/x",
    weights_bytes=5_000_000_000,
    quantization="gptq",
    precision="float16",
    proof=REPORT,
    attempt_at=NOW,
    failures=2,
    retry_at=NOW + 60.5,
    reason="DeployFailed",
    message="It broke.",
    retired_at=NOW + 1,
    shape=DecoderShape(layers=2, kv_heads=1, head_dim=8, hidden=16, vocab=100, positions=512),
    placement=Placement("a10", 0.25, 6 << 30, 1 << 30),
)
RECORD = ModelRecord("one", int(NOW), {"aaaa": 100}, {"aaaa": FULL, "bbbb": RevisionRecord("bbbb", SPEC)})


def entry(**changes: Any) -> ModelEntry:
    conditions = [condition("Ready", "True", "Serving"), condition("ConfigValid", "True", "Valid")]
    plain = ModelEntry(
        "one", int(NOW), "generate", "simulated", "float32", "none", {"aaaa": 100}, True, True,
        "Serving", "", conditions=conditions,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def on_wire(status: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from the API server."""
    found: dict[str, Any] = json.loads(json.dumps(status))
    return found


def test_a_new_operator_remembers_everything() -> None:
    assert record_of("one", on_wire(record_on_wire(RECORD))) == RECORD


def test_what_is_at_its_default_takes_no_room() -> None:
    assert record_on_wire(RECORD)["revisions"][1] == {"revision": "bbbb", "spec": SPEC}


def test_the_definition_knows_every_field_that_is_remembered() -> None:
    def check(schema: dict[str, Any], value: Any) -> None:
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return
        if isinstance(value, dict):
            assert value.keys() <= schema["properties"].keys()
            for name, item in value.items():
                check(schema["properties"][name], item)

    check(revision_schema(), record_on_wire(RECORD)["revisions"][0])


def test_keys_of_a_spec_are_left_as_they_are() -> None:
    kept = record_of("one", on_wire(record_on_wire(RECORD)))
    assert kept is not None
    assert kept.revisions["aaaa"].spec["engine"]["args"] == {"tokens_per_second": 5}


def test_a_status_that_says_nothing_or_nonsense_is_no_memory() -> None:
    assert record_of("one", {}) is None
    assert record_of("one", {"created": 1, "revisions": [{"spec": {}}]}) is None


def test_what_the_version_before_remembers_is_read_and_replaced() -> None:
    statuses = stored_before.statuses()
    records = {name: record for name in statuses if (record := record_of(name, statuses[name])) is not None}
    stored_before.assert_nothing_is_lost(records, stored_before.GROUPS)
    for record in records.values():
        written = on_wire(record_on_wire(record))
        assert "serving" not in written
        assert record_of(record.name, written) == record


def test_a_record_without_traffic_takes_no_room_either() -> None:
    assert record_on_wire(ModelRecord("one", 1)) == {"created": 1, "revisions": []}


def test_several_revisions_share_the_status() -> None:
    record = ModelRecord(
        "one", int(NOW), {"bbbb": 15, "aaaa": 85}, {"aaaa": FULL, "bbbb": RevisionRecord("bbbb", SPEC)}
    )
    status = on_wire(model_status(entry(replicas_ready=3, replicas_wanted=4), record, 3, "default", 7))
    assert (status["revision"], status["accelerator"]) == ("aaaa,bbbb", "a10")
    assert status["weights"] == {"aaaa": 85, "bbbb": 15}
    assert record_of("one", status) == record


def test_the_same_look_gives_the_same_status() -> None:
    status = on_wire(model_status(entry(), RECORD, 3, "default", 7))
    again = model_status(entry(), record_of("one", status) or RECORD, 3, "default", 7)
    assert not is_due(status, again, 1e9)


def test_the_status_shows_placement_and_numbers_of_the_serving_revision() -> None:
    status = model_status(entry(replicas_ready=1, replicas_wanted=2), RECORD, 3, "default", 7)
    assert (status["revision"], status["accelerator"], status["gpuShare"]) == ("aaaa", "a10", 0.25)
    assert (status["replicas"], status["wantedReplicas"], status["replicaSummary"]) == (1, 2, "1/2")
    assert status["waiting"] == 7
    assert {item["observedGeneration"] for item in status["conditions"]} == {3}


def test_the_task_is_what_auto_turned_out_to_be() -> None:
    assert model_status(entry(task="embed"), RECORD, 3, "default", 7)["task"] == "embed"
    assert ("Task", "string", ".status.task", 0) in MODEL_COLUMNS


def test_the_format_is_the_quantization_or_else_the_number_format() -> None:
    told = entry(quantization="none", precision="bfloat16")
    assert model_status(told, RECORD, 3, "default", 7)["format"] == "bfloat16"
    told = entry(quantization="gptq", precision="bfloat16")
    assert model_status(told, RECORD, 3, "default", 7)["format"] == "gptq"


def test_depth_alone_is_written_only_now_and_then() -> None:
    past = model_status(entry(), RECORD, 3, "default", 7)
    deeper = {**past, "waiting": 8}
    assert not is_due(past, deeper, status_patch.RESTLESS_SECONDS - 0.1)
    assert is_due(past, deeper, status_patch.RESTLESS_SECONDS)
    assert is_due(past, {**deeper, "replicas": 3}, 0.0)


def test_a_field_that_goes_is_a_change() -> None:
    past = model_status(entry(), RECORD, 3, "default", 7)
    assert is_due(past, {key: value for key, value in past.items() if key != "accelerator"}, 0.0)


def test_a_refused_model_keeps_its_memory_and_says_what_is_wrong() -> None:
    past = on_wire(model_status(entry(), RECORD, 3, "default", 0))
    status = refused_status(past, 4, "InvalidConfig", "models: Model one spec.scaling: wrong", "default", NOW)
    found = {item.type: item for item in conditions_of(status)}
    assert found["ConfigValid"].status == "False"
    assert found["ConfigValid"].reason == "InvalidConfig"
    assert "spec.scaling" in found["Ready"].message
    assert record_of("one", status) == RECORD
    assert not is_due(
        status,
        refused_status(
            on_wire(status), 4, "InvalidConfig", "models: Model one spec.scaling: wrong", "default", NOW + 9
        ),
        1e9,
    )


def test_without_redis_a_model_is_not_ready_and_forgets_nothing() -> None:
    past = on_wire(model_status(entry(), RECORD, 3, "default", 0))
    status = outage_status(past, 3, "RedisUnreachable", "No Redis answers.", NOW)
    found = {item.type: (item.status, item.reason) for item in conditions_of(status)}
    assert found["Ready"] == ("False", "RedisUnreachable")
    assert found["Degraded"] == ("True", "RedisUnreachable")
    assert record_of("one", status) == RECORD
    assert status == outage_status(on_wire(status), 3, "RedisUnreachable", "No Redis answers.", NOW + 60)


def test_of_a_model_without_its_pool_nothing_runs_and_nothing_is_on_its_way() -> None:
    """Whatever was under way when the Pool went."""
    coming = entry(
        replicas_ready=1,
        replicas_wanted=2,
        conditions=[
            condition("Ready", "True", "Serving"),
            condition("Progressing", "True", "ClusterStarting"),
        ],
    )
    past = on_wire(model_status(coming, RECORD, 3, "default", 0))
    for before in ({}, past):
        status = without_pool_status(before, 1, "There is no Pool.", NOW)
        found = {item.type: (item.status, item.reason) for item in conditions_of(status)}
        assert found == {
            "Ready": ("False", "NoSuchPool"),
            "Scheduled": ("False", "NoSuchPool"),
            "Progressing": ("False", "NoSuchPool"),
            "Degraded": ("True", "NoSuchPool"),
        }
        assert (status["replicas"], status["replicaSummary"]) == (0, "0/0")
    assert record_of("one", status) == RECORD


def test_a_pool_tells_all_problems_of_its_pods_once() -> None:
    problems = [
        PodProblem("a", "ray", "ImagePullFailed", "Pod a: no image."),
        PodProblem("b", "", "Unschedulable", "Pod b: no node."),
        PodProblem("b", "", "Unschedulable", "Pod b: no node."),
    ]
    ready = condition("Ready", "False", "ClusterStarting")
    status = pool_status({}, 2, ready, problems, {"rayCluster": "", "workers": 0}, NOW)
    degraded = conditions_of(status)[1]
    assert (degraded.status, degraded.reason) == ("True", "ImagePullFailed")
    assert degraded.message == "Pod a: no image. Pod b: no node."
    assert "rayCluster" not in status
    assert status["workers"] == 0


def test_a_head_that_cannot_run_is_why_a_pool_is_not_ready() -> None:
    starting = condition("Ready", "False", "ClusterStarting")
    of_head = PodProblem("h", "ray-head", "OutOfMemory", "Pod h: too little.")
    of_worker = PodProblem("w", "ray-worker", "CrashLoop", "Pod w: it ends.", group="cpu")
    ready = conditions_of(pool_status({}, 1, starting, (of_worker, of_head), {}, NOW))[0]
    assert (ready.status, ready.reason, ready.message) == ("False", "OutOfMemory", "Pod h: too little.")
    assert conditions_of(pool_status({}, 1, starting, (of_worker,), {}, NOW))[0].reason == "ClusterStarting"
    serving = condition("Ready", "True", "ClusterReady")
    assert conditions_of(pool_status({}, 1, serving, (of_head,), {}, NOW))[0].reason == "ClusterReady"


def test_a_pool_that_only_starts_is_not_degraded_and_one_without_kuberay_is() -> None:
    starting = pool_status({}, 1, condition("Ready", "False", "ClusterStarting"), (), {}, NOW)
    missing = pool_status({}, 1, condition("Ready", "False", "KubeRayMissing"), (), {}, NOW)
    assert conditions_of(starting)[1].status == "False"
    assert conditions_of(missing)[1].reason == "KubeRayMissing"


def test_what_is_on_its_way_is_no_trouble() -> None:
    assert not is_trouble(condition("Ready", "False", "Loading"))
    assert not is_trouble(condition("Ready", "False", "Deleting"))
    assert is_trouble(condition("Ready", "False", "TooLittleGpuMemory"))
    assert is_trouble(condition("Degraded", "True", "CrashLoop"))


def test_events_tell_changes_and_not_that_all_begins_well() -> None:
    begin = model_status(entry(), RECORD, 1, "default", 0)
    assert [item.type for item in transitions({}, begin)] == ["Ready"]
    assert transitions(begin, begin) == []
    worse = outage_status(begin, 1, "RedisUnreachable", "away", NOW)
    assert {item.type: is_trouble(item) for item in transitions(begin, worse)} == {
        "Ready": True,
        "Degraded": True,
    }
    assert [is_trouble(item) for item in transitions(worse, begin) if item.type == "Ready"] == [False]

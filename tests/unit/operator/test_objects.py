import pytest

from tests.unit.control.builders import model
from tests.unit.operator.bodies import NOW, model_body, stamp
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate_operator.cache import Cache
from tidegate_operator.objects import ResourceReader
from tidegate_operator.status_patch import record_on_wire

BAD = {"engine": {"name": "simulated"}, "scaling": {"minReplicas": 3, "maxReplicas": 2}}


def reader(*bodies: dict[str, object]) -> ResourceReader:
    cache = Cache()
    for body in bodies:
        cache.put("Model", body)
    return ResourceReader(cache)


def test_a_models_own_metadata_in_a_cluster_is_no_problem() -> None:
    body = model_body(labels={"team": "x"}, annotations={"a": "b"}, finalizers=["tidegate.dev/drain"])
    (found,) = reader(body).models("models", "default")
    assert found.refusal is None
    assert found.model is not None
    assert found.model.spec.engine.name == "simulated"


def test_only_the_pools_own_models_are_read() -> None:
    other = model_body("two", spec={"engine": {"name": "simulated"}, "pool": "other"})
    assert [each.name for each in reader(model_body(), other).models("models", "other")] == ["two"]


@pytest.mark.parametrize("status", [{}, {"created": 1, "revisions": []}])
def test_an_invalid_model_that_never_ran_runs_nothing(status: dict[str, object]) -> None:
    (found,) = reader(model_body(spec=BAD, status=status)).models("models", "default")
    assert found.model is None
    assert found.refusal is not None
    reason, message = found.refusal
    assert reason == "InvalidConfig"
    assert "Model one" in message
    assert "spec.scaling" in message
    assert "minReplicas (3) is above maxReplicas (2)" in message


def test_what_ran_of_an_invalid_model_goes_on() -> None:
    spec = model("one", scaling={"maxReplicas": 4}).spec.model_dump(mode="json", by_alias=True)
    record = ModelRecord("one", 1, {"aaaa": 100}, {"aaaa": RevisionRecord("aaaa", spec)})
    (found,) = reader(model_body(spec=BAD, status=record_on_wire(record))).models("models", "default")
    assert found.refusal is not None
    assert found.model is not None
    assert found.model.spec.scaling.max_replicas == 4


def test_a_newer_status_is_read_anew() -> None:
    cache = Cache()
    cache.put("Model", model_body(status=record_on_wire(ModelRecord("one", 1))))
    again = ResourceReader(cache)
    (found,) = again.models("models", "default")
    assert found.record == ModelRecord("one", 1)
    newer = ModelRecord("one", 1, {"aaaa": 100}, {"aaaa": RevisionRecord("aaaa", {"pool": "default"})})
    cache.put("Model", model_body(status=record_on_wire(newer), resourceVersion="2"))
    (found,) = again.models("models", "default")
    assert found.record == newer


def test_of_two_models_of_one_name_the_older_has_it() -> None:
    older = model_body("one", "a", creationTimestamp=stamp(NOW - 50))
    younger = model_body("one", "b", creationTimestamp=stamp(NOW - 10))
    found = reader(younger, older)
    (first,) = found.models("a", "default")
    (second,) = found.models("b", "default")
    assert (first.refusal, second.model) == (None, None)
    assert second.refusal is not None
    assert second.refusal[0] == "NameTaken"
    assert "namespace 'a'" in second.refusal[1]


def test_a_changed_spec_is_read_again_and_an_unchanged_one_is_not() -> None:
    cache = Cache()
    found = ResourceReader(cache)
    cache.put("Model", model_body())
    (first,) = found.models("models", "default")
    cache.put("Model", model_body(resourceVersion="2", status={"waiting": 3}))
    (second,) = found.models("models", "default")
    assert second.model is first.model
    cache.put("Model", model_body(resourceVersion="3", generation=2, spec=BAD))
    (third,) = found.models("models", "default")
    assert third.refusal is not None


def test_a_pool_that_becomes_invalid_stays_as_it_was() -> None:
    body = {**model_body("default"), "kind": "Pool", "spec": {"maxLiveRevisions": 7}}
    found = reader()
    pool, refusal = found.pool(body)
    assert pool is not None
    assert refusal == ""
    broken = {**body, "metadata": {**body["metadata"], "generation": 2}, "spec": {"maxLiveRevisions": 0}}
    kept, why = found.pool(broken)
    assert kept is pool
    assert "spec.maxLiveRevisions" in why
    assert reader().pool(broken)[0] is None

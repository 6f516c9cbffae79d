import pytest

from tests.unit.control.builders import model
from tests.unit.operator.objects import NOW, model_body, stamp
from tidegate.control.desired import ModelRecord, RevisionRecord
from tidegate_operator.cache import Cache
from tidegate_operator.status_patch import record_on_wire
from tidegate_operator.subjects import Reader

BAD = {"engine": {"name": "simulated"}, "scaling": {"minReplicas": 3, "maxReplicas": 2}}


def reader(*bodies: dict[str, object]) -> Reader:
    cache = Cache()
    for body in bodies:
        cache.put("Model", body)
    return Reader(cache)


def test_a_models_own_metadata_in_a_cluster_is_no_problem() -> None:
    body = model_body(labels={"team": "x"}, annotations={"a": "b"}, finalizers=["tidegate.dev/drain"])
    (subject,) = reader(body).subjects("models", "default")
    assert subject.refusal is None
    assert subject.model is not None
    assert subject.model.spec.engine.name == "simulated"


def test_only_the_pools_own_models_are_read() -> None:
    other = model_body("two", spec={"engine": {"name": "simulated"}, "pool": "other"})
    assert [each.name for each in reader(model_body(), other).subjects("models", "other")] == ["two"]


@pytest.mark.parametrize("status", [{}, {"created": 1, "revisions": []}])
def test_an_invalid_model_that_never_ran_runs_nothing(status: dict[str, object]) -> None:
    (subject,) = reader(model_body(spec=BAD, status=status)).subjects("models", "default")
    assert subject.model is None
    assert subject.refusal is not None
    reason, message = subject.refusal
    assert reason == "InvalidConfig"
    assert "Model one" in message
    assert "spec.scaling" in message
    assert "minReplicas (3) is above maxReplicas (2)" in message


def test_what_ran_of_an_invalid_model_goes_on() -> None:
    spec = model("one", scaling={"maxReplicas": 4}).spec.model_dump(mode="json", by_alias=True)
    record = ModelRecord("one", 1, {"aaaa": 100}, {"aaaa": RevisionRecord("aaaa", spec)})
    (subject,) = reader(model_body(spec=BAD, status=record_on_wire(record))).subjects("models", "default")
    assert subject.refusal is not None
    assert subject.model is not None
    assert subject.model.spec.scaling.max_replicas == 4


def test_a_newer_status_is_read_anew() -> None:
    cache = Cache()
    cache.put("Model", model_body(status=record_on_wire(ModelRecord("one", 1))))
    again = Reader(cache)
    (subject,) = again.subjects("models", "default")
    assert subject.record == ModelRecord("one", 1)
    newer = ModelRecord("one", 1, {"aaaa": 100}, {"aaaa": RevisionRecord("aaaa", {"pool": "default"})})
    cache.put("Model", model_body(status=record_on_wire(newer), resourceVersion="2"))
    (subject,) = again.subjects("models", "default")
    assert subject.record == newer


def test_of_two_models_of_one_name_the_older_has_it() -> None:
    older = model_body("one", "a", creationTimestamp=stamp(NOW - 50))
    younger = model_body("one", "b", creationTimestamp=stamp(NOW - 10))
    found = reader(younger, older)
    (first,) = found.subjects("a", "default")
    (second,) = found.subjects("b", "default")
    assert (first.refusal, second.model) == (None, None)
    assert second.refusal is not None
    assert second.refusal[0] == "NameTaken"
    assert "namespace 'a'" in second.refusal[1]


def test_a_changed_spec_is_read_again_and_an_unchanged_one_is_not() -> None:
    cache = Cache()
    found = Reader(cache)
    cache.put("Model", model_body())
    (first,) = found.subjects("models", "default")
    cache.put("Model", model_body(resourceVersion="2", status={"waiting": 3}))
    (second,) = found.subjects("models", "default")
    assert second.model is first.model
    cache.put("Model", model_body(resourceVersion="3", generation=2, spec=BAD))
    (third,) = found.subjects("models", "default")
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

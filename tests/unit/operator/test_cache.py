from typing import Any

from tidegate_operator.cache import Cache, author_of, slim


def body(name: str = "m", version: int = 1, uid: str = "u1", **meta: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "one", "uid": uid, "resourceVersion": str(version), **meta}
    }


def test_an_older_version_never_replaces_a_newer_one() -> None:
    cache = Cache()
    assert cache.put("Model", body(version=5))
    assert not cache.put("Model", body(version=4))
    assert not cache.put("Model", body(version=5))
    assert cache.put("Model", body(version=6))


def test_versions_are_compared_as_numbers() -> None:
    cache = Cache()
    cache.put("Model", body(version=9))
    assert cache.put("Model", body(version=10))


def test_a_new_object_of_the_same_name_counts_whatever_its_version() -> None:
    cache = Cache()
    cache.put("Model", body(version=9))
    assert cache.put("Model", body(version=3, uid="u2"))
    assert not cache.drop("Model", body(version=10))  # the end of the first one, told late
    assert cache.get("Model", "one", "m") == body(version=3, uid="u2")
    assert cache.drop("Model", body(version=4, uid="u2"))
    assert cache.get("Model", "one", "m") is None


def test_a_listing_forgets_what_it_lacks_but_not_what_is_newer_than_it() -> None:
    cache = Cache()
    cache.put("Model", body("gone", 3))
    cache.put("Model", body("fresh", 12, uid="u2"))
    cache.put("Model", body("kept", 5, uid="u3"))
    cache.put("Model", body("other", 1, uid="u4", namespace="two"))
    changed = cache.replace("Model", "one", [body("kept", 7, uid="u3"), body("new", 8, uid="u5")], 10)
    assert sorted(item["metadata"]["name"] for item in changed) == ["gone", "kept", "new"]
    assert [item["metadata"]["name"] for item in cache.of("Model", "one")] == ["fresh", "kept", "new"]
    assert cache.get("Model", "two", "other") is not None


def test_the_same_listing_again_changes_nothing() -> None:
    cache = Cache()
    assert len(cache.replace("Model", "one", [body()], 10)) == 1
    assert cache.replace("Model", "one", [body()], 11) == []


def test_objects_of_one_name_come_oldest_first() -> None:
    cache = Cache()
    cache.put("Model", body(namespace="a", creationTimestamp="2026-01-02T00:00:00Z"))
    cache.put("Model", body(namespace="b", creationTimestamp="2026-01-01T00:00:00Z"))
    cache.put("Model", body(namespace="c", creationTimestamp="2026-01-01T00:00:00Z"))
    assert [item["metadata"]["namespace"] for item in cache.named("Model", "m")] == ["b", "c", "a"]
    assert len(cache.everywhere("Model")) == 3


def test_the_bookkeeping_of_field_managers_is_not_kept() -> None:
    assert "managedFields" not in slim(body(managedFields=[{}]))["metadata"]


def test_of_a_model_stays_who_changed_its_spec_last() -> None:
    def entry(manager: str, at: str, *fields: str) -> dict[str, object]:
        return {"manager": manager, "time": at, "fieldsV1": {f"f:{field}": {} for field in fields}}

    spec_of = [
        entry("argocd-controller", "2026-01-01T00:00:00Z", "spec", "metadata"),
        entry("key:ann", "2026-01-03T00:00:00Z", "spec"),
        entry("tidegate-operator", "2026-01-04T00:00:00Z", "status"),
    ]
    kept = slim({"kind": "Model", **body(managedFields=spec_of)})
    assert kept["metadata"]["managedFields"] == [{"manager": "key:ann"}]
    assert (author_of(kept), author_of(slim(body()))) == ("ann", "")
    assert "managedFields" not in slim({"kind": "Pod", **body(managedFields=spec_of)})["metadata"]

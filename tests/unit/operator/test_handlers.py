from tests.unit.operator.bodies import NOW, cluster_body, model_body, pod_body, stamp
from tidegate_operator.cache import Cache
from tidegate_operator.handlers import EventHandler
from tidegate_operator.pod_template import POOL_LABEL
from tidegate_operator.work_queue import Key, ReconcileQueue


class Heard:
    def __init__(self) -> None:
        self.cache = Cache()
        self.queue = ReconcileQueue(clock=lambda: 0.0)
        self.handler = EventHandler(self.cache, self.queue)

    async def keys(self) -> list[Key]:
        """What is on the queue now, taken off it."""
        found = []
        while len(self.queue):
            key = await self.queue.take()
            self.queue.end(key)
            found.append(key)
        return sorted(found)


async def test_an_event_of_an_object_concerns_its_pool() -> None:
    heard = Heard()
    heard.handler.on_update("Model", model_body(spec={"pool": "gpu"}))
    heard.handler.on_update("Pool", {**model_body("cpu"), "kind": "Pool"})
    heard.handler.on_update("RayCluster", cluster_body("a", pool="ray"))
    heard.handler.on_update("Pod", pod_body("p", {POOL_LABEL: "pods"}))
    heard.handler.on_update("Pod", pod_body("stranger", {}))
    assert await heard.keys() == [("models", name) for name in ("cpu", "gpu", "pods", "ray")]


async def test_a_model_without_a_pool_names_the_default_one() -> None:
    heard = Heard()
    heard.handler.on_update("Model", model_body())
    heard.handler.on_update("Model", model_body("two", spec="nonsense"))
    assert await heard.keys() == [("models", "default")]


async def test_an_old_version_is_no_event() -> None:
    heard = Heard()
    heard.handler.on_update("Model", model_body(resourceVersion="5"))
    await heard.keys()
    heard.handler.on_update("Model", model_body(resourceVersion="5"))
    heard.handler.on_update("Model", model_body(resourceVersion="4"))
    assert await heard.keys() == []


async def test_when_a_name_becomes_free_the_other_models_pool_is_reconciled() -> None:
    heard = Heard()
    older = model_body("one", "a", creationTimestamp=stamp(NOW - 50))
    heard.handler.on_update("Model", older)
    heard.handler.on_update("Model", model_body("one", "b", spec={"pool": "gpu"}))
    await heard.keys()
    heard.handler.on_delete("Model", older)
    assert await heard.keys() == [("a", "default"), ("b", "gpu")]


async def test_a_listing_brings_what_the_watch_missed() -> None:
    heard = Heard()
    heard.handler.on_update("Model", model_body("one"))
    await heard.keys()
    heard.handler.on_list("Model", "models", [], 10)
    assert await heard.keys() == [("models", "default")]
    assert heard.cache.of("Model", "models") == []


async def test_only_a_changed_spec_counts_as_a_change_to_take_in() -> None:
    heard = Heard()
    heard.handler.on_update("Pod", pod_body("p", {POOL_LABEL: "default"}))
    assert heard.handler.changed_at == {}
    heard.handler.on_update("Model", model_body())
    first = heard.handler.changed_at.pop(("models", "default"))
    heard.handler.on_update("Model", model_body(resourceVersion="2", status={"waiting": 1}))
    assert heard.handler.changed_at == {}
    heard.handler.on_update("Model", model_body(resourceVersion="3", generation=2))
    assert heard.handler.changed_at[("models", "default")] >= first


async def test_a_resync_asks_for_all_pools_of_a_namespace_also_those_that_only_a_model_names() -> None:
    heard = Heard()
    heard.handler.on_update("Pool", {**model_body("cpu"), "kind": "Pool"})
    heard.handler.on_update("Model", model_body("one", spec={"pool": "none"}))
    heard.handler.on_update("Model", model_body("two", "other"))
    await heard.keys()
    heard.handler.resync("models")
    assert await heard.keys() == [("models", "cpu"), ("models", "none")]


def test_a_kind_is_missing_until_it_is_listed() -> None:
    heard = Heard()
    heard.handler.on_missing("RayCluster")
    assert heard.cache.missing == {"RayCluster"}
    heard.handler.on_list("RayCluster", "models", [], 1)
    assert heard.cache.missing == set()

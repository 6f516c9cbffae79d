import kopf

from tests.unit.operator.bodies import NOW, cluster_body, model_body, pod_body, stamp
from tidegate_operator.cache import Cache
from tidegate_operator.handlers import WATCHED, News, kopf_settings, watch
from tidegate_operator.pod_template import POOL_LABEL
from tidegate_operator.work_queue import Key, WorkQueue


class Heard:
    def __init__(self) -> None:
        self.cache = Cache()
        self.queue = WorkQueue(clock=lambda: 0.0)
        self.news = News(self.cache, self.queue)

    async def keys(self) -> list[Key]:
        """What is on the queue now, taken off it."""
        found = []
        while len(self.queue):
            key = await self.queue.take()
            self.queue.end(key)
            found.append(key)
        return sorted(found)


async def test_news_of_a_thing_concern_its_pool() -> None:
    heard = Heard()
    heard.news.seen("Model", model_body(spec={"pool": "gpu"}))
    heard.news.seen("Pool", {**model_body("cpu"), "kind": "Pool"})
    heard.news.seen("RayCluster", cluster_body("a", pool="ray"))
    heard.news.seen("Pod", pod_body("p", {POOL_LABEL: "pods"}))
    heard.news.seen("Pod", pod_body("stranger", {}))
    assert await heard.keys() == [("models", name) for name in ("cpu", "gpu", "pods", "ray")]


async def test_a_model_without_a_pool_names_the_default_one() -> None:
    heard = Heard()
    heard.news.seen("Model", model_body())
    heard.news.seen("Model", model_body("two", spec="nonsense"))
    assert await heard.keys() == [("models", "default")]


async def test_an_old_version_is_no_news() -> None:
    heard = Heard()
    heard.news.seen("Model", model_body(resourceVersion="5"))
    await heard.keys()
    heard.news.seen("Model", model_body(resourceVersion="5"))
    heard.news.seen("Model", model_body(resourceVersion="4"))
    assert await heard.keys() == []


async def test_when_a_name_becomes_free_the_other_models_pool_hears_of_it() -> None:
    heard = Heard()
    older = model_body("one", "a", creationTimestamp=stamp(NOW - 50))
    heard.news.seen("Model", older)
    heard.news.seen("Model", model_body("one", "b", spec={"pool": "gpu"}))
    await heard.keys()
    heard.news.gone("Model", older)
    assert await heard.keys() == [("a", "default"), ("b", "gpu")]


async def test_a_listing_tells_what_the_watch_missed() -> None:
    heard = Heard()
    heard.news.seen("Model", model_body("one"))
    await heard.keys()
    heard.news.listed("Model", "models", [], 10)
    assert await heard.keys() == [("models", "default")]
    assert heard.cache.of("Model", "models") == []


async def test_only_a_changed_spec_counts_as_a_change_to_take_in() -> None:
    heard = Heard()
    heard.news.seen("Pod", pod_body("p", {POOL_LABEL: "default"}))
    assert heard.news.changed_at == {}
    heard.news.seen("Model", model_body())
    first = heard.news.changed_at.pop(("models", "default"))
    heard.news.seen("Model", model_body(resourceVersion="2", status={"waiting": 1}))
    assert heard.news.changed_at == {}
    heard.news.seen("Model", model_body(resourceVersion="3", generation=2))
    assert heard.news.changed_at[("models", "default")] >= first


def test_kopf_only_watches() -> None:
    """Its other handlers would write annotations and finalizers."""
    heard = Heard()
    registry = watch(heard.news, WATCHED)
    assert len(registry._watching.get_all_handlers()) == len(WATCHED)
    for other in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert other.get_all_handlers() == []
    settings = kopf_settings()
    assert isinstance(settings, kopf.OperatorSettings)
    assert settings.scanning.disabled
    assert not settings.posting.enabled

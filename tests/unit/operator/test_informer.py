"""Informers against an API server that lists, watches and misbehaves (`http_api_server`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.unit.operator.http_api_server import HttpApiServer, connected, listening
from tests.waiting import await_until
from tidegate.tasks import end_tasks
from tidegate_operator import cluster, informer
from tidegate_operator.cache import Cache
from tidegate_operator.handlers import EventHandler
from tidegate_operator.health import STALLED_SECONDS, Liveness
from tidegate_operator.informer import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Informers,
    pause_seconds,
)
from tidegate_operator.kinds import OURS, RESOURCES, WATCHED
from tidegate_operator.work_queue import Key, ReconcileQueue


class Operator:
    """What the informers write into."""

    def __init__(self, server: HttpApiServer, api: cluster.Cluster, namespaces: tuple[str, ...]) -> None:
        self.now = 0.0
        self.cache = Cache()
        self.queue = ReconcileQueue(clock=lambda: 0.0)
        self.handler = EventHandler(self.cache, self.queue)
        self.liveness = Liveness(clock=lambda: self.now)
        self.informers = Informers(api, self.handler, self.liveness, namespaces)
        self._server = server

    def models(self, namespace: str = "models") -> dict[str, int]:
        """The version of each Model in the cache by its name."""
        return {
            body["metadata"]["name"]: int(body["metadata"]["resourceVersion"])
            for body in self.cache.of("Model", namespace)
        }

    async def comes_to(self, *names: str, namespace: str = "models") -> None:
        """Wait until the cache has exactly these Models, as the API server has them."""
        there = self._server.objects.get(("models", namespace), {})
        await await_until(
            lambda: (
                sorted(there) == sorted(names)
                and self.models(namespace)
                == {name: int(body["metadata"]["resourceVersion"]) for name, body in there.items()}
            )
        )

    async def watches(self, count: int, plural: str = "models") -> None:
        """Wait until so many watches were begun."""
        await await_until(lambda: len(self._server.queries(plural, watch=True)) >= count)

    def take_keys(self) -> set[Key]:
        """What is on the queue, taken off it."""
        found = set()
        while (key := self.queue._schedule.take(0.0)) is not None:
            self.queue.end(key)
            found.add(key)
        return found


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(informer, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(informer, "LONGEST_PAUSE_SECONDS", 0.01)


@pytest.fixture
async def server() -> AsyncIterator[HttpApiServer]:
    found = HttpApiServer()
    async with listening(found):
        yield found


@asynccontextmanager
async def operating(server: HttpApiServer, *namespaces: str) -> AsyncIterator[Operator]:
    async with connected(server) as api:
        operator = Operator(server, api, namespaces or ("models",))
        task = asyncio.create_task(operator.informers.run())
        try:
            yield operator
        finally:
            assert not task.done(), task
            await end_tasks(task)


@pytest.fixture
async def operator(server: HttpApiServer) -> AsyncIterator[Operator]:
    """One that has listed, and whose watches are all open."""
    server.put("models", "one")
    async with operating(server) as operator:
        await operator.informers.answered()
        await await_until(lambda: all(server.is_watched(RESOURCES[kind].plural) for kind in WATCHED))
        yield operator


async def test_what_is_there_is_listed_in_pages_and_what_changes_is_watched(
    server: HttpApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PAGE", 2)
    for number in range(5):
        server.put("models", f"m{number}")
    listed_at = server.version
    async with operating(server) as operator:
        await operator.informers.answered()
        assert operator.informers.is_ready("models")
        assert len(operator.models()) == 5
        assert operator.take_keys() == {("models", "default")}
        server.put("models", "m0")
        server.put("models", "new")
        server.delete("models", "m1")
        await operator.comes_to("m0", "m2", "m3", "m4", "new")
        assert len(server.queries("models", watch=False)) == 3  # pages of one listing
        (query,) = server.queries("models", watch=True)
        assert query["resourceVersion"] == str(listed_at)
        assert query["allowWatchBookmarks"] == "true"
        assert int(query["timeoutSeconds"]) >= 300


async def test_of_what_we_make_only_what_has_our_label_is_asked_for(
    server: HttpApiServer, operator: Operator
) -> None:
    for plural in ("rayclusters", "jobs", "pods"):
        await operator.watches(1, plural)
        for watch in (True, False):
            assert {query["labelSelector"] for query in server.queries(plural, watch=watch)} == {OURS}
    assert all("labelSelector" not in query for query in server.queries("models", watch=True))


async def test_a_watch_that_ends_goes_on_from_its_last_event_without_a_listing(
    server: HttpApiServer, operator: Operator
) -> None:
    body = server.put("models", "two")
    await operator.comes_to("one", "two")
    server.end()
    server.delete("models", "one")  # while nobody watches, or as the last thing before the end
    await operator.watches(2)
    await operator.comes_to("two")
    assert len(server.queries("models", watch=False)) == 1
    since = int(server.queries("models", watch=True)[1]["resourceVersion"])
    assert since >= int(body["metadata"]["resourceVersion"])


async def test_a_bookmark_moves_on_where_a_watch_begins_again(
    server: HttpApiServer, operator: Operator
) -> None:
    server.put("pods", "other")  # the version grows without a Model
    server.bookmark("models")
    server.end()
    await operator.watches(2)
    assert server.queries("models", watch=True)[1]["resourceVersion"] == str(server.version)
    assert len(server.queries("models", watch=False)) == 1
    assert set(operator.models()) == {"one"}  # a bookmark is no object


async def test_a_version_that_is_gone_is_listed_anew_and_finds_what_went(
    server: HttpApiServer, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("models", "two")
    await operator.comes_to("one", "two")
    operator.take_keys()
    monkeypatch.setattr(operator.handler, "resync", pytest.fail)  # it is no refusal of the namespace
    server.cut()
    server.delete("models", "one")
    server.compact()
    await operator.comes_to("two")
    assert ("models", "default") in operator.take_keys()
    assert len(server.queries("models", watch=False)) == 2


@pytest.mark.parametrize(
    "last",
    [
        b'{"type":"MODIFIED","object":{"apiVersion":"tidegate.dev/v1al',
        b"\xff\xfe not JSON\n",
        b'{"object": {}}\n',
        b'{"type":"ERROR","object":{"kind":"Status","code":500,"message":"etcd is away"}}\n',
    ],
    ids=["cut within a line", "not JSON", "without a type", "an error of the server"],
)
async def test_what_a_watch_says_that_makes_no_sense_loses_nothing(
    server: HttpApiServer, operator: Operator, last: bytes
) -> None:
    server.put("models", "two")
    await operator.comes_to("one", "two")
    server.end(last)
    await operator.watches(2)
    server.put("models", "three")
    await operator.comes_to("one", "two", "three")
    assert len(server.queries("models", watch=False)) == 1


async def test_a_connection_that_is_lost_is_made_again(server: HttpApiServer, operator: Operator) -> None:
    server.put("models", "m0")
    await operator.comes_to("one", "m0")
    for number in (1, 2):
        server.cut()
        server.put("models", f"m{number}")
        await operator.comes_to("one", *(f"m{other}" for other in range(number + 1)))
    assert len(server.queries("models", watch=False)) == 1


async def test_a_watch_that_ended_without_anything_is_not_trusted(
    server: HttpApiServer, operator: Operator
) -> None:
    server.end()
    await operator.watches(2)
    assert len(server.queries("models", watch=False)) == 2


async def test_a_watch_that_brings_nothing_is_given_up_and_listed_anew(
    server: HttpApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a connection that is open at this end alone."""
    monkeypatch.setattr(cluster, "QUIET_SECONDS", 0.05)
    server.is_silent = True
    async with operating(server) as operator:
        await operator.informers.answered()
        server.put("models", "one")
        await operator.comes_to("one")


async def test_an_api_server_that_restarts_is_found_again() -> None:
    server = HttpApiServer()
    server.put("models", "one")
    async with contextlib.AsyncExitStack() as stack:
        async with listening(server):
            operator = await stack.enter_async_context(operating(server))
            await operator.informers.answered()
        server.put("models", "two")
        server.delete("models", "one")
        server.compact()
        async with listening(server):
            await operator.comes_to("two")
            assert operator.informers.is_ready("models")
            server.put("models", "three")
            await operator.comes_to("two", "three")


async def test_a_listing_whose_next_page_is_gone_begins_again(
    server: HttpApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PAGE", 2)
    server.page_faults = 1
    for number in range(3):
        server.put("models", f"m{number}")
    async with operating(server) as operator:
        await operator.comes_to("m0", "m1", "m2")
        assert [query.get("continue") for query in server.queries("models", watch=False)] == [
            None,
            "2",
            None,
            "2",
        ]


@pytest.mark.parametrize("status", [403, 404])
async def test_a_namespace_that_refuses_stops_no_other_and_comes_back(
    server: HttpApiServer, status: int
) -> None:
    async with operating(server, "models", "other") as operator:
        await operator.informers.answered()
        server.put("models", "far", "other")
        server.put("models", "alone", "other", spec={"pool": "none"})
        await operator.comes_to("far", "alone", namespace="other")
        for plural in ("models", "pods"):
            server.refused[(plural, "other")] = status
        server.cut()
        await await_until(lambda: not operator.informers.is_ready("other"))
        server.put("models", "one")
        await operator.comes_to("one")
        assert operator.informers.is_ready("models")
        assert set(operator.models("other")) == {"far", "alone"}  # what it had last is no less true
        operator.take_keys()
        server.refused.clear()
        await await_until(lambda: operator.informers.is_ready("other"))
        assert operator.take_keys() >= {("other", "default"), ("other", "none")}


async def test_a_namespace_that_refuses_from_the_start_holds_up_no_other(server: HttpApiServer) -> None:
    server.refused[("jobs", "other")] = 403
    server.put("models", "one")
    async with operating(server, "models", "other") as operator:
        await asyncio.wait_for(operator.informers.answered(), 10)
        assert operator.informers.is_ready("models")
        assert not operator.informers.is_ready("other")
        assert not operator.informers.are_ready()


async def test_an_api_server_that_cannot_answer_yet_is_waited_for(server: HttpApiServer) -> None:
    server.refused[("models", "models")] = 503
    server.put("models", "one")
    async with operating(server) as operator:
        answered = asyncio.create_task(operator.informers.answered())
        await await_until(lambda: len(server.queries("models", watch=False)) > 2)
        assert not answered.done()
        server.refused.clear()
        await asyncio.wait_for(answered, 10)
        assert set(operator.models()) == {"one"}


async def test_kuberays_definition_may_be_missing_and_come_later(server: HttpApiServer) -> None:
    server.refused[("rayclusters", "models")] = 404
    server.put("pools", "default")
    async with operating(server) as operator:
        await operator.informers.answered()
        assert operator.cache.missing == {"RayCluster"}
        assert operator.informers.is_ready("models")
        server.refused.clear()
        server.put("rayclusters", "default-g1")
        await await_until(lambda: operator.cache.count("RayCluster") == 1)
        assert operator.cache.missing == set()


async def test_an_object_that_breaks_the_handler_ends_no_informer(
    server: HttpApiServer, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(operator.handler, "on_update", breaks)
        server.put("models", "two")
        await operator.watches(2)
    await operator.comes_to("one", "two")


async def test_an_informer_that_makes_no_turn_is_a_problem_of_the_process(
    server: HttpApiServer, operator: Operator
) -> None:
    operator.now += STALLED_SECONDS
    assert operator.liveness.problem() == ""
    server.put("models", "two")
    await operator.comes_to("one", "two")
    operator.now += 1
    assert "the informer of Pool in models" in operator.liveness.problem()
    for kind in WATCHED:
        server.bookmark(RESOURCES[kind].plural)
    await await_until(lambda: operator.liveness.problem() == "")


async def test_watches_of_many_namespaces_leave_connections_for_calls(server: HttpApiServer) -> None:
    """The client's own bound is a hundred."""
    namespaces = [f"n{number}" for number in range(25)]
    async with connected(server) as api:
        operator = Operator(server, api, tuple(namespaces))
        task = asyncio.create_task(operator.informers.run())
        await await_until(
            lambda: sum("watch" in query for _, query in server.asked) == len(WATCHED) * len(namespaces)
        )
        await asyncio.wait_for(api.list("Model", "n0"), 10)
        await end_tasks(task)


def test_pauses_double_are_bounded_and_differ() -> None:
    for drawn in (0.0, 0.5, 1.0):
        pauses = [pause_seconds(failures, drawn) for failures in range(40)]
        assert pauses == sorted(pauses)
        assert pauses[1] == pytest.approx(min(2 * pauses[0], LONGEST_PAUSE_SECONDS))
        assert 0 < pauses[-1] <= LONGEST_PAUSE_SECONDS
    assert pause_seconds(3, 0.0) < pause_seconds(3, 1.0)
    assert pause_seconds(10**6, 1.0) <= LONGEST_PAUSE_SECONDS
    assert FIRST_PAUSE_SECONDS <= LONGEST_PAUSE_SECONDS

"""What one change costs among 50 Models and among 500, in ten Pools.

One operator sees both: 50 Models come, are measured, and 450 more come beside them. It is then stopped and
started anew. Latencies are those that a watcher of the API server sees, from before the write is sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.cluster.cluster import Cluster as ControlPlane
from tests.cluster.full import control_plane
from tests.cluster.full.control_plane import KEY_PREFIX
from tests.cluster.full.crowd import Crowd, Series, Writes, another_queue, another_revision
from tests.cluster.full.figures import Figures, percentile
from tests.cluster.full.model_watch import watching
from tests.cluster.operator_process import OperatorProcess, World, running
from tests.cluster.simulated_serve import simulated_serve
from tests.redis_server import RedisServer
from tidegate_operator.cluster import Cluster, configuration

FEW, MANY = 50, 500
SETTINGS_CHANGES = {FEW: 50, MANY: 120}
REVISION_CHANGES = {FEW: 20, MANY: 25}
AT_ONCE = 50
PER_CHANGE_TOLERANCE = 0.35  # a step seen by two looks is two writes; chance decides which are

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Measured:
    grow_seconds: float
    settings: Series
    revisions: Series
    at_once_seconds: list[float]
    memory: tuple[float, float]
    idle_cores: float


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def crowd(
    plane: ControlPlane, full_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Crowd, World]]:
    log = tmp_path_factory.mktemp("scale") / "operator.log"
    server, tls = control_plane.server_of(plane), control_plane.administrator(plane)
    async with AsyncExitStack() as stack:
        serve = await stack.enter_async_context(simulated_serve(full_redis.url, KEY_PREFIX))
        settings = await configuration(str(plane.facts.kubeconfig))
        api = await stack.enter_async_context(Cluster(settings, lambda *_: None))
        await control_plane.clean(api)
        watch = await stack.enter_async_context(watching(server, tls, api))
        await stack.enter_async_context(control_plane.clusters_become_ready(api))
        environment = control_plane.operator_environment(plane.facts.kubeconfig, full_redis.url, serve.url)
        operator = OperatorProcess(environment, log)
        stack.callback(lambda: print(log.read_text(encoding="utf-8")[-20_000:]))
        await stack.enter_async_context(running(operator))
        world = World(api, serve, operator)
        yield Crowd(world, watch), world


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def few(crowd: tuple[Crowd, World], figures: Figures) -> Measured:
    return await _measured(crowd[0], FEW, figures)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def many(crowd: tuple[Crowd, World], few: Measured, figures: Figures) -> Measured:
    return await _measured(crowd[0], MANY, figures)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def restarted(
    crowd: tuple[Crowd, World], many: Measured, figures: Figures
) -> tuple[Writes, tuple[float, float]]:
    """What a new process has written when it has come to rest among all Models, and its memory."""
    operator = crowd[1].operator
    await operator.stop()
    began = time.monotonic()
    await operator.start()
    await crowd[1].wait_for("the new process leads", operator.leads)
    led_seconds = time.monotonic() - began
    writes = await crowd[1].settled(quiet_seconds=10)
    memory = await crowd[0].memory()
    column = f"{MANY} Models"
    figures.add("operator restart: new process leads (s)", column, f"{led_seconds:.1f}")
    figures.add("operator restart: writes", column, str(sum(writes.values())))
    figures.add("operator memory after a restart, now / most (MB)", column, "{:.0f} / {:.0f}".format(*memory))
    return writes, memory


@pytest.mark.parametrize("count", [FEW, MANY])
async def test_a_change_is_taken_in_within_two_seconds(count: int, few: Measured, many: Measured) -> None:
    found = few if count == FEW else many
    assert percentile(found.settings.taken_in_seconds, 99) < 2
    assert percentile(found.revisions.taken_in_seconds, 99) < 2


async def test_fifty_changes_at_once_are_in_the_status_within_ten_seconds(many: Measured) -> None:
    assert max(many.at_once_seconds) < 10


@pytest.mark.parametrize("count", [FEW, MANY])
async def test_a_change_writes_to_no_other_model(count: int, few: Measured, many: Measured) -> None:
    found = few if count == FEW else many
    assert found.settings.of_others() == {}
    assert found.revisions.of_others() == {}


async def test_a_change_in_place_is_one_write(few: Measured, many: Measured) -> None:
    for found in (few, many):
        assert found.settings.operator_writes == {("Model", "status"): len(found.settings.changed)}


async def test_a_new_revision_costs_as_many_writes_among_many_models_as_among_few(
    few: Measured, many: Measured
) -> None:
    one, other = few.revisions.per_change, many.revisions.per_change
    assert one.keys() == other.keys()
    for verb, count in one.items():
        assert other[verb] == pytest.approx(count, abs=PER_CHANGE_TOLERANCE), verb


async def test_memory_stays_within_bounds(
    few: Measured, many: Measured, restarted: tuple[Writes, tuple[float, float]]
) -> None:
    assert few.memory[1] < 150
    assert many.memory[1] < 300
    assert restarted[1][1] < 300


async def test_a_restart_writes_nothing(restarted: tuple[Writes, tuple[float, float]]) -> None:
    assert restarted[0] == {}


async def _measured(crowd: Crowd, count: int, figures: Figures) -> Measured:
    grow_seconds = await crowd.grow(count)
    names = crowd.names
    settings = await crowd.changes(_some(names, SETTINGS_CHANGES[count]), another_queue)
    revisions = await crowd.changes(_some(names, REVISION_CHANGES[count]), another_revision)
    at_once = await crowd.changes_at_once(_some(names, AT_ONCE), another_queue)
    found = Measured(
        grow_seconds, settings, revisions, at_once, await crowd.memory(), await crowd.idle_cores()
    )
    _tell(found, f"{count} Models", figures)
    return found


def _some(names: list[str], count: int) -> list[str]:
    """Some of all Models, from all pools."""
    return random.Random(count).sample(names, count)


def _tell(found: Measured, column: str, figures: Figures) -> None:
    figures.add("from nothing, or from 50, to all ready (s)", column, f"{found.grow_seconds:.0f}")
    for what, series in (("in place", found.settings), ("new revision", found.revisions)):
        figures.add(f"{what}: changes, one after the other", column, str(len(series.changed)))
        for until, times in (("in the status", series.taken_in_seconds), ("settled", series.settled_seconds)):
            figures.add(
                f"{what}: {until}, p50 / p99 / most (s)",
                column,
                f"{percentile(times, 50):.2f} / {percentile(times, 99):.2f} / {max(times):.2f}",
            )
        counts = ", ".join(f"{count:.2g} {verb}" for verb, count in series.per_change.items())
        figures.add(f"{what}: API writes per change", column, counts)
        figures.add(f"{what}: writes to other Models", column, str(sum(series.of_others().values())))
    figures.add(
        f"{AT_ONCE} changes at once: in the status, p50 / most (s)",
        column,
        f"{percentile(found.at_once_seconds, 50):.2f} / {max(found.at_once_seconds):.2f}",
    )
    figures.add("operator memory, now / most (MB)", column, "{:.0f} / {:.0f}".format(*found.memory))
    figures.add("operator at rest (cores)", column, f"{found.idle_cores:.2f}")

"""The operator behind an API server that conflicts, refuses, forgets to answer, lags and cuts watches.

The same story is told several times: once through a proxy that does no harm, then with the faults of
`fault_proxy.MANY` and a seed each. While the faults go on, everything that the operator decides must become
what it was without them: resources and their status, what gateways read, and what Serve runs. A standby is
there all the time, and processes that end are started anew, as a Deployment would.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.cluster.cluster import Cluster as ControlPlane
from tests.cluster.full import control_plane
from tests.cluster.full.control_plane import KEY_PREFIX
from tests.cluster.full.fault_proxy import MANY, FaultProxy, fault_proxy
from tests.cluster.full.figures import Figures
from tests.cluster.full.outcome import Outcome, difference, outcome
from tests.cluster.full.story import told
from tests.cluster.operator_process import OperatorProcess, World
from tests.cluster.simulated_serve import simulated_serve
from tests.redis_server import RedisServer
from tidegate.store.connection import Connection
from tidegate.store.registry import Registry
from tidegate_operator.cluster import Cluster, configuration

SEEDS = (1, 2, 3)
CONVERGE_SECONDS = 150
CALM_SECONDS = 60
LOOK_SECONDS = 1.0
LEAST_OF_EACH = 3  # faults of each kind that the operators must have met
RESYNC_SECONDS = 15  # what a watch has lost for good is found after this

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]


class Deployment:
    """Two processes of the operator that are started anew when they end. `ends` are their exit codes."""

    def __init__(self, operators: list[OperatorProcess]) -> None:
        self.operators = operators
        self.ends: list[int] = []
        self.most_leaders = 0

    async def keep(self, operator: OperatorProcess) -> None:
        await operator.start()
        try:
            while True:
                self.ends.append(await operator.ended(timeout=3600))
                await operator.start()
        finally:
            await operator.stop()

    async def count_leaders(self) -> None:
        while True:
            leading = [await operator.leads() for operator in self.operators]
            self.most_leaders = max(self.most_leaders, sum(leading))
            await asyncio.sleep(LOOK_SECONDS)


class Stage:
    """What one telling of the story runs on."""

    def __init__(
        self, world: World, registry: Registry, proxy: FaultProxy, deployment: Deployment, log: Path
    ) -> None:
        self.world = world
        self.registry = registry
        self.proxy = proxy
        self.deployment = deployment
        self.log = log

    async def outcome(self) -> Outcome:
        return await outcome(self.world.api, self.registry, self.world.serve)

    async def comes_to(self, wanted: Outcome, timeout: float) -> float:
        """Wait until all is as wanted; after how many seconds."""
        began = time.monotonic()
        while differs := difference(wanted, await self.outcome()):
            if time.monotonic() - began > timeout:
                raise AssertionError(f"not the same after {timeout:.0f} s:\n{differs}\n{self.log}")
            await asyncio.sleep(LOOK_SECONDS)
        return time.monotonic() - began

    async def meets_each_fault(self, timeout: float) -> None:
        began = time.monotonic()
        kinds = [f"{call} {fault}" for call in ("write", "read", "watch") for fault in getattr(MANY, call)]
        while rare := {kind: count for kind in kinds if (count := self.proxy.injected[kind]) < LEAST_OF_EACH}:
            assert time.monotonic() - began < timeout, f"too few of these were met: {rare}"
            await asyncio.sleep(LOOK_SECONDS)

    async def rests(self) -> Outcome:
        """The outcome once nothing changes any more."""
        unchanged, found = 0, await self.outcome()
        began = time.monotonic()
        while unchanged < 8:
            assert time.monotonic() - began < CALM_SECONDS, f"it does not come to rest; {self.log}"
            await asyncio.sleep(LOOK_SECONDS)
            newest = await self.outcome()
            unchanged, found = (unchanged + 1, found) if newest == found else (0, newest)
        return found


@asynccontextmanager
async def stage(plane: ControlPlane, redis: RedisServer, folder: Path) -> AsyncIterator[Stage]:
    log = folder / "operators.log"
    async with AsyncExitStack() as stack:
        serve = await stack.enter_async_context(simulated_serve(redis.url, KEY_PREFIX))
        connection = await stack.enter_async_context(Connection(redis.url))
        await connection.call("FLUSHALL", repeat=True)
        api = await stack.enter_async_context(
            Cluster(await configuration(str(plane.facts.kubeconfig)), lambda *_: None)
        )
        await control_plane.clean(api)
        upstream, tls = control_plane.server_of(plane), control_plane.administrator(plane)
        proxy = await stack.enter_async_context(fault_proxy(upstream, tls))
        await stack.enter_async_context(control_plane.clusters_become_ready(api))
        kubeconfig = control_plane.kubeconfig_for(proxy.url, folder / "kubeconfig")
        environment = {
            **control_plane.operator_environment(kubeconfig, redis.url, serve.url),
            "TIDEGATE_RESYNC_SECONDS": str(RESYNC_SECONDS),
        }
        operators = [
            OperatorProcess({**environment, "TIDEGATE_POD_NAME": f"operator-{number}"}, log)
            for number in range(2)
        ]
        deployment = Deployment(operators)
        tasks = [asyncio.create_task(deployment.keep(operator)) for operator in operators]
        tasks.append(asyncio.create_task(deployment.count_leaders()))
        stack.push_async_callback(_end, tasks)
        world = World(api, serve, operators[0])
        yield Stage(world, Registry(connection, key_prefix=KEY_PREFIX), proxy, deployment, log)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def without_faults(
    plane: ControlPlane, full_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """Where the story ends when nothing goes wrong."""
    async with stage(plane, full_redis, tmp_path_factory.mktemp("calm")) as calm:
        await told(calm.world)
        return await calm.rests()


async def test_the_story_ends_as_it_should(without_faults: Outcome) -> None:
    """The others are compared with this one, so it must be right itself."""
    assert without_faults.ready() == {
        "a-asleep": ("True", "Asleep"),
        "a-changed": ("True", "Serving"),
        "a-kept": ("True", "Serving"),
        "a-more": ("True", "Serving"),
        "a-refused": ("False", "RevisionFailed"),
        "b-anew": ("True", "Serving"),
        "b-broken": ("False", "RevisionFailed"),
        "b-kept": ("True", "Serving"),
        "c-early": ("True", "Serving"),
        "d-orphan": ("False", "NoSuchPool"),
    }
    assert sorted(without_faults.pools) == ["a", "b", "c"]
    assert len(without_faults.clusters) == 3
    assert set(without_faults.registry) == set(without_faults.models)


@pytest.mark.parametrize("seed", SEEDS)
async def test_faults_of_the_api_server_change_nothing_in_the_end(
    seed: int,
    plane: ControlPlane,
    full_redis: RedisServer,
    without_faults: Outcome,
    tmp_path: Path,
    figures: Figures,
) -> None:
    async with stage(plane, full_redis, tmp_path) as bad:
        bad.proxy.break_down(MANY, seed)
        await told(bad.world)
        converged_seconds = await bad.comes_to(without_faults, CONVERGE_SECONDS)
        # Leases are renewed, watches cut and listings made at rest too: the state must bear all of it.
        await bad.meets_each_fault(CONVERGE_SECONDS)
        await bad.comes_to(without_faults, CONVERGE_SECONDS)
        column, injected = f"seed {seed}", sum(bad.proxy.injected.values())
        figures.add("faults: calls and watches of the operators", column, str(bad.proxy.calls))
        figures.add("faults: injected", column, str(injected))
        figures.add("faults: from the last change to the same state (s)", column, f"{converged_seconds:.0f}")
        figures.add("faults: operator processes that ended", column, str(len(bad.deployment.ends)))
        bad.proxy.mend()
        await bad.comes_to(without_faults, CALM_SECONDS)
        assert await bad.rests() == without_faults
        assert bad.deployment.most_leaders == 1
        assert set(bad.deployment.ends) <= {1}, "only a lost Lease or a broken watch may end it"


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):  # because we ask for it
            await task

"""The control plane, a Redis and the table of figures of a full run. `make test-cluster-full` runs these."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from tests.cluster import cluster as clusters
from tests.cluster.cluster import Cluster
from tests.cluster.full.figures import Figures
from tests.cluster.release import SAMPLES, Release
from tests.redis_server import RedisServer

FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = Figures()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if table := config.stash[FIGURES].table():
        terminalreporter.section("figures")
        terminalreporter.write_line(table)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def plane() -> Iterator[Cluster]:
    """API server, controllers and scheduler, with Tidegate's definitions and KubeRay's: no node, no root."""
    try:
        plane = clusters.start("control")
        kuberay = plane.facts.programs / "kuberay-config" / "crd" / "bases" / "ray.io_rayclusters.yaml"
        for definitions in (clusters.CHART / "files" / "crds", kuberay):
            plane.kubectl("apply", "--server-side", "-f", str(definitions))
            # A definition that has no conditions yet is an error to kubectl, so it is asked again.
            wait = ("wait", "--for=condition=Established", "-f", str(definitions), "--timeout=60s")
            plane.wait_for("the definitions", lambda wait=wait: plane.kubectl(*wait))  # type: ignore[misc]
        yield plane
    finally:
        clusters.stop("control")


@pytest.fixture(scope="session")
def cpu_pool(shared_release: Release) -> Iterator[None]:
    """The Pool `default`, of CPUs, as the sample has it."""
    resources = yaml.safe_load_all((SAMPLES / "cpu-demo.yaml").read_text(encoding="utf-8"))
    (pool,) = (each for each in resources if each["kind"] == "Pool")
    try:
        shared_release.apply(pool)
        shared_release.wait_for_pool()
        yield
    finally:
        shared_release.cluster.delete("pool", "default", shared_release.namespace)


@pytest.fixture(scope="module")
def full_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()

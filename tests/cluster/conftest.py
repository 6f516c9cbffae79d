"""The cluster that the tests in this folder run in, and what is told when one of them fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.cluster import cluster as clusters
from tests.cluster.cluster import Cluster
from tests.cluster.figures import Figures

NAMESPACES = pytest.StashKey[list[str]]()
FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = Figures()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    config.stash[FIGURES].show(terminalreporter)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Where tests note how long things took."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The whole cluster: started by `make test-cluster`, or by up.sh for tests run by hand."""
    try:
        return Cluster.running()
    except clusters.NotRunning as problem:
        pytest.fail(str(problem), pytrace=False)


@pytest.fixture(scope="session")
def api_server() -> Iterator[Cluster]:
    """etcd and an API server of its own, with Tidegate's definitions: no node, no root, five seconds."""
    try:
        api = clusters.start("api")
        definitions = clusters.CHART / "files" / "crds"
        api.kubectl("apply", "--server-side", "-f", str(definitions))
        api.kubectl("wait", "--for=condition=Established", "-f", str(definitions), "--timeout=60s")
        yield api
    finally:
        clusters.stop("api")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test that used the cluster shows what the cluster says about it."""
    report = yield
    namespaces = item.stash.get(NAMESPACES, [])
    used = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and namespaces and isinstance(used, Cluster):
        report.sections.append(("the cluster", used.story(namespaces)))
    return report

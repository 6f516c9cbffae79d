"""The cluster that the tests in this folder run in, and what is told when one of them fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.cluster import cluster as clusters
from tests.cluster.cluster import Cluster
from tests.cluster.figures import Figures
from tests.cluster.release import Release

NAMESPACES = pytest.StashKey[list[str]]()
FIGURES = pytest.StashKey[Figures]()

# The files that use the whole cluster, in the order in which they run: the first brings a release of its own
# and removes it, the others share the next one, and the last removes that.
ORDER = ("test_platform", "test_failures", "test_packing", "test_removal")
# Of those that run beside them, the one that keeps disk and cores busy goes first, while the cluster starts:
# beside it a killed Ray head at times missed the 15 seconds that Ray gives its parts, and came back only with
# the next pod, after 150 s.
BESIDE_FIRST = "test_image_build"
# What differs from the chart's defaults in the shared release.
OPTIONS = ("--set=crds.keep=false", "--set=queueSettings.stepTimeoutSeconds=20")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cluster-tests",
        choices=("whole", "beside"),
        help="only those that use the whole cluster, or only those that run beside it",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = Figures()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = config.getoption("--cluster-tests")
    left_out = [item for item in items if only and (only == "whole") != uses_whole_cluster(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    if item.path.stem == BESIDE_FIRST:
        return -2
    return ORDER.index(item.path.stem) if item.path.stem in ORDER else -1


def uses_whole_cluster(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "cluster" in item.fixturenames


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
def shared_release(cluster: Cluster) -> Iterator[Release]:
    """One that is there is used and stays; otherwise one comes and goes, and leaves nothing."""
    release = Release(cluster)
    if release.is_installed():
        yield release
        return
    try:
        release.install(*OPTIONS)
        yield release
    finally:
        release.remove_all()


@pytest.fixture(scope="session")
def api_server() -> Iterator[Cluster]:
    """etcd and an API server of its own, with Tidegate's definitions: no node, no root, five seconds."""
    try:
        api = clusters.start("api")
        definitions = str(clusters.CHART / "files" / "crds")
        api.kubectl("apply", "--server-side", "-f", definitions)
        # A definition that has no conditions yet is an error to kubectl, so it is asked again.
        wait = ("wait", "--for=condition=Established", "-f", definitions, "--timeout=60s")
        api.wait_for("the definitions", lambda: api.kubectl(*wait))
        yield api
    finally:
        clusters.stop("api")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test that used the cluster shows what the cluster says about it. At once: a run that is ended
    before its summary, as by CI's limit, would leave nothing but an F."""
    report = yield
    if not report.failed:
        return report
    namespaces = item.stash.get(NAMESPACES, [])
    used = getattr(item, "funcargs", {}).get("cluster")
    if namespaces and isinstance(used, Cluster):
        report.sections.append(("the cluster", used.story(namespaces)))
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        terminal.write_line(f"\n{report.nodeid} failed:\n{report.longreprtext}")
        for title, text in report.sections:
            terminal.write_line(f"---- {title} ----\n{text}")
    return report

"""The end of the second release, which came over what the first one left, with `crds.keep=false`."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NAMESPACES
from tests.cluster.figures import Figures
from tests.cluster.release import NAMESPACE, Release

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(autouse=True)
def told_on_failure(request: pytest.FixtureRequest) -> None:
    request.node.stash[NAMESPACES] = [NAMESPACE]


def test_models_that_a_former_release_left_answer_again(cluster: Cluster, shared_release: Release) -> None:
    names = {item["metadata"]["name"] for item in cluster.get_all("models", NAMESPACE)}
    if not names:
        pytest.skip("no former release has left Models: test_platform did not run")
    assert names == {"tide-demo", "tide-demo-gptq", "simulated"}
    for name in ("tide-demo", "tide-demo-gptq"):
        assert shared_release.answer(name, "What is 347 + 285?").endswith("Answer: 632")


def test_without_keep_nothing_stays(shared_release: Release, figures: Figures) -> None:
    with figures.seconds("helm uninstall", "without crds.keep"):
        shared_release.uninstall()
    shared_release.cluster.wait_for("nothing is left", lambda: shared_release.leftovers() == [], 120)

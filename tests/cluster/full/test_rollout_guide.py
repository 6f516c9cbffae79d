"""The guide on rollouts, followed on the whole cluster: `kubectl apply` in place of saving the file, and the
commands as its section on clusters has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NAMESPACES
from tests.cluster.release import Release
from tests.integration.rollout_guide import MODEL, GuideSteps, Host, Traffic, file_of_guide

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, kw_only=True)
class KubernetesHost(Host):
    release: Release

    def apply(self, text: str) -> None:
        self.release.cluster.kubectl("apply", "-n", self.release.namespace, "-f", "-", stdin=text)


@pytest.fixture(autouse=True)
def told_on_failure(request: pytest.FixtureRequest, shared_release: Release) -> None:
    request.node.stash[NAMESPACES] = [shared_release.namespace]


@pytest.fixture(scope="module")
def host(
    cluster: Cluster, shared_release: Release, cpu_pool: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KubernetesHost]:
    found = cluster.environment
    environment = {"TIDEGATE_HOME": str(tmp_path_factory.mktemp("home"))}
    environment |= {name: found[name] for name in ("KUBECONFIG", "PATH")}
    context = cluster.kubectl("config", "current-context").strip()
    options = ("--context", context, "--namespace", shared_release.namespace)
    host = KubernetesHost(environment=environment, options=options, has_file=False, release=shared_release)
    try:
        host.apply(file_of_guide())
        shared_release.wait_for(MODEL, "Ready", reason="Serving")
        yield host
    finally:
        cluster.delete("model", MODEL, shared_release.namespace)


@pytest.fixture(scope="module")
def traffic(host: KubernetesHost) -> Iterator[Traffic]:
    key = host.run("keys", "create", "traffic").strip()
    with Traffic(host.release.address, key).running() as traffic:
        yield traffic


class TestGuide(GuideSteps):
    pass

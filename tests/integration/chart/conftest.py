from __future__ import annotations

import pytest

from tests.integration.chart.rendered import Helm, find_helm


@pytest.fixture(scope="session")
def helm() -> Helm:
    found = find_helm()
    if found is None:
        pytest.skip(
            "no helm: set TIDEGATE_HELM, put it on the PATH, or build it with tests/cluster/build.sh helm"
        )
    return Helm(found)

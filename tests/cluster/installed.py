"""The chart's release that tests of a running platform use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.cluster import CHART, Cluster

RELEASE = "tidegate"


@contextmanager
def installed(cluster: Cluster) -> Iterator[str]:
    """The namespace of the release. One that is there is used and stays; one that is not comes and goes."""
    found = [item for item in json.loads(cluster.helm("list", "-A", "-o", "json")) if item["name"] == RELEASE]
    if found:
        yield str(found[0]["namespace"])
        return
    options = ("-n", RELEASE, "--create-namespace", "--wait", "--timeout", "3m", "--set", "crds.keep=false")
    try:
        cluster.helm("install", RELEASE, str(CHART), *options)
        yield RELEASE
    finally:
        cluster.helm("uninstall", RELEASE, "-n", RELEASE, "--wait", "--ignore-not-found")
        cluster.delete("namespace", RELEASE)

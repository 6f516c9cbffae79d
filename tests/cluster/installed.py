"""The release that tests beside `test_platform` use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.cluster import Cluster
from tests.cluster.release import Release


@contextmanager
def installed(cluster: Cluster) -> Iterator[Release]:
    """One that is there is used and stays; otherwise one comes and goes, and leaves nothing."""
    release = Release(cluster)
    if release.is_installed():
        yield release
        return
    try:
        release.install()
        yield release
    finally:
        release.remove_all()

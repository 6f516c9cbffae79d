"""Every failure of platform/docs/reference/failures.md, made on the cluster as the page says, and what is
told then.

Nearly all the time is Ray's and the kubelet's, so all failures that hurt no others are begun at once and each
test waits for its own, first those that scripts make: some of them pass. Those of the whole cluster (no
Redis, no KubeRay) come last, one after the other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NAMESPACES
from tests.cluster.failure_page import Failure, Resources, Told, common_resources, failures
from tests.cluster.release import Release

# Two Ray workers and 120 s until an engine counts as hung, beside all the others on two cores.
SECONDS = 240
SCRIPT_SECONDS = 200
WORDS_SECONDS = 20  # a message grows more exact while Events and nodes are read

pytestmark = pytest.mark.timeout(SECONDS + SCRIPT_SECONDS)


class Scene:
    """What stands in the namespace of the release because of the page."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.namespace = namespace
        self._cluster = cluster
        self._beside: dict[str, list[subprocess.Popen[str]]] = {}

    def apply(self, resources: Resources) -> None:
        self._cluster.apply(*resources, namespace=self.namespace)

    def delete(self, resources: Resources, *, wait: bool = False) -> None:
        for resource in reversed(resources):
            kind, name = resource["kind"].lower(), resource["metadata"]["name"]
            self._cluster.delete(kind, name, self.namespace, wait=wait)

    def begin(self, failure: Failure) -> None:
        """Do what the page says; its scripts go on beside everything else."""
        for step in failure.steps:
            if isinstance(step, str):
                self._beside.setdefault(failure.title, []).append(self._start(step))
            else:
                self.apply(step)

    def make(self, failure: Failure) -> None:
        for step in failure.steps:
            if isinstance(step, str):
                self.run(step)
            else:
                self.apply(step)

    def remove(self, failure: Failure) -> None:
        for script in self._beside.pop(failure.title, []):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(script.pid, signal.SIGTERM)
            print(script.communicate(timeout=30)[0])
        self.delete(failure.resources)

    def run(self, script: str) -> None:
        running = self._start(script)
        output, _ = running.communicate(timeout=SCRIPT_SECONDS)
        assert running.returncode == 0, output

    def has_told(self, told: Told) -> None:
        place = (told.kind, told.name, told.type, self.namespace)
        wanted = {"status": told.status, "reason": told.reason}
        found = self._cluster.wait_for_condition(*place, **wanted, timeout=SECONDS)
        print(f"{told.kind}/{told.name} {told.type}={told.status} {told.reason}\n  {found['message']}")

        def is_as_shown() -> bool:
            found.update(self._cluster.condition(*place))
            return told.matches(found["message"])

        try:
            self._cluster.wait_for("the page's words", is_as_shown, timeout=WORDS_SECONDS)
        except AssertionError:
            assert found["message"] == told.message, "the page shows another message"

    def _start(self, script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-uo", "pipefail", "-c", script],
            env=self._cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def scene(request: pytest.FixtureRequest, cluster: Cluster, shared_release: Release) -> Iterator[Scene]:
    """The page's Pool, and what the selected tests look at on its way."""
    chosen = [
        found
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_what_is_told.__name__
        if isinstance(found := item.callspec.params["failure"], Failure)
    ]
    common = common_resources()
    scene = Scene(cluster, shared_release.namespace)
    try:
        scene.apply(common)
        for failure in chosen:
            if not failure.hurts_others:
                scene.begin(failure)
        yield scene
    finally:
        for failure in chosen:
            scene.remove(failure)
        for resources in (*(failure.resources for failure in chosen), common):
            scene.delete(resources, wait=True)


def in_turn() -> list[Failure]:
    return sorted(failures(), key=lambda failure: (failure.hurts_others, not failure.has_script))


@pytest.mark.parametrize("failure", in_turn(), ids=str)
def test_what_is_told(failure: Failure, scene: Scene, request: pytest.FixtureRequest) -> None:
    request.node.stash[NAMESPACES] = [scene.namespace]
    try:
        if failure.hurts_others:
            scene.make(failure)
        for told in failure.told:
            scene.has_told(told)
    finally:
        if failure.hurts_others:
            scene.run(failure.undo)
        scene.remove(failure)

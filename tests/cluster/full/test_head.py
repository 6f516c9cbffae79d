"""A Ray head that is killed while its Pool holds 40 Models at zero.

All of them come back, within the memory of the head that a Pool has by default, and a request that comes
meanwhile waits and is answered. First with Ray's state in a Redis, where the new head finds its Serve; then
without, where the operator brings every Model back, a few unbuilt ones at a time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, Resource
from tests.cluster.conftest import NAMESPACES
from tests.cluster.full.figures import Figures
from tests.cluster.full.head import Head
from tests.cluster.release import MODEL, Release, resource

POOL = "many"
OURS = "test=head"  # the label of the Models
NAMES = [f"sleeper-{number:02}" for number in range(40)]
ASKED = NAMES[20]  # neither of the first nor of the last that come back
MAX_UNBUILT = 4
HEAD = f"tidegate.dev/pool={POOL},ray.io/node-type=head"
WORKERS = f"tidegate.dev/pool={POOL},ray.io/node-type=worker"
WITH_REDIS, WITHOUT = "Ray's state in Redis", "Ray's state lost"

PROVE_SECONDS = 1200  # 40 processes that load, on two cores
BACK_SECONDS = 600
MIB = 1 << 20
_PUT = re.compile(r"PUT \d+ applications: ([\w, -]+)")

pytestmark = pytest.mark.timeout(PROVE_SECONDS + 2 * BACK_SECONDS)


@pytest.fixture(autouse=True)
def told_on_failure(request: pytest.FixtureRequest, shared_release: Release) -> None:
    request.node.stash[NAMESPACES] = [shared_release.namespace]


@pytest.fixture(scope="module")
def crowd(cluster: Cluster, shared_release: Release, figures: Figures) -> Iterator[Crowd]:
    """40 Models that have proved themselves and sleep."""
    crowd = Crowd(cluster, shared_release)
    try:
        crowd.apply_pool()
        shared_release.wait_for_pool(POOL)
        began = time.monotonic()
        shared_release.apply(*map(_sleeper, NAMES))
        crowd.wait_until_asleep(PROVE_SECONDS)
        _add(figures, "Models applied: all proved and asleep (s)", WITH_REDIS, time.monotonic() - began)
        yield crowd
    finally:
        cluster.kubectl("delete", MODEL, "-l", OURS, "-n", shared_release.namespace, timeout=400)
        cluster.delete("pool", POOL, shared_release.namespace)


def test_all_return_to_a_new_head_that_finds_its_state(crowd: Crowd, figures: Figures) -> None:
    found = crowd.kill_head()
    found.tell(figures, WITH_REDIS)
    assert_returned(found)


def test_all_return_to_a_new_head_that_knows_nothing(crowd: Crowd, figures: Figures) -> None:
    began = time.monotonic()
    crowd.recreate_without_redis()
    _add(figures, "Pool changed: all Models on a new cluster (s)", WITHOUT, time.monotonic() - began)
    found = crowd.kill_head()
    found.tell(figures, WITHOUT)
    assert_returned(found)
    assert found.puts, "the operator has brought nothing back"
    before: set[str] = set()
    for names in found.puts:
        assert len(names - before) <= MAX_UNBUILT
        before = names
    assert len(before) == len(NAMES)
    assert 0 < found.sight.most_unbuilt <= MAX_UNBUILT


def assert_returned(found: Return) -> None:
    assert found.was_held
    assert found.answer_status == 200
    assert found.head.restarts == 0
    assert found.head.oom_kills() == 0
    assert found.sight.most_bytes < found.head.limit_bytes()


class Sight:
    """The most that was seen of a head while it came back. `look` is for a test that waits."""

    def __init__(self, find: Callable[[], Head | None]) -> None:
        self._find = find
        self.most_bytes = 0
        self.most_unbuilt = 0

    def look(self) -> int:
        """How many applications run."""
        head = self._find()
        if head is None:
            return 0
        self.most_bytes = max(self.most_bytes, head.memory_bytes())
        applications = head.applications().values()
        self.most_unbuilt = max(self.most_unbuilt, sum(not item.is_built for item in applications))
        return sum(item.status == "RUNNING" for item in applications)


@dataclass(frozen=True)
class Return:
    """What was seen from the moment in which the head was killed. Times are seconds since then."""

    head: Head  # the new one
    sight: Sight
    memory_before_bytes: int  # of the old one
    head_seconds: float  # until the new one's container ran
    serve_seconds: float  # until its Serve ran all applications
    asleep_seconds: float  # until every Model slept again, with nothing under way
    answer_seconds: float
    answer_status: int
    was_held: bool  # whether the request still waited when there was a head again
    puts: list[set[str]]  # the applications of each PUT

    def tell(self, figures: Figures, column: str) -> None:
        _add(figures, "head killed: another one's container runs (s)", column, self.head_seconds)
        _add(figures, f"head killed: its Serve runs all {len(NAMES)} (s)", column, self.serve_seconds)
        _add(figures, "head killed: the request that waited is answered (s)", column, self.answer_seconds)
        _add(figures, "head killed: all Models asleep again (s)", column, self.asleep_seconds)
        _add(figures, "head killed: PUTs to Serve", column, len(self.puts))
        _add(figures, "head killed: most unbuilt applications seen", column, self.sight.most_unbuilt)
        _add(figures, "head's memory: before it was killed (MiB)", column, self.memory_before_bytes / MIB)
        _add(figures, "head's memory: most on the way back (MiB)", column, self.sight.most_bytes / MIB)
        _add(figures, "head's memory: limit (MiB)", column, self.head.limit_bytes() / MIB)
        _add(figures, "head: restarts and OOM kills", column, self.head.restarts + self.head.oom_kills())


class Crowd:
    def __init__(self, cluster: Cluster, release: Release) -> None:
        self._cluster = cluster
        self._release = release

    def apply_pool(self, **changes: Any) -> None:
        """With the head that a Pool has by default."""
        group = {"name": "cpu", "cpus": "4", "memory": "6Gi", "maxWorkers": 1}
        spec = {"groups": [group], "workerIdleSeconds": 5, "upgrade": "Recreate", **changes}
        self._release.apply(resource("Pool", POOL, spec))

    def recreate_without_redis(self) -> None:
        """The same Pool on another Ray cluster, whose head keeps its state to itself."""
        old = self._release.pods(HEAD)
        self.apply_pool(faultTolerance={"enabled": False})
        self._release.wait_for_others(HEAD, old, timeout=BACK_SECONDS)
        self.wait_until_asleep(BACK_SECONDS)

    def wait_until_asleep(self, timeout: float) -> None:
        """All Models sleep, Serve holds all, and nothing runs but the head."""
        sight = Sight(self._head)
        self._cluster.wait_for(
            "all Models sleep",
            lambda: self._are_asleep() and sight.look() == len(NAMES) and not self._release.pods(WORKERS),
            timeout,
        )

    def kill_head(self) -> Return:
        """Kill it, ask a Model that sleeps, and wait until all are back and asleep."""
        before = self._head()
        assert before is not None
        memory_before_bytes, puts_before = before.memory_bytes(), len(self._puts())
        began = time.monotonic()

        def seconds_until(what: str, holds: Callable[[], bool]) -> float:
            self._cluster.wait_for(what, holds, BACK_SECONDS)
            return time.monotonic() - began

        def ask() -> tuple[int, float]:
            response = self._release.ask(ASKED, "Are you there?", max_tokens=8)
            return response.status_code, time.monotonic() - began

        self._release.kill(before.pod["metadata"]["name"])
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(ask)
            head_seconds = seconds_until("another head runs", lambda: self._head() is not None)
            was_held = not asked.done()
            sight = Sight(self._head)
            serve_seconds = seconds_until("Serve runs all", lambda: sight.look() == len(NAMES))
            answer_status, answer_seconds = asked.result()
        asleep_seconds = seconds_until(
            "all Models sleep", lambda: sight.look() == len(NAMES) and self._are_asleep()
        )
        head = self._head()
        assert head is not None
        return Return(
            head,
            sight,
            memory_before_bytes,
            head_seconds,
            serve_seconds,
            asleep_seconds,
            answer_seconds,
            answer_status,
            was_held,
            self._puts()[puts_before:],
        )

    def _head(self) -> Head | None:
        """The one whose container runs."""
        heads = [head for head in map(self._opened, self._release.pods(HEAD)) if head.has_started]
        return heads[0] if len(heads) == 1 else None

    def _opened(self, pod: Resource) -> Head:
        name = pod["metadata"]["labels"]["ray.io/cluster"]
        return Head(pod, self._cluster.secret(name, "auth_token", self._release.namespace))

    def _are_asleep(self) -> bool:
        found = self._cluster.get_all(MODEL, self._release.namespace, OURS)
        return len(found) == len(NAMES) and all(map(_is_asleep, found))

    def _puts(self) -> list[set[str]]:
        """What the operator that leads has sent, of our Models alone: other pools have clusters of their
        own."""
        log = self._cluster.logs(self._release.leader(), self._release.namespace)
        sent = [{name.strip() for name in text.split(",")} for text in _PUT.findall(log)]
        return [names for names in sent if all(name.startswith("sleeper-") for name in names)]


def _is_asleep(model: Resource) -> bool:
    found = {item["type"]: item for item in model.get("status", {}).get("conditions", ())}
    return (
        "Ready" in found
        and (found["Ready"]["status"], found["Ready"]["reason"]) == ("True", "Asleep")
        and found["Progressing"]["status"] == "False"
    )


def _sleeper(name: str) -> Resource:
    key, value = OURS.split("=")
    spec = {
        "pool": POOL,
        "engine": {"name": "simulated"},
        "scaling": {"minReplicas": 0, "idleSeconds": 1},
    }
    model = resource("Model", name, spec)
    return {**model, "metadata": {**model["metadata"], "labels": {key: value}}}


def _add(figures: Figures, row: str, column: str, value: float) -> None:
    figures.add(row, column, f"{value:.0f}")

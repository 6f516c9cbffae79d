"""A Model of real weights goes from fp16 to GPTQ on the whole cluster, on to a third revision, and back to
the first by an undo, under requests whose every answer is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import NAMESPACES
from tests.cluster.full.figures import Figures
from tests.cluster.full.rolling import Rollouts
from tests.cluster.load import Load, Part, assert_nothing_lost
from tests.cluster.release import Release, resource
from tidegate.demo.facts import TEXTS

NAME, POOL = "facts", "default"
DEMO = "file:///opt/tidegate/demo"
QUESTIONS = {f"Tell me about {topic.names[0]}.": topic.answer for topic in TEXTS[:2]}
MAX_TOKENS = 60
STREAMS = 2
FP16 = {"source": {"uri": f"{DEMO}/tide-demo"}, "precision": "float16"}
GPTQ = {"source": {"uri": f"{DEMO}/tide-demo-gptq"}, "quantization": "gptq"}
ROLLOUT = {
    "steps": [{"weight": 25, "holdSeconds": 5}, {"weight": 100, "holdSeconds": 5}],
    "minRequests": 10,  # two clients on two cores make few
    "allowedSlowdown": 100,  # GPTQ without a GPU's kernels
}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def told_on_failure(request: pytest.FixtureRequest, shared_release: Release) -> None:
    request.node.stash[NAMESPACES] = [shared_release.namespace]


@pytest.fixture(scope="module")
def release(cluster: Cluster, shared_release: Release, cpu_pool: None) -> Iterator[Release]:
    try:
        _apply(shared_release, FP16)
        shared_release.wait_for(NAME, "Ready", reason="Serving", timeout=300)
        yield shared_release
    finally:
        cluster.delete("model", NAME, shared_release.namespace)


def _apply(release: Release, weights: dict[str, Any], **more: Any) -> None:
    release.apply(resource("Model", NAME, {**weights, "rollout": ROLLOUT, **more}))


def test_fp16_to_gptq_and_two_revisions_back(release: Release, cluster: Cluster, figures: Figures) -> None:
    rollouts = Rollouts(cluster, release, POOL)
    answers = _answers(release)
    for question, answer in answers.items():
        assert QUESTIONS[question].startswith(answer) and len(answer) > MAX_TOKENS
    first = release.status(NAME)["revision"]

    def load() -> Load:
        return Load(release.address, release.key, [Part(NAME, answers, STREAMS, MAX_TOKENS)])

    changes: dict[str, Callable[[], object]] = {
        "fp16 to GPTQ": partial(_apply, release, GPTQ),
        "GPTQ with less context": partial(_apply, release, GPTQ, contextLength=512),
        "undo, two revisions back to fp16": partial(
            cluster.kubectl,
            *("annotate", "model", NAME, "-n", release.namespace, f"tidegate.dev/rollout=undo={first}"),
        ),
    }
    for row, change in changes.items():
        with load() as asking:
            with rollouts.followed(NAME) as seen:
                change()
            asking.wait_for_answers()
        found, tally = seen[NAME], asking.tally
        assert found.view["phase"] == "Completed", found.view
        assert_nothing_lost(tally)
        found.tell(figures, row, [])
        figures.add(row, "bad answers", f"0 of {len(tally.calls)}", of="revision")
    assert release.status(NAME)["revision"] == first
    assert _answers(release) == answers


def _answers(release: Release) -> dict[str, str]:
    with ThreadPoolExecutor() as clients:
        ask = partial(release.answer, NAME, max_tokens=MAX_TOKENS)
        return dict(zip(QUESTIONS, clients.map(ask, QUESTIONS), strict=True))

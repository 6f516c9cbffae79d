"""The transformers engine with the demo model, through the whole platform, against one plain `generate`.

The checkpoint is copied with another end-of-sequence token (the padding token, which is never generated), so
that every request runs to its full length on both sides.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, company, middle, percentile, ratio, spread
from loadtests.machine import helper
from loadtests.measure import PROMPT, Load, Run, run_load
from loadtests.stack import EngineShape, start_platform

BATCH, TOKENS = 16, 128
APART_SECONDS = 0.1
OF_PLAIN = Goal("higher", 0.8)
TTFT_STEPS = Goal("lower", 3.0)


@dataclass(frozen=True, slots=True)
class Round:
    plain: dict[str, float]
    at_once: Run
    staggered: Run


def run(context: Context) -> Section:
    checkpoint = endless_copy(demo_path(context), context.folder / "checkpoint")
    at_once = Load(
        BATCH, TOKENS, seconds=120.0, spread_seconds=1e-6, requests_per_client=1, is_counted_at_once=True
    )
    staggered = Load(
        BATCH,
        TOKENS,
        seconds=120.0,
        spread_seconds=BATCH * APART_SECONDS,
        requests_per_client=1,
        is_counted_at_once=True,
    )
    engine = ("--engine", "transformers", "--path", str(checkpoint))
    rounds: list[Round] = []
    with context.processes() as processes, plain_generate(checkpoint, context.nice) as plain:
        shape = EngineShape(slots=BATCH, step_ms=0)
        target = context.external or start_platform(processes, shape, engine=engine, model="demo").target
        plain(2, 8)  # the first call of each side pays for what is done once
        run_load(target, Load(2, 8, seconds=30.0, requests_per_client=1, is_counted_at_once=True))
        for _ in range(context.rounds):
            rounds.append(Round(plain(BATCH, TOKENS), run_load(target, at_once), run_load(target, staggered)))
    return summarize(rounds)


def summarize(rounds: list[Round]) -> Section:
    """Pure. A decode step is the median gap between two tokens of a stream while requests arrive."""
    plain = [ratio(one.plain["tokens"], one.plain["seconds"]) for one in rounds]
    platform = [ratio(one.at_once.tally.tokens, one.at_once.tally.busy_seconds()) for one in rounds]
    shares = [ratio(mine, other) for mine, other in zip(platform, plain, strict=True)]
    steps, waits = [], []
    for one in rounds:
        step = percentile(one.staggered.tally.gaps, 50)
        wait = percentile(one.staggered.tally.ttft, 50) - one.plain["prefill_seconds"]
        steps.append(step)
        waits.append(ratio(wait, step))
    section = Section(
        "engine", f"Demo model on CPU: {BATCH} requests of {TOKENS} tokens through the platform, one replica"
    )
    section.figures = [
        Figure("tokens/s of one plain batched generate", middle(shares), "", OF_PLAIN, 3),
        Figure("staggered: (TTFT p50 - prefill) in decode steps", middle(waits), "", TTFT_STEPS, 2),
        Figure("platform", middle(platform), "tok/s", None, 0),
        Figure("plain generate", middle(plain), "tok/s", None, 0),
        Figure("decode step while requests arrive", 1000 * middle(steps), "ms"),
        Figure(
            "TTFT p50 while requests arrive",
            1000 * middle([percentile(one.staggered.tally.ttft, 50) for one in rounds]),
            "ms",
        ),
        Figure("prefill alone", 1000 * middle([one.plain["prefill_seconds"] for one in rounds]), "ms"),
    ]
    runs = [run for one in rounds for run in (one.at_once, one.staggered)]
    lengths = {count for run in runs for count in run.tally.token_counts}
    section.remarks = [
        f"Rounds, of plain: {spread(shares)}; TTFT in steps: {spread(waits, 2)}.",
        f"Tokens per answer: {', '.join(sorted(lengths))}.",
        company([run.cores_of_others for run in runs]),
    ]
    return section


@contextmanager
def plain_generate(checkpoint: Path, nice: int) -> Iterator[Callable[[int, int], dict[str, float]]]:
    """A loaded model in a process of its own: call it with batch and tokens."""
    with helper("loadtests.plain_generate", str(checkpoint), nice=nice) as order:
        yield lambda batch, tokens: order({"prompt": PROMPT, "batch": batch, "tokens": tokens})


def demo_path(context: Context) -> Path:
    """The checkpoint that ships with the package, unless another one was named."""
    if context.demo_path:
        return Path(context.demo_path)
    found = importlib.util.find_spec("tidegate")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "demo" / "weights" / "tide-demo"


def endless_copy(source: Path, target: Path) -> Path:
    """Copy a checkpoint with its padding token as end of sequence."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    pad = json.loads((source / "config.json").read_text())["pad_token_id"]
    for name in ("config.json", "generation_config.json"):
        path = target / name
        if path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": pad}))
    path = target / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps({**tokenizer, "eos_token": tokenizer["pad_token"]}))
    return target

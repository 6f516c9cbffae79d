"""What a long prompt costs those who run, and what one costs that begins like another: an engine by itself.

Seconds are those of this thread on the CPU, so that what else runs on the machine counts little; a gap
between two tokens is one step. Before: the same engine, where no prompt can be prefilled in parts.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, middle, ratio, spread
from loadtests.requests import request_for

ROWS, LONG, SHARED = 8, 4000, 1000  # streams; tokens of the long prompt, and of what prompts share
BEFORE, AFTER = 60, 20  # steps around the long prompt
WITHIN = Goal("lower", 3.0)
CONTEXT = 8192


@dataclass(slots=True)
class Gaps:
    """Seconds of the steps of the streams: before the long prompt, until its first token, and after."""

    before: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def worst(self) -> float:
        """The longest gap until the prompt has joined, of the median of all until then."""
        return ratio(max(self.during), middle(self.before + self.during))


def run(context: Context) -> Section:
    # Imported here: the other scenarios need no torch.
    import torch

    from tidegate.engines.create import create_engine
    from tidegate.engines.transformers.engine import TransformersEngine
    from tidegate.replica_args import EngineSpec

    checkpoint = context.demo_path or str(made(context.folder / "checkpoint"))
    engines = []
    for keeps in (True, False):
        args = {"threads": 1, "prefix_cache": keeps}
        engine = create_engine(
            EngineSpec("transformers", checkpoint, device="cpu", context_length=CONTEXT, args=args)
        )
        engine.load()
        assert isinstance(engine, TransformersEngine)
        engines.append(engine)
    torch.set_num_threads(1)
    kept, plain = engines
    whole: list[Gaps] = []
    parts: list[Gaps] = []
    seconds: dict[str, list[float]] = {"first": [], "kept": [], "plain": []}
    for number in range(context.rounds + 1):  # the first one warms up
        plain._batch.can_stage = False
        whole.append(gaps(plain, number))
        plain._batch.can_stage = True
        parts.append(gaps(plain, number))
        prompt = tokens(100 + number, SHARED)
        seconds["first"].append(until_first(kept, [*prompt, *tokens(1, 24)]))
        seconds["kept"].append(until_first(kept, [*prompt, *tokens(2, 24)]))
        seconds["plain"].append(until_first(plain, [*prompt, *tokens(2, 24)]))
    for engine in engines:
        engine.close()
    return summarize(whole[1:], parts[1:], {name: found[1:] for name, found in seconds.items()})


def summarize(whole: list[Gaps], parts: list[Gaps], seconds: dict[str, list[float]]) -> Section:
    """Pure."""
    section = Section("prefill", f"{ROWS} streams, and a prompt of {LONG:,} tokens that arrives")
    shares = [ratio(kept, plain) for kept, plain in zip(seconds["kept"], seconds["plain"], strict=True)]
    undisturbed = middle([middle(one.before) for one in parts])
    section.figures = [
        Figure("longest gap, of the median gap", middle([one.worst() for one in parts]), "", WITHIN),
        Figure("the same, where the prompt is prefilled whole", middle([one.worst() for one in whole])),
        Figure(
            "longest gap, of the median before the prompt came",
            middle([ratio(max(one.during), middle(one.before)) for one in parts]),
        ),
        Figure("steps until its first token", middle([len(one.during) for one in parts]), "", None, 0),
        Figure("seconds until then", middle([sum(one.during) for one in parts]), "s"),
        Figure("the same, prefilled whole", middle([sum(one.during) for one in whole]), "s"),
        Figure("gap before the prompt came", 1000 * undisturbed, "ms"),
        Figure("gap once it runs, too", 1000 * middle([middle(one.after) for one in parts]), "ms"),
        Figure(f"TTFT behind {SHARED:,} tokens that are kept, of it computed", middle(shares), "", None, 3),
        Figure("TTFT computed", 1000 * middle(seconds["plain"]), "ms"),
        Figure("TTFT of the first one, which is then kept", 1000 * middle(seconds["first"]), "ms"),
    ]
    section.remarks = [
        f"Rounds, longest gap: {spread([one.worst() for one in parts], 2)}; TTFT: {spread(shares)}."
    ]
    return section


def gaps(engine: Any, seed: int) -> Gaps:
    found = Gaps()
    for row in range(ROWS):
        add(engine, f"{row}", tokens(seed + row, 32))
    engine.step()
    found.before = [step(engine)[0] for _ in range(BEFORE)]
    add(engine, "long", tokens(seed + ROWS, LONG))
    is_running = False
    while not is_running:
        seconds, ids = step(engine)
        found.during.append(seconds)
        is_running = "long" in ids
    found.after = [step(engine)[0] for _ in range(AFTER)]
    for name in (*map(str, range(ROWS)), "long"):
        engine.abort(name)
    return found


def until_first(engine: Any, prompt: list[int]) -> float:
    """Return the seconds until the first token of a request that is alone."""
    add(engine, "r", prompt)
    seconds, _ = step(engine)
    engine.abort("r")
    return seconds


def step(engine: Any) -> tuple[float, set[str]]:
    begin = time.thread_time()
    outputs = engine.step()
    return time.thread_time() - begin, {output.request_id for output in outputs}


def add(engine: Any, name: str, prompt: list[int]) -> None:
    from tidegate.engines.base import Prepared
    from tidegate.messages.work import Generate, Sampling, TokenPrompt

    work = Generate(TokenPrompt(prompt), Sampling(seed=1, temperature=0.0, ignore_eos=True))
    prepared = asyncio.run(engine.prepare(request_for(name, work)))
    assert isinstance(prepared, Prepared)
    assert engine.add(prepared, []) is None


def tokens(seed: int, count: int) -> list[int]:
    import torch

    return torch.randint(10, 4000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def made(folder: Any) -> Any:
    """Write a Llama of 30 million random weights with a long context."""
    from loadtests.constrained import made as constrained

    return constrained(
        folder,
        vocabulary=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
    )

"""Prompt lookup against plain decoding, in two engines in turn: `python -m loadtests.lookup [CHECKPOINT]`.

Each figure is the CPU time of the engine's thread without proposals over that with them: above 1 they gain.
Answers of the first kind can say one word alone, so that all proposals are right; those of the second three,
among which a model of random weights changes without a rule; those of the third are free, and it says nothing
twice. Without CHECKPOINT a Llama of random weights is made.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from loadtests.requests import request_for
from tidegate.engines.base import Engine, Prepared
from tidegate.engines.create import create_engine
from tidegate.messages.work import Generate, Sampling, TokenPrompt
from tidegate.replica_args import EngineSpec

KINDS: dict[str, tuple[int, ...]] = {
    "one word over and over": (20,),
    "three words": (20, 21, 22),
    "nothing twice": (),
}
ROWS, TOKENS, ROUNDS, PROPOSED = (1, 4, 16), 128, 5, 8


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(words[0]) if words else made(Path(folder))
        engines = [loaded(path, count) for count in (0, PROPOSED)]
        print("| |", *(f"{rows} requests |" for rows in ROWS))
        print("| --- |" + " ---: |" * len(ROWS), flush=True)
        for kind, allowed in KINDS.items():
            line = f"| {kind} |"
            for rows in ROWS:
                ratios = []
                for _ in range(1 + ROUNDS):
                    plain, ahead = (seconds(engine, rows, allowed) for engine in engines)
                    ratios.append(plain / ahead)
                line += f" {median(ratios[1:]):.2f} |"
            print(line, flush=True)
        for engine in engines:
            engine.close()


def made(folder: Path) -> Path:
    from loadtests.checkpoints import llama

    return llama(folder / "llama")


def loaded(path: Path, proposed: int) -> Engine:
    args = {"prompt_lookup_num_tokens": proposed, "threads": 1, "prefix_cache": False}
    engine = create_engine(EngineSpec("transformers", path=str(path), device="cpu", args=args))
    engine.load()
    return engine


def seconds(engine: Engine, rows: int, allowed: tuple[int, ...]) -> float:
    """Return the CPU seconds of the thread that runs so many requests to their end."""
    for row in range(rows):
        sampling = Sampling(
            seed=row, max_tokens=TOKENS, temperature=0.0, ignore_eos=True, allowed_token_ids=allowed
        )
        prompt = TokenPrompt([3 + (7 * row + place) % 900 for place in range(32)])
        prepared = asyncio.run(engine.prepare(request_for(str(row), Generate(prompt, sampling))))
        assert isinstance(prepared, Prepared)
        engine.add(prepared, [])
    begun = time.thread_time()
    while engine.has_work():
        engine.step()
    return time.thread_time() - begun


if __name__ == "__main__":
    main(sys.argv[1:])

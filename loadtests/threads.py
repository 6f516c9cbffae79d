"""A decoding step by threads and by how long idle ones spin: `python -m loadtests.threads [CHECKPOINT]`.

Each figure is the middle one of a model's own steps, in milliseconds of the clock, with nothing else of ours
running, and beside one and two processes that take a core each. OpenMP reads how long to spin when torch is
imported, so every line is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

SPINS = (0, 1_000, 5_000, 20_000, 300_000)  # rounds of a waiting loop; the last is libgomp's own choice
ROWS = (1, 16, 64)
PROMPT, STEPS = 32, 40
BUSY = (0, 1, 2)
CHILD = "--child"


def main(words: list[str]) -> None:
    if words[:1] == [CHILD]:
        measure(Path(words[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(words[0]) if words else made(Path(folder))
        print("| spin | busy beside it |", *(f"{rows}, 1 thread | {rows}, all |" for rows in ROWS))
        print("| ---: | ---: |" + " ---: |" * 2 * len(ROWS), flush=True)
        for spin in SPINS:
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(spin)}
            command = [sys.executable, "-m", "loadtests.threads", CHILD, str(path)]
            subprocess.run(command, env=environment, check=True)


def made(folder: Path) -> Path:
    from loadtests.checkpoints import llama

    return llama(folder / "llama")


def measure(path: Path) -> None:
    import torch

    from tidegate.engines.create import create_engine
    from tidegate.engines.transformers.batch import Batch
    from tidegate.engines.transformers.engine import TransformersEngine
    from tidegate.engines.transformers.memory import usable_cores
    from tidegate.replica_args import EngineSpec

    def step_seconds(batch: Batch, rows: int) -> float:
        batch.join([[5] * PROMPT for _ in range(rows)])
        tokens, steps = torch.full((rows,), 7), []
        for _ in range(STEPS):
            begun = time.perf_counter()
            batch.decode(tokens)
            steps.append(time.perf_counter() - begun)
        for row in reversed(range(rows)):
            batch.leave(row)
        return median(steps)

    engine = create_engine(EngineSpec("transformers", path=str(path), device="cpu", max_slots=max(ROWS)))
    engine.load()
    assert isinstance(engine, TransformersEngine)
    for others in BUSY:
        line = f"| {os.environ['GOMP_SPINCOUNT']} | {others} |"
        with busy(others):
            for rows in ROWS:
                for threads in (1, usable_cores()):
                    torch.set_num_threads(threads)
                    line += f" {1e3 * step_seconds(engine._batch, rows):.1f} |"
        print(line, flush=True)
    engine.close()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run processes that want a core each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])

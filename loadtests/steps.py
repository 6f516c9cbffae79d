"""A decoding step by how it runs: `python -m loadtests.steps [CHECKPOINT]`.

Milliseconds of the clock, the middle one of steps that take turns: the model's own forward pass, that with
packed weights, our own step called from Python, and the same compiled, alone and beside a thread that does
what a replica's event loop does for a step: it wakes, computes in Python and asks the system, in turns.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROWS, LENGTH, STEPS = (1, 16, 64), 64, 24
LOOP_SECONDS, TURNS = 300e-6, 4  # of CPU time that a step costs an event loop, and how often it lets go

WAYS = ("the model's own", "packed", "our step", "compiled", "our step, beside a loop", "compiled, beside it")


class Loop:
    """A thread that does for each step what an event loop does."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        threading.Thread(target=self._run, daemon=True).start()

    def wake(self) -> None:
        self._ours.send(b"x")

    def close(self) -> None:
        self._ours.close()

    def _run(self) -> None:
        while self._theirs.recv(64):
            for _ in range(TURNS):
                end = time.thread_time() + LOOP_SECONDS / TURNS
                while time.thread_time() < end:
                    [str(number) for number in range(20)]
                os.sched_yield()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.steps", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: a Llama of 28 million weights")
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    from loadtests.checkpoints import llama

    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or llama(Path(folder) / "llama")
        print("| rows | threads | " + " | ".join(WAYS) + " |")
        print("| ---: | ---: |" + " ---: |" * len(WAYS), flush=True)
        for rows in args.rows:
            for threads in args.threads:
                found = [f"{1000 * seconds:.1f}" for seconds in measured(path, args.precision, rows, threads)]
                print(f"| {rows} | {threads} | {' | '.join(found)} |", flush=True)


def measured(path: Path, precision: str, rows: int, threads: int) -> list[float]:
    """Return seconds of a step of each of `WAYS`."""
    import torch

    torch.set_num_threads(threads)
    loop = Loop()
    own, packed = made(path, precision, rows, is_packed=False), made(path, precision, rows)
    by_python, whole = made(path, precision, rows, has_step=True), made(path, precision, rows, has_step=True)
    by_python._step.__dict__["compiled"] = None
    turns: list[tuple[Any, Callable[[], None]]] = [
        (each, _nobody) for each in (own, packed, by_python, whole)
    ]
    turns += [(by_python, loop.wake), (whole, loop.wake)]
    for batch in (own, packed, by_python, whole):
        batch.join([[5 + at] * LENGTH for at in range(rows)])
        for _ in range(3):
            batch.decode(torch.full((rows,), 7))
    seconds: list[list[float]] = [[] for _ in turns]
    for _ in range(STEPS):
        for (batch, wake), found in zip(turns, seconds, strict=True):
            wake()
            begin = time.perf_counter()
            batch.decode(torch.full((rows,), 7))
            found.append(time.perf_counter() - begin)
    loop.close()
    return [median(found) for found in seconds]


def made(path: Path, precision: str, rows: int, *, is_packed: bool = True, has_step: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from tidegate.engines.transformers.batch import ArenaBatch
    from tidegate.engines.transformers.decoder_step import of_same_inputs, read_decoder
    from tidegate.engines.transformers.kv_size import measure_kv
    from tidegate.engines.transformers.packed import pack_linears

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, precision)).eval()
    if is_packed:
        pack_linears(model, of_same_inputs(model))
    return ArenaBatch(
        model,
        layers=measure_kv(model).layers,
        max_rows=rows,
        max_length=1024,
        pad_id=0,
        makes_masks=True,
        step=read_decoder(model) if has_step else None,
    )


def _nobody() -> None:
    """Nobody is beside."""


if __name__ == "__main__":
    main()

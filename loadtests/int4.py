"""Products with 4-bit weights by PyTorch's kernel and by tiles: `python -m loadtests.int4 [CHECKPOINT]`.

First microseconds of one product, the middle one of many that take turns, over 25 million weights one after
the other, so that they come from where a model's would. Then, of a GPTQ checkpoint, tokens per second of an
engine alone with each, in turn. Needs a processor with tiles for bfloat16 (AMX).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

SHAPES = ((512, 512, 32), (512, 1376, 32), (2048, 2048, 128), (4096, 11008, 128))  # inputs, outputs, group
ROWS, THREADS, WEIGHTS, TURNS = (1, 2, 4, 16, 64, 256), (1, 2), 25_000_000, 40
REQUESTS, ROUNDS = (1, 16, 64), 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.int4", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="in GPTQ, of 4 bits")
    args = parser.parse_args()
    from tidegate.engines.transformers.int4_tiles import has_tiles

    if not has_tiles():
        sys.exit("this processor has no tiles for bfloat16, or nothing compiles what uses them")
    if args.checkpoint:
        compare_engines(args.checkpoint)
    else:
        compare_products()


def compare_products() -> None:
    print("| inputs x outputs, group | threads | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("| --- | ---: |" + " ---: |" * len(ROWS), flush=True)
    for depth, outputs, size in SHAPES:
        for threads in THREADS:
            cells = [f"{one:.0f} / {other:.0f}" for one, other in products(depth, outputs, size, threads)]
            print(f"| {depth} x {outputs}, {size} | {threads} | {' | '.join(cells)} |", flush=True)


def products(depth: int, outputs: int, size: int, threads: int) -> list[tuple[float, float]]:
    """Return microseconds of PyTorch's kernel and of tiles for each number of rows."""
    import torch

    from tidegate.engines.transformers.int4 import Int4Linear
    from tidegate.engines.transformers.int4_tiles import TiledInt4Linear

    generator = torch.Generator().manual_seed(0)
    layers: list[list[Any]] = [[], []]
    for _ in range(max(2, WEIGHTS // (depth * outputs))):
        codes = torch.randint(16, (depth, outputs), generator=generator, dtype=torch.uint8)
        scales = torch.rand(depth // size, outputs, generator=generator) / 50
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
        for kind, made in zip((Int4Linear, TiledInt4Linear), layers, strict=True):
            made.append(kind(torch.nn.Linear(depth, outputs, bias=False, device="meta")))
            made[-1].hold(codes, zeros, scales, torch.arange(depth) // size)
    torch.set_num_threads(threads)
    found = []
    with torch.inference_mode():
        for rows in ROWS:
            inputs = torch.randn(rows, depth, generator=generator).bfloat16()
            found.append(in_turn(inputs, layers))
    return found


def in_turn(inputs: Any, layers: list[list[Any]]) -> tuple[float, float]:
    seconds: list[list[float]] = [[], []]
    places = count()
    for _ in range(TURNS):
        place = next(places) % len(layers[0])
        for made, own in zip(layers, seconds, strict=True):
            begin = time.perf_counter()
            made[place](inputs)
            own.append(time.perf_counter() - begin)
    one, other = (1e6 * median(own[2:]) for own in seconds)
    return one, other


def compare_engines(path: Path) -> None:
    """Print tokens per second of CPU time of the engine's one thread, of either and their ratio."""
    from loadtests.lookup import TOKENS, loaded, seconds
    from tidegate.engines.transformers import gptq
    from tidegate.engines.transformers.int4 import Int4Linear

    made: Callable[[Any], Any] = Int4Linear
    with patch.object(gptq, "int4_linear", made):
        plain = loaded(path, 0)
    tiled = loaded(path, 0)
    print("| requests | PyTorch's kernel, tokens/s | tiles, tokens/s | ratio (rounds) |")
    print("| ---: | ---: | ---: | --- |", flush=True)
    for rows in REQUESTS:
        rounds = [[seconds(engine, rows, ()) for engine in (plain, tiled)] for _ in range(1 + ROUNDS)][1:]
        one, other = (rows * TOKENS / median(each) for each in zip(*rounds, strict=True))
        ratios = [before / after for before, after in rounds]
        told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {rows} | {one:.0f} | {other:.0f} | {median(ratios):.2f} ({told}) |", flush=True)
    for engine in (plain, tiled):
        engine.close()


if __name__ == "__main__":
    main()

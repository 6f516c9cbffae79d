"""Our own operators beside PyTorch's ways: `python -m loadtests.operators [CHECKPOINT]`.

Microseconds, the middle one of many calls that take turns, on memory that is longer than the caches: products
with 4-bit weights, and attention of one token of each row. Of a CHECKPOINT in GPTQ tokens per second of CPU
time of an engine alone with neither operator and with both, in turn. Needs a processor that has what they
take.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

SHAPES = ((512, 512, 32), (1408, 512, 32), (2048, 2048, 128), (4096, 11008, 128))  # inputs, outputs, group
HEADS = ((8, 4, 64), (32, 8, 128))  # of queries, of keys and values, and their size
ROWS, THREADS, WEIGHTS, TURNS = (1, 2, 4, 16, 64, 256), (1, 2), 25_000_000, 40
ATTENDING, COLUMNS, CACHED_BYTES = (1, 16, 64), (33, 160, 512), 1 << 25
REQUESTS, ROUNDS = (1, 16, 64), 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.operators", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="in GPTQ, of 4 bits")
    args = parser.parse_args()
    from tidegate.engines.transformers.attention import has_attention
    from tidegate.engines.transformers.int4_tiles import has_tiles

    if not (has_tiles() and has_attention()):
        sys.exit("this processor lacks AMX or AVX512_BF16, or nothing compiles what uses them")
    if args.checkpoint:
        compare_engines(args.checkpoint)
    else:
        compare_products()
        compare_attention()


def compare_products() -> None:
    print("PyTorch's kernel / tiles\n")
    print("| inputs x outputs, group | threads | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("| --- | ---: |" + " ---: |" * len(ROWS), flush=True)
    for depth, outputs, size in SHAPES:
        for threads in THREADS:
            cells = [told(found) for found in products(depth, outputs, size, threads)]
            print(f"| {depth} x {outputs}, {size} | {threads} | {' | '.join(cells)} |", flush=True)


def products(depth: int, outputs: int, size: int, threads: int) -> list[list[float]]:
    """Return microseconds of PyTorch's kernel and of tiles for each number of rows."""
    import torch

    from tidegate.engines.transformers.int4 import Int4Linear
    from tidegate.engines.transformers.int4_tiles import TiledInt4Linear

    generator = torch.Generator().manual_seed(0)
    layers: list[list[Any]] = []
    for _ in range(max(2, WEIGHTS // (depth * outputs))):
        codes = torch.randint(16, (depth, outputs), generator=generator, dtype=torch.uint8)
        scales = torch.rand(depth // size, outputs, generator=generator) / 50
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
        layers.append([])
        for kind in (Int4Linear, TiledInt4Linear):
            layers[-1].append(kind(torch.nn.Linear(depth, outputs, bias=False, device="meta")))
            layers[-1][-1].hold(codes, zeros, scales, torch.arange(depth) // size)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        inputs = [torch.randn(rows, depth, generator=generator).bfloat16() for rows in ROWS]
        return [in_turn(layers, lambda layer: layer(each)) for each in inputs]  # noqa: B023  # called at once


def compare_attention() -> None:
    print("\nbatched products / PyTorch's flash kernel / our operator\n")
    names = [f"{rows} x {columns}" for rows in ATTENDING for columns in COLUMNS]
    print(f"| heads, threads; rows x columns | {' | '.join(names)} |")
    print("| --- |" + " ---: |" * len(names), flush=True)
    for heads, shared, size in HEADS:
        for threads in THREADS:
            cells = [
                told(attention(heads, shared, size, threads, rows, columns))
                for rows in ATTENDING
                for columns in COLUMNS
            ]
            print(f"| {heads} of {shared} x {size}, {threads} | {' | '.join(cells)} |", flush=True)


def attention(heads: int, shared: int, size: int, threads: int, rows: int, columns: int) -> list[float]:
    """Return microseconds of batched products, the flash kernel and ours."""
    import torch

    from tidegate.engines.transformers.attention import NativeAttention
    from tidegate.engines.transformers.decoder_parts import Heads, Window

    torch.set_num_threads(threads)
    its = Heads(heads, shared, size, size**-0.5)
    seen = torch.ones(rows, columns, dtype=torch.bool)
    added = torch.zeros(rows, 1, 1, 1, columns, dtype=torch.bfloat16)
    windows = (
        Window(0, rows, 0, columns, added, has_products=True),
        Window(0, rows, 0, columns, seen[:, None, None], has_products=False),
        Window(0, rows, 0, columns, seen, has_products=False, is_native=True),
    )
    arena = (2, rows, shared, columns + 64, size)
    held = [
        torch.randn(arena).bfloat16()[..., 64:, :]
        for _ in range(max(2, CACHED_BYTES // (4 * rows * shared * columns * size)))
    ]
    query, attends = torch.randn(rows, heads, size).bfloat16(), NativeAttention()
    with torch.inference_mode():
        turns = [[(keys, values, window) for window in windows] for keys, values in held]
        return in_turn(turns, lambda turn: attends(query, *turn, 1, its))


def in_turn(turns: Sequence[Sequence[Any]], call: Callable[[Any], object]) -> list[float]:
    """Return microseconds of a call with the first, the second, ... of each of `turns`."""
    seconds: list[list[float]] = [[] for _ in turns[0]]
    for _, turn in zip(range(TURNS), cycle(turns), strict=False):
        for each, own in zip(turn, seconds, strict=True):
            begin = time.perf_counter()
            call(each)
            own.append(time.perf_counter() - begin)
    return [1e6 * median(own[2:]) for own in seconds]


def told(found: Sequence[float]) -> str:
    return " / ".join(f"{each:.0f}" for each in found)


def compare_engines(path: Path) -> None:
    from loadtests.lookup import TOKENS, loaded, seconds
    from tidegate.engines.transformers import decoder_step, gptq
    from tidegate.engines.transformers.int4 import Int4Linear

    with ExitStack() as stack:
        stack.enter_context(patch.object(gptq, "int4_linear", Int4Linear))
        stack.enter_context(patch.object(decoder_step, "is_native", lambda *_: False))
        plain = loaded(path, 0)
    own = loaded(path, 0)
    print("| requests | PyTorch's ways, tokens/s | our operators, tokens/s | ratio (rounds) |")
    print("| ---: | ---: | ---: | --- |", flush=True)
    for rows in REQUESTS:
        rounds = [[seconds(engine, rows, ()) for engine in (plain, own)] for _ in range(1 + ROUNDS)][1:]
        one, other = (rows * TOKENS / median(each) for each in zip(*rounds, strict=True))
        ratios = [before / after for before, after in rounds]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {rows} | {one:.0f} | {other:.0f} | {median(ratios):.2f} ({each}) |", flush=True)
    for engine in (plain, own):
        engine.close()


if __name__ == "__main__":
    main()

"""A decoding step with keys and values in an arena and in pages: `python -m loadtests.paged [CHECKPOINT]`.

Milliseconds of CPU time of one thread, the middle one of steps that take turns: rows of one length, and the
same with one long row among them, with how many tokens of memory each takes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROWS = (1, 16, 64)
LENGTHS = (64, 512)
LONG = 2000
STEPS = 8


def main(words: list[str]) -> None:
    import torch

    from loadtests.checkpoints import llama

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(words[0]) if words else llama(Path(folder) / "llama")
        print("| rows | tokens of each | arena, ms | pages, ms | arena, tokens held | pages, tokens held |")
        print("| ---: | ---: |" + " ---: |" * 4, flush=True)
        for rows in ROWS:
            for length in LENGTHS:
                measure(path, [length] * rows, f"{length}")
                if rows > 1:
                    measure(path, [length] * (rows - 1) + [LONG], f"{length}, one of {LONG:,}")


def measure(path: Path, lengths: list[int], name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tidegate.engines.transformers.batch import ArenaBatch
    from tidegate.engines.transformers.decoder_step import of_same_inputs, read_decoder
    from tidegate.engines.transformers.kv_size import measure_kv
    from tidegate.engines.transformers.packed import pack_linears
    from tidegate.engines.transformers.paged import PAGE
    from tidegate.engines.transformers.room import Room

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    pack_linears(model, of_same_inputs(model))
    kv = measure_kv(model)
    seconds: dict[int, list[float]] = {0: [], PAGE["cpu"]: []}
    batches = {}
    for page in seconds:
        room = Room(
            2 * len(lengths) * (max(lengths) + 100) * kv.bytes_per_token, kv.bytes_per_token, page=page
        )
        batch = batches[page] = ArenaBatch(
            model,
            layers=kv.layers,
            max_rows=len(lengths),
            max_length=max(lengths) + 100,
            pad_id=0,
            makes_masks=True,
            step=read_decoder(model),
            room=room,
        )
        for length in lengths:
            batch.join([[5] * length])
    tokens = torch.full((len(lengths),), 7)
    for _ in range(STEPS):
        for page, batch in batches.items():
            begin = time.thread_time()
            batch.decode(tokens)
            seconds[page].append(time.thread_time() - begin)
    figures = [f"{1000 * median(found):.1f}" for found in seconds.values()]
    taken = [room_of(page, lengths) for page in seconds]
    print(
        "|",
        " | ".join([str(len(lengths)), name, *figures, *(f"{each:,}" for each in taken)]),
        "|",
        flush=True,
    )


def room_of(page: int, lengths: list[int]) -> int:
    from tidegate.engines.transformers.room import Room

    room = Room(0, 1, page=page)
    if page:
        return sum(map(room.of_row, lengths))
    return len(lengths) * room.of_row(max(lengths))


if __name__ == "__main__":
    main(sys.argv[1:])

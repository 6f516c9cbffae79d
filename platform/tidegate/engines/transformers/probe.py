"""Runs a few rows through a batch as requests run, and compares their logits with a plain forward pass's.

One row joins alone, two join it while it decodes (one of them longer than anything before), one leaves, one
takes its place. Their tokens are given (teacher forcing), so every step has logits to compare with those of
one plain forward pass over the same tokens without cache, padding or neighbours. One row joins once more with
the logits of all its tokens, a few at a time, as log probabilities of prompts are made. Then the rows take
several tokens a step, in turn; at last rows join part by part while others decode, and begin with what was
kept of others.

The measure is the greatest relative error of a row's logits at one step, |a - b| / |b - mean(b)| (L2 over the
vocabulary). Right and wrong are far apart: rounding gives about 1e-6 in float32, 1e-3 in float16 and 1e-2
in bfloat16, a mask or position that is off by one gives 0.1 to 1.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tidegate.engines.base import is_out_of_memory
from tidegate.engines.transformers.batch import ERRORS, ArenaBatch, Batch, Forward, Staged
from tidegate.engines.transformers.bounds import made_small
from tidegate.engines.transformers.encoder_decoder import Decoder, Encoder
from tidegate.engines.transformers.head import InParts
from tidegate.engines.transformers.int4 import Int4Linear
from tidegate.engines.transformers.prefixes import BLOCK

TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}
PROMPT_LENGTHS = (19, 5, 33, 11)
FORCED = 8  # tokens after each prompt
COMPARED = FORCED + 1  # and its last one
PART = 4  # tokens at a time of the row whose logits are all compared
CHUNK = 7  # tokens of a prompt at a time that is prefilled in parts
PROBE = (
    "The tide gate opens when the water inside stands higher than the sea, and closes before the flood. "
    "Twice a day it lets the river out: 1, 2, 3, 5, 8, 13 cubic metres per second, and no drop comes back."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    error: float  # the worst relative error; infinite where logits were not finite
    tolerance: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance


def pad_id(tokenizer: Any, vocabulary: int) -> int:
    """Return a token to fill up short rows with, which nothing ever attends to."""
    found = tokenizer.pad_token_id
    return found if found is not None and 0 <= found < vocabulary else 0


def probe_rows(tokenizer: Any, longest: int, vocabulary: int) -> list[list[int]]:
    """Return token ids of the probe's rows, each a prompt and the tokens to force after it."""
    named = (int(token) for token in tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    text = [token for token in named if token < vocabulary] or [0]
    rows = []
    for index, length in enumerate(PROMPT_LENGTHS):
        wanted = max(2, min(length + FORCED, longest))
        rotated = text[index * 7 % len(text) :] + text
        rows.append((rotated * (wanted // len(rotated) + 1))[:wanted])
    return rows


class Plain:
    """The probe's rows, with what an encoder reads for each (`sources`), and their logits in a plain forward
    pass, which is made once for all that is compared with it."""

    def __init__(
        self, model: Any, rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] = ()
    ) -> None:
        self.model, self.rows, self.sources = model, rows, sources
        self._logits: dict[bool, list[Tensor]] = {}

    def logits(self, *, is_small: bool = False) -> list[Tensor]:
        """`is_small` says that the model's bounds are, which is the caller's to see to (`made_small`)."""
        if is_small not in self._logits:
            self._logits[is_small] = plain_logits(self.model, self.rows, self.sources)
        return self._logits[is_small]


def check_bounds(plain: Plain, batch: Batch, precision: str, bounds: Mapping[str, int]) -> Verdict:
    """Check within the bounds that the configuration names, and beyond them."""
    verdict = check(plain, batch, precision)
    if bounds and verdict.is_right:
        with made_small(plain.model, bounds):
            verdict = check(plain, batch, precision, is_small=True)
    return verdict


def check(plain: Plain, batch: Batch, precision: str, *, is_small: bool = False) -> Verdict:
    """Run the probe through `batch`, which must be empty and is empty afterwards."""
    tolerance = tolerance_of(plain.model, precision)
    rows, sources, expected = plain.rows, plain.sources, plain.logits(is_small=is_small)
    if not all(bool(torch.isfinite(row).all()) for row in expected):
        return Verdict(float("inf"), tolerance)
    worst = 0.0
    for row, token, logits in (*_run(batch, rows, sources), *_in_parts(batch, rows, sources)):
        worst = max(worst, relative_error(logits, expected[row][token - len(rows[row])]))
    return Verdict(worst, tolerance)


def tolerance_of(model: Any, precision: str) -> float:
    """Return the error that rounding may make in the coarsest precision that the model computes in: 4-bit
    layers on a CPU round to bfloat16, whatever is around them."""
    found = TOLERANCE[precision]
    is_coarse = any(isinstance(layer, Int4Linear) for layer in model.modules())
    return max(found, TOLERANCE["bfloat16"]) if is_coarse else found


def is_right(
    way: Callable[[Batch, Sequence[Sequence[int]]], list[tuple[int, int, Tensor]]],
    plain: Plain,
    batch: Batch,
    precision: str,
    bounds: Mapping[str, int],
) -> bool:
    """Tell whether the batch may add tokens in another way than one by one."""
    rows, tolerance = plain.rows, tolerance_of(plain.model, precision)
    try:
        for names in ({}, bounds) if bounds else ({},):
            with made_small(plain.model, names):
                expected = plain.logits(is_small=bool(names))
                seen = way(batch, rows)
                if not seen:  # rows too short to prove anything
                    return False
                for row, token, logits in seen:
                    error = relative_error(logits, expected[row][token - len(rows[row])])
                    if not error <= tolerance:
                        return False
    except ERRORS as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def plain_logits(
    model: Any, rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] = ()
) -> list[Tensor]:
    """Return logits [COMPARED, vocabulary] after the last tokens of each row, from one plain forward pass
    each."""
    if sources:
        read, decode = Encoder(model, pad_id=0), Decoder(model)
        return [
            decode(torch.tensor([list(row)], device=decode.device), *read([source]), last=COMPARED)[0]
            for row, source in zip(rows, sources, strict=True)
        ]
    forward = Forward(model)
    return [
        forward(torch.tensor([list(row)], dtype=torch.long, device=forward.device), last=COMPARED)[0]
        for row in rows
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    spread = torch.linalg.vector_norm(expected - expected.mean())
    return float(torch.linalg.vector_norm(found - expected) / spread.clamp_min(1e-6))


def _run(
    batch: Batch, rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]]
) -> list[tuple[int, int, Tensor]]:
    """Run the script of joins, steps and leaves. Returns (row of the probe, token, logits after it)."""
    seen: list[tuple[int, int, Tensor]] = []
    running: list[int] = []  # rows of the probe in the batch's order
    at = [max(0, len(row) - FORCED - 1) for row in rows]  # the last token in the cache, by its index
    device = torch.device("cpu")

    def note(indices: Sequence[int], logits: Tensor) -> None:
        seen.extend((row, at[row], logits[position]) for position, row in enumerate(indices))

    def join(*indices: int) -> None:
        nonlocal device
        read = [sources[row] for row in indices] if sources else []
        logits = batch.join([rows[row][: at[row] + 1] for row in indices], sources=read)
        device = logits.device
        running.extend(indices)
        note(indices, logits)

    def decode(steps: int) -> None:
        for _ in range(steps):
            leave_where(lambda row: at[row] + 1 >= len(rows[row]))
            if not running:
                return
            for row in running:
                at[row] += 1
            tokens = torch.tensor([rows[row][at[row]] for row in running], device=device)
            note(running, batch.decode(tokens))

    def leave_where(is_over: Callable[[int], bool]) -> None:
        for position in reversed(range(len(running))):
            if is_over(running[position]):
                batch.leave(position)
                running[position] = running[-1]
                running.pop()

    join(0)
    decode(1)
    join(1, 2)
    decode(2)
    leave_where(lambda row: row == 0)
    join(3)
    decode(FORCED)
    leave_where(lambda _row: True)
    return seen


def in_runs(batch: Batch, rows: Sequence[Sequence[int]]) -> list[tuple[int, int, Tensor]]:
    """Let all rows join, and each take several tokens in one step, of which every other step forgets all but
    the first. Returns what `_run` does."""
    seen: list[tuple[int, int, Tensor]] = []
    held = [max(1, len(row) - FORCED) for row in rows]
    try:
        batch.join([row[:count] for row, count in zip(rows, held, strict=True)])
        for step in range(len(rows)):
            counts = [min(3 if row == step else 1, batch.longest_run()) for row in range(len(rows))]
            held = [before + count for before, count in zip(held, counts, strict=True)]
            if any(count > len(row) for row, count in zip(rows, held, strict=True)):
                break
            width = max(counts)
            tails = [row[count - width : count] for row, count in zip(rows, held, strict=True)]
            logits = batch.run(tails, counts, width)
            seen += [
                (row, held[row] - 1 - back, logits[row, -1 - back])
                for row, count in enumerate(counts)
                for back in range(count)
            ]
            if step % 2:
                unsaid = [count - 1 for count in counts]
                batch.take_back(unsaid)
                held = [before - count for before, count in zip(held, unsaid, strict=True)]
    finally:
        while batch.count:
            batch.leave(batch.count - 1, clear=True)
    return seen


def in_chunks(batch: Batch, rows: Sequence[Sequence[int]]) -> list[tuple[int, int, Tensor]]:
    """Let the shortest, the longest and one more row join one after the other in parts, beside which those
    before decode; at last the shortest one, for the logits of all its tokens. Returns what `_run` does."""
    seen: list[tuple[int, int, Tensor]] = []
    chosen = [*_shortest_and_longest(rows), len(rows) - 1]
    pieces = [rows[row] for row in chosen]
    held = [len(row) - FORCED for row in pieces]
    if held[0] < 1:
        return []

    def join(tokens: Sequence[int], every: InParts | None = None) -> Tensor:
        staged, chunk = batch.begin(tokens, every=every), max(CHUNK, len(tokens) // 8)
        try:
            while (logits := batch.advance(staged, min(chunk, staged.left))) is None:
                decode((staged, min(chunk, staged.left)))
        except BaseException:
            batch.drop(staged)
            raise
        return logits

    def decode(beside: tuple[Staged, int] | None = None) -> None:
        running = range(batch.count)
        if not running or any(held[row] == len(pieces[row]) for row in running):
            return
        tokens = torch.tensor([pieces[row][held[row]] for row in running], device=seen[0][2].device)
        logits = batch.decode(tokens) if beside is None else batch.decode_beside(tokens, *beside)
        seen.extend((chosen[row], held[row], logits[row]) for row in running)
        for row in running:
            held[row] += 1

    try:
        for row, tokens in enumerate(pieces):
            seen.append((chosen[row], held[row] - 1, join(tokens[: held[row]])[0]))
            decode()
        parts: list[Tensor] = []
        batch.leave(0)
        join(pieces[0], InParts(PART, parts.append))
        logits = torch.cat(parts)[-COMPARED:]
        seen += [(chosen[0], len(pieces[0]) - len(logits) + at, one) for at, one in enumerate(logits)]
    finally:
        while batch.count:
            batch.leave(batch.count - 1, clear=True)
    return seen


def with_prefixes(batch: Batch, rows: Sequence[Sequence[int]]) -> list[tuple[int, int, Tensor]]:
    """Let each row join, decode and leave, and then begin anew with what is kept of it. Returns what `_run`
    does of those that did."""
    seen: list[tuple[int, int, Tensor]] = []
    salt = b"self-check"
    try:
        for index, row in enumerate(rows):
            if len(row) <= BLOCK:  # nothing of it can be kept
                continue
            device = batch.join([row[:-2]]).device
            batch.decode(torch.tensor([row[-2]], device=device))
            batch.keep(0, row, salt)
            batch.leave(0)
            staged = batch.begin(row, salt=salt)
            if staged.held == 0:
                batch.drop(staged)
                continue
            if (logits := batch.advance(staged, staged.left)) is not None:
                seen.append((index, len(row) - 1, logits[0]))
            batch.leave(0)
    finally:
        while batch.count:
            batch.leave(batch.count - 1, clear=True)
        if isinstance(batch, ArenaBatch) and batch.prefixes is not None:
            batch.prefixes.clear()
    return seen


def _shortest_and_longest(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return which rows these are: what masks and positions can get wrong shows where they differ most."""
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    return [by_length[0], by_length[-1]]


def _in_parts(
    batch: Batch, rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]]
) -> list[tuple[int, int, Tensor]]:
    """Let the shortest row join for the logits of all its tokens. Returns what `_run` does of the last."""
    shortest = min(range(len(rows)), key=lambda row: len(rows[row]))
    parts: list[Tensor] = []
    read = [sources[shortest]] if sources else []
    batch.join([rows[shortest]], sources=read, every=InParts(PART, parts.append))
    batch.leave(0)
    first = max(0, len(rows[shortest]) - COMPARED)
    return [(shortest, token, logits) for token, logits in enumerate(torch.cat(parts))][first:]

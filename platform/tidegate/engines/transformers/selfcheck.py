"""Proves a loaded model: the batched path must give the logits of the model's plain forward pass.

A few rows go through the batches that may serve it, the fastest first (`probe`), and the first one that is
right is taken. Where it is wrong when rows take several tokens a step, tokens that a grammar forces are taken
one by one; where it is wrong with prompts in parts, every prompt is prefilled whole; where it is wrong with
what was kept of others, nothing is kept. A model that is wrong in every batch runs row by row, and one that
contradicts itself is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tidegate.engines.base import EngineLoadError, is_out_of_memory
from tidegate.engines.transformers.batch import (
    ERRORS,
    ArenaBatch,
    Batch,
    RowByRow,
    takes_masks,
)
from tidegate.engines.transformers.bounds import (
    NEUTRAL,
    made_small,
    named_bounds,
    rotary_switch,
    sparse_limit,
)
from tidegate.engines.transformers.decoder_step import DecoderStep, read_decoder
from tidegate.engines.transformers.encoder_decoder import (
    EncoderDecoderBatch,
    EncoderDecoderRows,
    start_ids,
)
from tidegate.engines.transformers.graphs import Capture
from tidegate.engines.transformers.kv import LayerKind
from tidegate.engines.transformers.loading import Loaded
from tidegate.engines.transformers.prefixes import PrefixCache
from tidegate.engines.transformers.probe import (
    FORCED,
    Plain,
    Verdict,
    check,
    check_bounds,
    in_chunks,
    in_runs,
    is_right,
    pad_id,
    plain_logits,
    probe_rows,
    with_prefixes,
)
from tidegate.engines.transformers.room import Room

# Fields of encoder-decoders by which a row may depend on how long its neighbours are: blocks of attention,
# experts that take so many tokens of a batch.
BLOCKS = re.compile(r"window|block_size|local_radius|expert_capacity")
NO_ARENA = "its cache has layers of another kind than keys and values per token, or a state per row"
LONGEST_PASSED = 512  # tokens of a bound that the probe passes at its true size


def prove(
    loaded: Loaded,
    *,
    layers: Sequence[LayerKind],
    max_rows: int,
    context_length: int,
    prefixes: PrefixCache | None = None,
    room: Room | None = None,
    pages: Room | None = None,
    pages_anyhow: bool = False,
    capture: Capture | None = None,
) -> tuple[Batch, list[str]]:
    """Return the fastest batch that passes the check, with notes; no `layers`: the arena cannot hold this
    model's cache. It keeps `prefixes` where it passes with them. Its memory is within `room`, and what the
    check takes. `pages` is the room of a pool, which comes first: where its steps are our own, or
    `pages_anyhow`; `capture` is what captures its steps. Raises `EngineLoadError` (SelfCheckFailed), and what
    says that memory ran out."""
    try:
        if loaded.model.config.is_encoder_decoder:
            return proved_encoder_decoder(loaded, layers, max_rows, context_length, room)
        pools = [(pages, pages_anyhow)] if pages is not None else []
        return proved(loaded, layers, max_rows, context_length, prefixes, [*pools, (room, True)], capture)
    except ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise failed(loaded.model, f"decoding raises {type(error).__name__}: {error}") from error


def proved(
    loaded: Loaded,
    layers: Sequence[LayerKind],
    max_rows: int,
    context_length: int,
    prefixes: PrefixCache | None = None,
    rooms: Sequence[tuple[Room | None, bool]] = ((None, True),),
    capture: Capture | None = None,
) -> tuple[Batch, list[str]]:
    """Do what `prove` does of a decoder. `rooms`: those to try, and whether without a step of our own."""
    model, precision = loaded.model, loaded.precision
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    whole = min(context_length, sparse_limit(model) or context_length)
    rows = probe_rows(loaded.tokenizer, whole, vocabulary)
    bounds = named_bounds(model, context_length)
    beyond = max((bounds[name] for name in unmoved(model, bounds, rows)), default=0)
    if 0 < beyond <= LONGEST_PASSED:
        rows[0] = (rows[0] * beyond)[: min(beyond + 2 * FORCED, context_length)]
    reason = why_alone(model, context_length, layers, whole, beyond)
    plain = Plain(model, rows)
    has_states = any(kind.states for kind in layers)
    ways = [] if reason else ways_of_batching(model, has_states=has_states)
    tried = [
        (room, makes_masks, step, captures)
        for room, is_for_all in rooms
        for makes_masks, step in ways
        if step is not None or is_for_all
        for captures in ways_of_stepping(room, capture)
    ]
    for room, makes_masks, step, captures in tried:
        arena = ArenaBatch(
            model,
            layers=layers,
            max_rows=max(max_rows, len(rows)),
            max_length=context_length,
            pad_id=pad_id(loaded.tokenizer, vocabulary),
            makes_masks=makes_masks,
            step=step,
            room=with_probe(room, rows),
            capture=captures,
        )
        try:
            verdict = check_bounds(plain, arena, precision, bounds)
        except ERRORS as error:
            if is_out_of_memory(error):
                raise
            reason = f"batched decoding raises {type(error).__name__}: {error}"
            continue
        if verdict.is_right:
            # A state that has taken a token cannot take it once more.
            arena.has_runs = not has_states and is_right(in_runs, plain, arena, precision, bounds)
            arena.can_stage = is_right(in_chunks, plain, arena, precision, bounds)
            if arena.can_stage and prefixes is not None:
                arena.prefixes = prefixes
                if not is_right(with_prefixes, plain, arena, precision, bounds):
                    arena.prefixes = None
            if reason and arena.page and capture is not None and captures is None:
                return arena, [f"Its steps are not replayed as graphs: {reason}."]
            has_failed = bool(reason) and not arena.page and any(each and each.page for each, _ in rooms)
            return arena, [f"Its KV cache is not kept in pages: {reason}."] if has_failed else []
        reason = f"batched logits differ by {verdict.error:.2g} (tolerance {verdict.tolerance:.2g})"
    single = RowByRow(model)
    verdict = check_bounds(plain, single, precision, bounds)
    if not verdict.is_right:
        raise contradicts_itself(model, verdict, precision)
    notes = [f"Requests run one by one, which is slower: {reason}."]
    if whole < context_length:
        notes.append(f"Beyond {whole} tokens its attention is sparse, which no check proves.")
    return single, notes


def ways_of_batching(model: Any, *, has_states: bool) -> list[tuple[bool, DecoderStep | None]]:
    """Return how an arena's steps may run (`ArenaBatch`: `makes_masks`, `step`), the fastest first."""
    if has_states or not takes_masks(model):
        return [(False, None)]
    step = read_decoder(model)
    return [*([(True, step)] if step is not None else []), (True, None), (False, None)]


def ways_of_stepping(room: Room | None, capture: Capture | None) -> list[Capture | None]:
    """Return what may capture the steps of an arena or a pool, the fastest first; None: nothing does."""
    return [capture, None] if capture is not None and room is not None and room.page else [None]


def proved_encoder_decoder(
    loaded: Loaded,
    layers: Sequence[LayerKind],
    max_rows: int,
    context_length: int,
    room: Room | None = None,
) -> tuple[Batch, list[str]]:
    """Do what `proved` does of an encoder-decoder: the rows' tokens are the decoder's, behind its start."""
    model, precision = loaded.model, loaded.precision
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    start = start_ids(model)
    rows = [
        [*start, *row][:context_length] for row in probe_rows(loaded.tokenizer, context_length, vocabulary)
    ]
    sources = [row[: max(1, len(row) - FORCED)] for row in reversed(rows)]
    plain = Plain(model, rows, sources)
    reason = why_read_alone(model, context_length) if layers else NO_ARENA
    if not reason:
        batch = EncoderDecoderBatch(
            model,
            layers=layers,
            max_rows=max(max_rows, len(rows)),
            max_length=context_length,
            pad_id=pad_id(loaded.tokenizer, vocabulary),
            room=with_probe(room, rows),
        )
        try:
            verdict = check(plain, batch, precision)
            if verdict.is_right:
                return batch, []
            reason = f"batched logits differ by {verdict.error:.2g} (tolerance {verdict.tolerance:.2g})"
        except ERRORS as error:
            if is_out_of_memory(error):
                raise
            reason = f"batched decoding raises {type(error).__name__}: {error}"
    single = EncoderDecoderRows(model)
    verdict = check(plain, single, precision)
    if not verdict.is_right:
        raise contradicts_itself(model, verdict, precision)
    return single, [f"Requests run one by one, which is slower: {reason}."]


def with_probe(room: Room | None, rows: Sequence[Sequence[int]]) -> Room | None:
    """Return room for the probe at least: what runs later is held to its own by the scheduler."""
    if room is None:
        return None
    return replace(room, bytes=max(room.bytes, len(rows) * room.of_row(max(map(len, rows)))))


def why_read_alone(model: Any, context_length: int) -> str:
    """Return why no batch of an encoder-decoder is tried; empty: it is."""
    config = model.config
    for part in (config, getattr(config, "encoder", None), getattr(config, "decoder", None)):
        for name, value in vars(part).items() if part is not None else ():
            sizes = value if isinstance(value, list) else [value]
            if BLOCKS.search(name) and any(type(size) is int and 0 < size < context_length for size in sizes):
                return f"{name} is {value}, and what it bounds depends on the padding of a batch"
    return ""


def why_alone(model: Any, context_length: int, layers: Sequence[LayerKind], whole: int, beyond: int) -> str:
    """Return why no batch is tried; empty: it is. `whole`: tokens up to which attention is not sparse."""
    if not layers:
        return NO_ARENA
    switch = rotary_switch(model)
    if switch and switch < context_length:
        return (
            f"beyond {switch} tokens its rotary factors change, for all rows of a batch at once "
            f"(contextLength {switch} or less lets them run together)"
        )
    if whole < context_length:
        return "its attention is sparse"
    if beyond > LONGEST_PASSED:
        return f"the check cannot pass its window of {beyond} tokens"
    return ""


def unmoved(model: Any, bounds: Mapping[str, int], rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the bounds of attention that the check must pass at their true size: making them small changes
    no logits."""
    longest = max(rows, key=len)
    names = [name for name in bounds if not NEUTRAL.search(name)]
    found = []
    for name in names:
        with made_small(model, [name]):
            small = plain_logits(model, [longest])[0]
        if torch.equal(small, plain_logits(model, [longest])[0]):
            found.append(name)
    return found


def failed(model: Any, what: str) -> EngineLoadError:
    kind = f"{type(model).__name__} ({model.config.model_type})"
    return EngineLoadError("SelfCheckFailed", f"{kind} cannot be served rightly here: {what}.")


def contradicts_itself(model: Any, verdict: Verdict, precision: str) -> EngineLoadError:
    return failed(
        model,
        f"decoding does not give its own logits: they differ by {verdict.error:.2g} "
        f"(tolerance {verdict.tolerance:.2g} in {precision})",
    )

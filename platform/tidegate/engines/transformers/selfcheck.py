"""Proves a loaded model: the batched path must give the logits of the model's plain forward pass.

A few rows go through the batches that may serve it, the fastest first (`probe`), and the first one that is
right is taken. Where it is wrong when rows take several tokens a step, tokens that a grammar forces are taken
one by one; where it is wrong with prompts in parts, every prompt is prefilled whole; where it is wrong with
what was kept of others, nothing is kept. A model that is wrong in every batch runs row by row, and one that
contradicts itself is refused. What was found is remembered for the next load (`check_record`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
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
from tidegate.engines.transformers.check_record import Record, Way, is_kept, key_of, read, write
from tidegate.engines.transformers.decoder_step import read_decoder
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

log = logging.getLogger(__name__)

# Fields of encoder-decoders by which a row may depend on how long its neighbours are: blocks of attention,
# experts that take so many tokens of a batch.
BLOCKS = re.compile(r"window|block_size|local_radius|expert_capacity")
NO_ARENA = "its cache has layers of another kind than keys and values per token, or a state per row"
LONGEST_PASSED = 512  # tokens of a bound that the probe passes at its true size


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a model runs under. No `layers`: the arena cannot hold its cache. A batch keeps `prefixes` where
    it passes with them. Its memory is within `room`, and what the check takes. `pages` is the room of a pool
    that comes first: where its steps are our own, or `pages_anyhow`; `capture` is what captures its steps."""

    layers: Sequence[LayerKind]
    max_rows: int
    context_length: int
    prefixes: PrefixCache | None = None
    room: Room | None = None
    pages: Room | None = None
    pages_anyhow: bool = False
    capture: Capture | None = None

    def key(self, loaded: Loaded) -> str:
        """See `key_of`. How many rows there are, and how many bytes, decides nothing of what is right."""
        page = self.pages.page if self.pages is not None else 0
        has = (self.prefixes is not None, self.capture is not None, self.pages_anyhow)
        return key_of(loaded, self.layers, self.context_length, page, has)


@dataclass(frozen=True, slots=True)
class Proved:
    """`has_raised`: a faster way was given up for an error, which may not come again."""

    batch: Batch
    way: Way
    notes: list[str]
    plain: Plain
    has_raised: bool


def prove(loaded: Loaded, conditions: Conditions, record: Path | None = None) -> tuple[Batch, list[str]]:
    """Return the fastest batch that passes the check, with notes. What was found is remembered in the file
    `record`. Raises `EngineLoadError` (SelfCheckFailed), and what says that memory ran out."""
    key = conditions.key(loaded) if record is not None else ""
    if (known := read(record, key)) is not None:
        if (batch := remade(loaded, conditions, known)) is not None:
            log.info("the self-check passed as it is remembered")
            return batch, known.notes
        log.warning("the self-check is not as it is remembered: all is checked again")
    try:
        check_all = proved_encoder_decoder if loaded.model.config.is_encoder_decoder else proved
        found = check_all(loaded, conditions)
    except ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise failed(loaded.model, f"decoding raises {type(error).__name__}: {error}") from error
    if not found.has_raised:
        write(record, key, found.way, found.notes, found.plain)
    return found.batch, found.notes


def remade(loaded: Loaded, conditions: Conditions, known: Record) -> Batch | None:
    """Return the batch that is remembered; None where it does not give the logits that are."""
    try:
        batch = made(loaded, conditions, known.way, known.rows)
        return batch if is_kept(loaded.model, batch, known, loaded.precision) else None
    except Exception as error:  # whatever it is, the whole check finds it or finds a way around it
        if is_out_of_memory(error):
            raise
        return None


def made(loaded: Loaded, conditions: Conditions, way: Way, rows: Sequence[Sequence[int]]) -> Batch:
    """Make a batch that runs in this way, with room for the probe's rows."""
    model, is_read = loaded.model, loaded.model.config.is_encoder_decoder
    if not way.is_together:
        return EncoderDecoderRows(model) if is_read else RowByRow(model)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    size: dict[str, Any] = {
        "layers": conditions.layers,
        "max_rows": max(conditions.max_rows, len(rows)),
        "max_length": conditions.context_length,
        "pad_id": pad_id(loaded.tokenizer, vocabulary),
        "room": with_probe(conditions.pages if way.is_paged else conditions.room, rows),
    }
    if is_read:
        return EncoderDecoderBatch(model, **size)
    batch = ArenaBatch(
        model,
        **size,
        makes_masks=way.makes_masks,
        step=read_decoder(model) if way.has_step else None,
        capture=conditions.capture if way.is_captured else None,
    )
    batch.has_runs, batch.can_stage = way.has_runs, way.can_stage
    batch.prefixes = conditions.prefixes if way.keeps_prefixes else None
    return batch


def proved(loaded: Loaded, conditions: Conditions) -> Proved:
    """Do what `prove` does of a decoder of which nothing is known."""
    model, precision, context_length = loaded.model, loaded.precision, conditions.context_length
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    whole = min(context_length, sparse_limit(model) or context_length)
    rows = probe_rows(loaded.tokenizer, whole, vocabulary)
    bounds = named_bounds(model, context_length)
    beyond = max((bounds[name] for name in unmoved(model, bounds, rows)), default=0)
    if 0 < beyond <= LONGEST_PASSED:
        rows[0] = (rows[0] * beyond)[: min(beyond + 2 * FORCED, context_length)]
    reason = why_alone(model, context_length, conditions.layers, whole, beyond)
    plain, has_raised = Plain(model, rows), False
    for way in [] if reason else ways(model, conditions):
        batch = made(loaded, conditions, way, rows)
        assert isinstance(batch, ArenaBatch)
        try:
            verdict = check_bounds(plain, batch, precision, bounds)
        except ERRORS as error:
            if is_out_of_memory(error):
                raise
            reason, has_raised = f"batched decoding raises {type(error).__name__}: {error}", True
            continue
        if verdict.is_right:
            is_also = partial(is_right, plain=plain, batch=batch, precision=precision, bounds=bounds)
            # A state that has taken a token cannot take it once more.
            batch.has_runs = way.has_runs and is_also(in_runs)
            batch.can_stage = is_also(in_chunks)
            if batch.can_stage and conditions.prefixes is not None:
                batch.prefixes = conditions.prefixes
                if not is_also(with_prefixes):
                    batch.prefixes = None
            way = msgspec.structs.replace(
                way,
                has_runs=batch.has_runs,
                can_stage=batch.can_stage,
                keeps_prefixes=batch.prefixes is not None,
            )
            return Proved(batch, way, given_up(conditions, way, reason), plain, has_raised)
        reason = f"batched logits differ by {verdict.error:.2g} (tolerance {verdict.tolerance:.2g})"
    single = RowByRow(model)
    verdict = check_bounds(plain, single, precision, bounds)
    if not verdict.is_right:
        raise contradicts_itself(model, verdict, precision)
    notes = [f"Requests run one by one, which is slower: {reason}."]
    if whole < context_length:
        notes.append(f"Beyond {whole} tokens its attention is sparse, which no check proves.")
    return Proved(single, Way(is_together=False), notes, plain, has_raised)


def ways(model: Any, conditions: Conditions) -> list[Way]:
    """Return how a decoder's rows may run together, the fastest first."""
    has_states = any(kind.states for kind in conditions.layers)
    found = []
    for is_paged in (True, False) if conditions.pages is not None else (False,):
        for makes_masks, has_step in ways_of_batching(model, has_states=has_states):
            if is_paged and not has_step and not conditions.pages_anyhow:
                continue
            captures = (True, False) if is_paged and conditions.capture is not None else (False,)
            found += [
                Way(True, is_paged, makes_masks, has_step, is_captured, not has_states, True)
                for is_captured in captures
            ]
    return found


def ways_of_batching(model: Any, *, has_states: bool) -> list[tuple[bool, bool]]:
    """Return how an arena's steps may run (`ArenaBatch`: `makes_masks`, and whether `step` is our own), the
    fastest first."""
    if has_states or not takes_masks(model):
        return [(False, False)]
    return [*([(True, True)] if read_decoder(model) is not None else []), (True, False), (False, False)]


def given_up(conditions: Conditions, way: Way, reason: str) -> list[str]:
    """Return notes of what is not done for this reason; empty: there is none."""
    if reason and way.is_paged and conditions.capture is not None and not way.is_captured:
        return [f"Its steps are not replayed as graphs: {reason}."]
    if reason and not way.is_paged and conditions.pages is not None:
        return [f"Its KV cache is not kept in pages: {reason}."]
    return []


def proved_encoder_decoder(loaded: Loaded, conditions: Conditions) -> Proved:
    """Do what `proved` does of an encoder-decoder: the rows' tokens are the decoder's, behind its start."""
    model, precision, context_length = loaded.model, loaded.precision, conditions.context_length
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    start = start_ids(model)
    rows = [
        [*start, *row][:context_length] for row in probe_rows(loaded.tokenizer, context_length, vocabulary)
    ]
    sources = [row[: max(1, len(row) - FORCED)] for row in reversed(rows)]
    plain = Plain(model, rows, sources)
    reason = why_read_alone(model, context_length) if conditions.layers else NO_ARENA
    together, alone, has_raised = Way(is_together=True), Way(is_together=False), False
    if not reason:
        batch = made(loaded, conditions, together, rows)
        try:
            verdict = check(plain, batch, precision)
            if verdict.is_right:
                return Proved(batch, together, [], plain, has_raised)
            reason = f"batched logits differ by {verdict.error:.2g} (tolerance {verdict.tolerance:.2g})"
        except ERRORS as error:
            if is_out_of_memory(error):
                raise
            reason, has_raised = f"batched decoding raises {type(error).__name__}: {error}", True
    single = made(loaded, conditions, alone, rows)
    verdict = check(plain, single, precision)
    if not verdict.is_right:
        raise contradicts_itself(model, verdict, precision)
    notes = [f"Requests run one by one, which is slower: {reason}."]
    return Proved(single, alone, notes, plain, has_raised)


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

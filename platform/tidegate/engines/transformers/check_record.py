"""Remembers what the self-check of a model found on this machine, for the next load of the same.

What the check proves hangs on code, configuration, kernels and device. Where these are what they were, the
next load need not find once more which batch is right and what it may do: it makes that batch, lets two rows
of the probe join and take one step together, and compares their logits with those that the plain forward pass
of the full check gave (`is_kept`). Where they differ, as for other weights, all is checked again (ADR 29).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from tidegate.engines.transformers.batch import Batch
from tidegate.engines.transformers.loading import Loaded
from tidegate.engines.transformers.probe import FORCED, Plain, relative_error, tolerance_of

MOST_FILES = 64  # records of a folder
MOST_BYTES = 1 << 20  # of one
COLUMNS = 2048  # tokens of the vocabulary, evenly spaced, whose logits are kept
ROWS = 2  # of the probe that are kept, the shortest: two of one length would show less
KEPT = 2  # logits of each: after its prompt, and after one token more


class Way(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the rows of a model run: what a batch is made with, and what it may do then (see `Batch`)."""

    is_together: bool
    is_paged: bool = False
    makes_masks: bool = False
    has_step: bool = False
    is_captured: bool = False
    has_runs: bool = False
    can_stage: bool = False
    keeps_prefixes: bool = False


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`logits` are float32 [rows, KEPT, columns]; `sources` what an encoder reads for each row."""

    key: str
    way: Way
    notes: list[str]
    rows: list[list[int]]
    sources: list[list[int]]
    logits: bytes


def key_of(loaded: Loaded, *conditions: object) -> str:
    """Name all that decides whether a batch is right, but the values of the weights: the configuration, what
    the layers are, the code that runs them, the device; `conditions` are the caller's."""
    model = loaded.model
    types = {type(module) for module in model.modules()}
    told = {
        "config": _without_path(model.config.to_dict()),
        "types": sorted(f"{each.__module__}.{each.__qualname__}" for each in types),
        "weights": sorted({(str(each.dtype), str(each.device)) for each in model.parameters()}),
        "precision": loaded.precision,
        "device": _device(loaded.device),
        "libraries": (torch.__version__, torch.version.cuda, transformers.__version__, sys.version),
        "code": _code({type(model).__module__, *(each.__module__ for each in types)}),
        "conditions": conditions,
    }
    return hashlib.sha256(repr(told).encode()).hexdigest()


def read(path: Path | None, key: str) -> Record | None:
    """Return what is remembered under this key; None where nothing is, or nothing that can be read."""
    if path is None:
        return None
    with suppress(OSError, msgspec.DecodeError):
        if path.stat().st_size <= MOST_BYTES:
            found = msgspec.msgpack.decode(path.read_bytes(), type=Record)
            if found.key == key:
                os.utime(path)
                return found
    return None


def write(path: Path | None, key: str, way: Way, notes: Sequence[str], plain: Plain) -> None:
    """Remember what was found; a matter of speed, so whatever goes wrong is left at that. Of all records in
    the folder those used last stay."""
    if path is None or min(map(len, plain.rows)) <= FORCED:
        return
    chosen = sorted(range(len(plain.rows)), key=lambda row: len(plain.rows[row]))[:ROWS]
    logits = plain.logits()
    kept = torch.stack([_sampled(logits[row][:KEPT]) for row in chosen]).cpu().contiguous()
    found = Record(
        key,
        way,
        list(notes),
        [list(plain.rows[row]) for row in chosen],
        [list(plain.sources[row]) for row in chosen] if plain.sources else [],
        kept.numpy().tobytes(),
    )
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.msgpack.encode(found))
        Path(file.name).replace(path)
        newest_first = sorted(path.parent.iterdir(), key=lambda each: -each.stat().st_mtime)
        for old in newest_first[MOST_FILES:]:
            old.unlink()


def is_kept(model: Any, batch: Batch, record: Record, precision: str) -> bool:
    """Tell whether the rows of the record give its logits in this batch, which must be empty and is empty
    afterwards."""
    begun = [len(row) - FORCED for row in record.rows]
    known = range(int(model.get_input_embeddings().weight.shape[0]))
    if min(begun, default=0) < 1 or not all(token in known for row in record.rows for token in row):
        return False  # a device would end the process for it
    try:
        expected = torch.frombuffer(bytearray(record.logits), dtype=torch.float32)
        joined = batch.join(
            [row[:held] for row, held in zip(record.rows, begun, strict=True)], sources=record.sources
        )
        tokens = [row[held] for row, held in zip(record.rows, begun, strict=True)]
        decoded = batch.decode(torch.tensor(tokens, device=joined.device))
        found = torch.stack((_sampled(joined), _sampled(decoded)), dim=1).cpu()
    finally:
        while batch.count:
            batch.leave(batch.count - 1, clear=True)
    if expected.numel() != found.numel():
        return False
    tolerance = tolerance_of(model, precision)
    pairs = zip(found.flatten(0, 1), expected.view_as(found).flatten(0, 1), strict=True)
    return all(relative_error(one, other) <= tolerance for one, other in pairs)


def _sampled(logits: torch.Tensor) -> torch.Tensor:
    """Return columns of `logits` [any, vocabulary] as float32 [any, columns]."""
    return logits[:, :: max(1, logits.shape[-1] // COLUMNS)].float()


def _without_path(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without where it was read: parked weights lie elsewhere."""
    return {
        name: _without_path(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name != "_name_or_path"
    }


def _device(device: str) -> list[object]:
    if device == "cpu":
        return [device, torch.backends.cpu.get_cpu_capability()]
    return [torch.cuda.get_device_name(), torch.cuda.get_device_capability()]


def _code(modules: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return what tells this engine's files, and those that define the modules, from others. What is no file
    of its own, as in an archive, the versions of the libraries tell."""
    files = {str(each) for each in Path(__file__).parent.glob("*") if each.suffix in (".py", ".c", ".h")}
    files |= {file for name in modules if (file := getattr(sys.modules.get(name), "__file__", None))}
    found = []
    for file in sorted(files):
        with suppress(OSError):
            told = Path(file).stat()
            found.append((file, told.st_size, told.st_mtime_ns))
    return found

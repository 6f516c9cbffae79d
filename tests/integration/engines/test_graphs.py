"""A step that is replayed on buffers gives the logits of the step itself, whoever joins and leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.checkpoints import DECODERS, save_tokenizer
from tests.integration.engines.test_decoder_step import READ, model_of
from tests.varlen import varlen
from tidegate.engines.transformers import paged, probe, selfcheck
from tidegate.engines.transformers.batch import ArenaBatch
from tidegate.engines.transformers.decoder_step import read_decoder
from tidegate.engines.transformers.graphs import Capture, GraphedStep
from tidegate.engines.transformers.kv_size import measure_kv
from tidegate.engines.transformers.loading import Loaded
from tidegate.engines.transformers.paged import PAGE, PagedLayer, PagedPool
from tidegate.engines.transformers.room import Room

MOST = 6


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: steps attend by the table of pages."""
    monkeypatch.setattr(paged, "varlen_attn", varlen)
    monkeypatch.setattr(PagedPool, "has_kernel", lambda *_: True)


class Again:
    """Captures by computing anew on the same buffers, as often as it is replayed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        found = run()
        self.sizes.append(len(found))

        def replay() -> None:
            self.replays += 1
            found.copy_(run())

        return replay, found


def batch_of(model: Any, capture: Capture | None) -> ArenaBatch:
    kv = measure_kv(model)
    return ArenaBatch(
        model,
        layers=kv.layers,
        max_rows=MOST,
        max_length=256,
        pad_id=0,
        makes_masks=True,
        step=read_decoder(model),
        room=Room(2048 * kv.bytes_per_token, kv.bytes_per_token, page=PAGE["cpu"]),
        capture=capture,
    )


def driven(batch: ArenaBatch) -> list[Tensor]:
    """The logits of rows that join alone and together, leave, are computed in parts, and take tokens back."""
    found: list[Tensor] = []

    def decode(steps: int) -> None:
        for step in range(steps):
            found.append(batch.decode(torch.arange(3 + step, 3 + step + batch.count)))

    found.append(batch.join([[5, 6, 7]]))
    decode(3)
    found.append(batch.join([[8] * 30, [9] * 31]))
    decode(20)
    batch.leave(0)
    decode(2)
    staged = batch.begin([4 + place % 9 for place in range(40)])
    batch.advance(staged, 25)
    decode(2)
    rest = batch.advance(staged, 15)
    assert rest is not None
    found += [rest, batch.join([[11] * 5, [12] * 6])]
    decode(3)
    counts = [1, 3, 2, 1, 1]
    found.append(batch.run([[20, 21, 22]] * 5, counts))
    batch.take_back([0, 2, 0, 0, 0])
    decode(2)
    found.append(batch.join([[3] * 17]))
    decode(2)
    for _ in range(5):
        batch.leave(0)
        decode(1)
    return found


@pytest.mark.parametrize("name", sorted(READ))
def test_replayed_steps_give_the_same_logits(name: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, *READ[name], torch.float32)
    again = Again()
    batch = batch_of(model, again)
    pairs = zip(driven(batch), driven(batch_of(model, None)), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert again.sizes == [1, 4, 2, MOST]
    assert again.replays == 39
    pool = batch._arena
    assert isinstance(pool, PagedPool)
    for layer in pool.layers:
        assert isinstance(layer, PagedLayer)
        assert not layer.keys[: pool.page].any(), "padding is read there"
        assert layer.keys[pool.padding].any(), "padding is written there"


def test_the_self_check_proves_what_is_replayed(tmp_path: Path) -> None:
    model = model_of(tmp_path, *DECODERS["llama"], torch.float32)
    rows = [[3 + (7 * row + at) % 400 for at in range(length)] for row, length in enumerate((9, 30, 14, 21))]
    again = Again()
    batch = batch_of(model, again)
    assert probe.check(probe.Plain(model, rows), batch, "float32").is_right
    assert again.replays > 8

    assert not probe.check(probe.Plain(model, rows), batch_of(model, stale), "float32").is_right


def stale(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    return lambda: None, run()


def test_a_pool_whose_replays_are_wrong_runs_without_them(tmp_path: Path) -> None:
    kind, size = DECODERS["llama"]
    model = model_of(tmp_path, kind, size, torch.float32)
    save_tokenizer(tmp_path)
    kv, loaded = (
        measure_kv(model),
        Loaded(model, AutoTokenizer.from_pretrained(tmp_path), "cpu", "float32", 0, []),
    )
    room = Room(4096 * kv.bytes_per_token, kv.bytes_per_token, page=PAGE["cpu"])
    for capture, note in ((stale, "not replayed as graphs: batched logits differ"), (Again(), "")):
        conditions = selfcheck.Conditions(kv.layers, MOST, 256, pages=room, capture=capture)
        batch, notes = selfcheck.prove(loaded, conditions)
        assert batch.page == PAGE["cpu"]
        assert [note in one for one in notes] == ([True] if note else [])
        assert isinstance(batch, ArenaBatch)
        assert isinstance(batch._step, GraphedStep) == (not note)


def test_what_cannot_be_captured_is_computed_as_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(tmp_path, *DECODERS["llama"], torch.float32)

    def refuse(_run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        found = driven(batch_of(model, refuse))
    for one, other in zip(found, driven(batch_of(model, None)), strict=True):
        assert torch.equal(one, other)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1

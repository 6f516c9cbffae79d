"""What a self-check found is remembered: the next load of the same runs the same way, and what is not the
same is checked again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoTokenizer

from tests.checkpoints import DECODERS, PAD, save_model, save_tokenizer
from tests.engine_requests import a_request, run
from tests.integration.engines.test_decoder_step import model_of
from tests.integration.engines.test_families import ALONE, BATCHED
from tests.integration.engines.test_loading import Shifted
from tests.integration.engines.test_states import STATEFUL
from tidegate.engines.base import LoadReport
from tidegate.engines.transformers import check_record, selfcheck
from tidegate.engines.transformers.batch import ArenaBatch, Batch, RowByRow
from tidegate.engines.transformers.check_record import MOST_BYTES, MOST_FILES, Record
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.engines.transformers.kv_size import measure_kv
from tidegate.engines.transformers.loading import Loaded
from tidegate.engines.transformers.prefixes import PrefixCache
from tidegate.engines.transformers.room import Room
from tidegate.replica_args import EngineSpec

REMEMBERED = "the self-check passed as it is remembered"
AGAIN = "the self-check is not as it is remembered: all is checked again"
KINDS = ("llama", "llama-gptq", "llama-bfloat16", "gemma3_text", "bamba", "rwkv", "t5")
PAGE = 16

Check = Callable[..., Batch]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    folder = tmp_path / "checks"
    folder.mkdir()
    return folder / "model"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the self-check logs, whatever other tests did to the loggers."""
    found: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(selfcheck.log, level, found.append)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Any:
    torch.set_num_threads(1)
    return model_of(tmp_path / "checkpoint", *DECODERS["llama"], torch.float32)


@pytest.fixture
def check(model: Any, tmp_path: Path, record: Path) -> Check:
    """Check the model, or remember that it was."""
    save_tokenizer(tmp_path / "checkpoint")
    loaded = Loaded(model, AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), "cpu", "float32", 0, [])
    kv = measure_kv(model)
    room = Room(4096 * kv.bytes_per_token, kv.bytes_per_token, page=PAGE)

    def prove(context: int = 128, *, paged: bool = False, keeps: bool = True, to: Path = record) -> Batch:
        prefixes = PrefixCache(1 << 20, kv.bytes_per_token) if keeps else None
        pages = room if paged else None
        conditions = selfcheck.Conditions(kv.layers, 8, context, prefixes=prefixes, pages=pages)
        return selfcheck.prove(loaded, conditions, to)[0]

    return prove


@pytest.fixture
def made(tmp_path: Path, checkpoints: Callable[[str], Path]) -> Callable[[str], Path]:
    sizes: Mapping[str, Any] = {
        "gemma3_text": BATCHED["gemma3_text"],
        "rwkv": ALONE["rwkv"][:2],
        "bamba": ("bamba", STATEFUL["bamba"]),
    }

    def make(kind: str) -> Path:
        if kind not in sizes:
            return checkpoints(kind.removesuffix("-bfloat16"))
        save_model(tmp_path / kind, *sizes[kind])
        save_tokenizer(tmp_path / kind)
        return tmp_path / kind

    return make


def way_of(batch: Any) -> tuple[Any, ...]:
    if not isinstance(batch, ArenaBatch):
        return (type(batch),)
    means = (type(batch), type(batch._step), batch._makes_masks, batch.page)
    return (*means, batch.has_runs, batch.can_stage, batch.prefixes is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_load_runs_the_same_way_without_finding_it(
    kind: str,
    made: Callable[[str], Path],
    record: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    precision = "bfloat16" if kind.endswith("bfloat16") else "float32"
    spec = EngineSpec("transformers", str(made(kind)), precision, device="cpu", args={"threads": 1})

    def load() -> tuple[LoadReport, tuple[Any, ...], list[list[int]]]:
        engine = TransformersEngine(spec, record)
        try:
            return engine.load(), way_of(engine._batch), answers(engine)
        finally:
            engine.close()

    first = load()
    assert said == []
    for name in ("proved", "proved_encoder_decoder"):
        monkeypatch.setattr(selfcheck, name, None)
    second = load()
    assert said == [REMEMBERED]
    assert second[1:] == first[1:]
    assert second[0].notes == first[0].notes
    assert ("one by one" in " ".join(first[0].notes)) == (kind == "rwkv")


def answers(engine: TransformersEngine) -> list[list[int]]:
    requests = [
        a_request(str(row), [(7 * row + at) % 90 + 10 for at in range(5 + 9 * row)], max_tokens=12 + row)
        for row in range(4)
    ]
    found = run(engine, requests, apart=2)
    assert [len(found[request.id].tokens) for request in requests] == [12, 13, 14, 15]
    return [found[request.id].tokens for request in requests]


def test_what_it_runs_under_is_part_of_what_is_remembered(check: Check, said: list[str]) -> None:
    assert way_of(check(paged=True)) == way_of(check(paged=True))
    assert check(paged=True).page == PAGE
    assert said == 2 * [REMEMBERED]
    said.clear()
    assert check().page == 0
    check(keeps=False)
    check(64, keeps=False)
    assert said == []


def test_where_its_files_lie_is_not(check: Check, model: Any, said: list[str]) -> None:
    check()
    model.config._name_or_path = "/parked"
    check()
    assert said == [REMEMBERED]


def test_other_weights_are_checked_in_full_and_remembered_then(
    check: Check, model: Any, said: list[str]
) -> None:
    check()
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight += 0.5 * weight.std() * torch.randn(weight.shape)
    check()
    assert said == [AGAIN]
    check()
    assert said == [AGAIN, REMEMBERED]


class Unmasked(ArenaBatch):
    """Sees the padding before a prompt that is shorter than its neighbour."""

    def join(self, sequences: Any, **options: Any) -> torch.Tensor:
        longest = max(map(len, sequences))
        return super().join([[PAD] * (longest - len(each)) + list(each) for each in sequences], **options)


class Raising(ArenaBatch):
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"not {tokens.shape}")


@pytest.mark.parametrize("wrong", [Shifted, Unmasked, Raising])
def test_a_batch_that_has_become_wrong_is_found(
    wrong: type[ArenaBatch], check: Check, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    monkeypatch.setattr(selfcheck, "ArenaBatch", wrong)
    assert isinstance(check(), RowByRow)
    assert said == [AGAIN]


def test_a_way_that_raised_is_tried_again_in_the_next_load(
    check: Check, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "ArenaBatch", Raising)
        assert isinstance(check(), RowByRow)
    assert not record.exists()
    assert isinstance(check(), ArenaBatch)


def test_memory_that_runs_out_is_no_reason_to_check_again(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    check()

    def full(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selfcheck, "is_kept", full)
    monkeypatch.setattr(selfcheck, "proved", None)
    with pytest.raises(torch.OutOfMemoryError):
        check()


def test_other_code_or_another_device_is_another_check(
    check: Check, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    for owner, name, other in (
        (torch, "__version__", "3.0.0"),
        (check_record, "_device", lambda _device: ["another"]),
        (check_record, "_code", lambda _modules: [("batch.py", 7, 7)]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            check()
    check()
    assert said == []


def test_the_key_names_the_code_of_engine_and_model(check: Check) -> None:
    check()
    files = {
        Path(file).name for file, _, _ in check_record._code({"transformers.models.llama.modeling_llama"})
    }
    assert {"batch.py", "kv.py", "decoder_step.py", "modeling_llama.py"} <= files


def test_a_configuration_of_any_keys_and_a_module_of_no_file_have_a_key(
    check: Check, model: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.config.id2label = {0: "no", "one": "yes", (2, 3): "both"}
    monkeypatch.setattr(sys.modules["transformers.models.llama.modeling_llama"], "__file__", "archive.zip/it")
    for _ in range(2):
        check()
    assert said == [REMEMBERED]


def garbled(record: Path, **changed: Any) -> bytes:
    found = msgspec.msgpack.decode(record.read_bytes(), type=Record)
    return msgspec.msgpack.encode(msgspec.structs.replace(found, **changed))


DAMAGE: Mapping[str, Callable[[Path], bytes]] = {
    "empty": lambda _record: b"",
    "torn": lambda record: record.read_bytes()[:-9],
    "too large": lambda _record: bytes(MOST_BYTES + 1),
    "of other fields": lambda _record: msgspec.msgpack.encode({"key": 1}),
    "fewer logits": lambda record: garbled(record, logits=bytes(16)),
    "no logits": lambda record: garbled(record, logits=b""),
    "half a number": lambda record: garbled(record, logits=b"abc"),
    "no rows": lambda record: garbled(record, rows=[]),
    "an empty row": lambda record: garbled(record, rows=[[], [5] * 20]),
    "tokens that are none": lambda record: garbled(record, rows=[[1 << 40] * 20, [5] * 30]),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_record_is_written_anew(damage: str, check: Check, record: Path, said: list[str]) -> None:
    first = way_of(check())
    record.write_bytes(DAMAGE[damage](record))
    assert way_of(check()) == first
    assert REMEMBERED not in said
    check()
    assert said[-1] == REMEMBERED


def test_a_place_that_cannot_be_written_is_done_without(
    check: Check, tmp_path: Path, said: list[str]
) -> None:
    for _ in range(2):
        check(to=tmp_path / "nowhere" / "model")
    assert said == []


def test_a_folder_keeps_the_records_that_were_used_last(check: Check, record: Path) -> None:
    for age in range(MOST_FILES + 3):
        other = record.parent / f"other-{age}"
        other.touch()
        os.utime(other, (1000.0 - age, 1000.0 - age))
    check()
    names = {file.name for file in record.parent.iterdir()}
    assert names == {"model", *(f"other-{age}" for age in range(MOST_FILES - 1))}
    os.utime(record, (1.0, 1.0))
    check()
    assert record.stat().st_mtime > 1000.0


def test_rows_too_short_to_prove_anything_are_not_remembered(check: Check, record: Path) -> None:
    check(8)
    assert not record.exists()

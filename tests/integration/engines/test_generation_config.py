"""What a checkpoint's generation config asks for is obeyed as `generate` does, or told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import CONTEXT, PAD
from tests.engine_requests import a_request, run, sampling_of
from tidegate.engines.transformers.described import Described
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.engines.transformers.generation_rules import GenerationRules
from tidegate.messages.work import MODEL_DEFAULTS
from tidegate.replica_args import EngineSpec

PROMPTS = [[5, 6, 7, 8], [40, 41, 40, 41, 40], [100]]
LENGTH = 24


@pytest.fixture
def asked(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A llama whose generation config asks for more."""

    def make(**fields: Any) -> Path:
        folder = Path(shutil.copytree(checkpoints("llama"), tmp_path / "asked"))
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 2} | fields))
        return folder

    return make


def loaded(folder: Path) -> tuple[TransformersEngine, tuple[str, ...]]:
    engine = TransformersEngine(
        EngineSpec("transformers", str(folder), precision="float32", device="cpu", args={"threads": 1})
    )
    return engine, engine.load().notes


def generated(folder: Path) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = [
        model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=PAD)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]
    return [[token for token in answer if token != PAD] for answer in answers]


def served(engine: TransformersEngine, **sampling: Any) -> list[list[int]]:
    wanted = {"max_tokens": LENGTH, "ignore_eos": False, "left_out": MODEL_DEFAULTS, **sampling}
    requests = [a_request(str(index), prompt, **wanted) for index, prompt in enumerate(PROMPTS)]
    results = run(engine, requests, apart=2)
    return [results[request.id].tokens for request in requests]


@pytest.fixture
def plain(checkpoints: Callable[[str], Path]) -> list[list[int]]:
    return generated(checkpoints("llama"))


@pytest.mark.parametrize(
    ("name", "value_of"),
    [
        ("repetition_penalty", lambda _plain: 1.7),
        ("no_repeat_ngram_size", lambda _plain: 2),
        ("suppress_tokens", lambda plain: plain[0][:2]),
        ("begin_suppress_tokens", lambda plain: [answer[0] for answer in plain]),
        ("bad_words_ids", lambda plain: [plain[0][:2], [plain[1][0]]]),
        ("forced_bos_token_id", lambda _plain: 77),
        ("sequence_bias", lambda plain: [[[plain[0][0]], -20.0]]),
    ],
)
def test_a_field_is_obeyed_as_generate_obeys_it(
    name: str, value_of: Callable[[list[list[int]]], Any], asked: Callable[..., Path], plain: list[list[int]]
) -> None:
    folder = asked(**{name: value_of(plain)})
    engine, notes = loaded(folder)
    expected = generated(folder)
    assert notes == ()
    assert expected != plain
    assert served(engine, temperature=0.0, left_out=("repetition_penalty",)) == expected


def test_what_the_client_says_wins(asked: Callable[..., Path], plain: list[list[int]]) -> None:
    engine, _ = loaded(asked(repetition_penalty=1.7, temperature=1.9, max_new_tokens=3))
    assert served(engine, temperature=0.0, left_out=()) == plain
    assert [len(answer) for answer in served(engine, max_tokens=None, left_out=())] == [3, 3, 3]


def test_more_tokens_than_there_is_room_for_are_no_clients_wish(asked: Callable[..., Path]) -> None:
    engine, _ = loaded(asked(max_new_tokens=10_000))
    for left in (9, 1):
        request = a_request("r", [5] * (CONTEXT - left), max_tokens=None)
        assert len(run(engine, [request])["r"].tokens) == left
    kept = a_request("r", [5] * CONTEXT, max_tokens=None, truncate_prompt=-1)
    assert [len(each.tokens) for each in run(engine, [kept]).values()] == [1]


def test_a_token_that_is_0_is_one(asked: Callable[..., Path]) -> None:
    """Of rules that name a token: others are turned off by it."""
    folder = asked(forced_bos_token_id=0, forced_eos_token_id=0, min_length=0, no_repeat_ngram_size=0)
    rules = GenerationRules(Described(folder, 512), [2])
    assert (rules.forces_end, rules.notes) == (True, [])
    assert sorted(rules._fields) == ["forced_bos_token_id", "forced_eos_token_id"]
    ruled = rules.of_prompt(1, 2)
    assert ruled is not None
    assert [int(ruled(torch.tensor([[5] * count]), torch.zeros(1, 512)).argmax()) for count in (1, 2)] == [
        0,
        0,
    ]


def test_sampling_fields_are_defaults(asked: Callable[..., Path]) -> None:
    fields = {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}
    model: Any = AutoModelForCausalLM.from_pretrained(asked(do_sample=True, **fields))
    rules = GenerationRules(model, {2})
    request = a_request("r", [1], temperature=1.0, left_out=MODEL_DEFAULTS)
    assert {name: getattr(sampling_of(rules.applied(request)), name) for name in fields} == fields
    said = a_request("r", [1], temperature=1.0, left_out=("top_k",))
    assert sampling_of(rules.applied(said)).temperature == 1.0
    assert sampling_of(rules.applied(said)).top_k == 20


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_beams": 4}, "num_beams = 4"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p = 0.9"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"bad_words_ids": [[100_000]]}, "bad_words_ids = [[100000]]"),
    ],
)
def test_what_is_not_obeyed_is_told(
    fields: dict[str, Any], word: str, asked: Callable[..., Path], plain: list[list[int]]
) -> None:
    engine, notes = loaded(asked(**fields))
    assert len(notes) == 1
    assert word in notes[0]
    assert served(engine, temperature=0.0, left_out=()) == plain

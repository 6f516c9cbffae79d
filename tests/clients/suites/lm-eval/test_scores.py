"""lm-eval's `local-completions` and `local-chat-completions` score as its own transformers run does.

There is a task for each kind of request (a choice of continuations, a text's own likelihood, an answer), made
here and offline."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

SOURCE = os.environ["CLIENTS_SOURCE"]
PLACES = ["river", "harbour", "lock", "canal", "lake", "sea", "dam", "weir"]
GATES = ["open", "shut", "half open", "stuck"]
ROWS = [
    {
        "question": f"The gate at the {place} is {gate}. The gate is",
        "choices": GATES,
        "answer": GATES.index(gate),
        "text": f"The gate at the {place} is {gate}.",
    }
    for place in PLACES
    for gate in GATES
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OPENAI_API_KEY", os.environ["CLIENTS_KEY"])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def evaluate(rows: Path, task: dict[str, Any], kind: str, is_chat: bool, **words: Any) -> tuple[Any, Any]:
    """The metrics, and what the model answered to each row."""
    files = {"data_files": {"test": str(rows)}}
    data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=words,
        tasks=[{"task": "gates", **data, **task}],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=is_chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    metrics = {name: value for name, value in found["results"]["gates"].items() if "stderr" not in name}
    answers = sorted((sample["doc_id"], sample["resps"]) for sample in found["samples"]["gates"])
    return metrics, answers


def both(rows: Path, task: dict[str, Any], is_chat: bool = False) -> tuple[Any, Any]:
    own = evaluate(rows, task, "hf", is_chat, pretrained=SOURCE, dtype="auto", device="cpu", batch_size=1)
    url = f"{os.environ['CLIENTS_URL']}/v1"
    asked: dict[str, Any] = {"model": os.environ["CLIENTS_MODEL"], "num_concurrent": 8}
    if is_chat:
        asked["base_url"] = f"{url}/chat/completions"
        return own, evaluate(rows, task, "local-chat-completions", is_chat, **asked)
    asked |= {"base_url": f"{url}/completions", "tokenizer": SOURCE, "tokenizer_backend": "huggingface"}
    return own, evaluate(rows, task, "local-completions", is_chat, **asked)


def test_choices(rows: Path) -> None:
    own, ours = both(rows, CHOICE)
    print(own[0], ours[0])
    assert ours[0] == own[0]
    assert len(ours[1]) == len(ROWS)


def test_rolling(rows: Path) -> None:
    own, ours = both(rows, ROLLING)
    print(own[0], ours[0])
    # Both compute in bfloat16, in other batches. The perplexity is this to the power of a word's length.
    bits = "bits_per_byte,none"
    assert ours[0][bits] == pytest.approx(own[0][bits], rel=1e-3)


def test_chat_answers(rows: Path) -> None:
    own, ours = both(rows, ANSWER, is_chat=True)
    print(own, ours)
    assert ours == own

"""Families whose attention is more than keys and values under a causal mask: served like `generate` on both
sides of every bound that their configuration names, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import (
    BOS,
    CONTEXT,
    EOS,
    HEADS,
    HIDDEN,
    INNER,
    PAD,
    VOCABULARY,
    save_model,
    save_tokenizer,
)
from tests.engine_requests import a_request, run
from tidegate.engines.base import EngineLoadError, LoadReport
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.replica_args import EngineSpec

WINDOW = 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN // 2,
    "intermediate_size": INNER // 2,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {
    **SMALL,
    **EXPERTS,
    "attention_chunk_size": WINDOW,
    "floor_scale": 32,
    "intermediate_size_mlp": INNER // 2,
    "no_rope_layers": [1, 0],
}
# Together in a batch.
BATCHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": (
        "gemma3",
        {"text_config": {**SMALL, **SLIDING}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "gemma3_text": ("gemma3_text", {**SMALL, **SLIDING}),
    "llama4_text": ("llama4_text", {**LLAMA4, "attn_temperature_tuning": False}),
    "gpt_oss": ("gpt_oss", {**SMALL, **SLIDING, **EXPERTS}),
    "cohere2": ("cohere2", {**SMALL, **SLIDING}),
    "qwen2": ("qwen2", {**SMALL, **SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "mistral": ("mistral", {**SMALL, "sliding_window": WINDOW}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": CONTEXT,
        },
    ),
}
# One by one, and a word of the reason why.
ALONE: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    # Its temperature counts what the cache holds, a row's padding with it.
    "llama4_text": ("llama4_text", {**LLAMA4, "attn_temperature_tuning": True}, "batched logits differ"),
}
PROMPTS = (7, 50, 90, 23, 130)  # tokens
LENGTHS = (70, 30, 20, 60, 10)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(kind: str, size: Mapping[str, Any]) -> Path:
        save_model(tmp_path, kind, size)
        save_tokenizer(tmp_path)
        return tmp_path

    return make


def loaded(folder: Path, **spec: Any) -> tuple[TransformersEngine, LoadReport]:
    engine = TransformersEngine(
        EngineSpec(
            "transformers", str(folder), precision="float32", device="cpu", args={"threads": 1}, **spec
        )
    )
    return engine, engine.load()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPTS]


def generated(folder: Path, prompt: list[int], length: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
    return [int(token) for token in out[0, len(prompt) :]]


def assert_equals_generate(engine: TransformersEngine, folder: Path) -> None:
    expected = [generated(folder, prompt, length) for prompt, length in zip(prompts(), LENGTHS, strict=True)]
    assert len({token for tokens in expected for token in tokens}) > 5
    requests = [
        a_request(str(index), prompt, max_tokens=length)
        for index, (prompt, length) in enumerate(zip(prompts(), LENGTHS, strict=True))
    ]
    for apart in (0, 4):
        results = run(engine, requests, apart=apart)
        assert [results[request.id].tokens for request in requests] == expected


@pytest.mark.parametrize("name", BATCHED)
def test_a_bounded_attention_runs_in_batches(name: str, made: Callable[..., Path]) -> None:
    folder = made(*BATCHED[name])
    engine, report = loaded(folder)
    assert report.notes == ()
    assert_equals_generate(engine, folder)


@pytest.mark.parametrize("name", ALONE)
def test_what_no_batch_holds_runs_row_by_row(name: str, made: Callable[..., Path]) -> None:
    kind, size, word = ALONE[name]
    folder = made(kind, size)
    engine, report = loaded(folder)
    assert report.notes[0].startswith("Requests run one by one")
    assert word in report.notes[0]
    assert_equals_generate(engine, folder)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
def test_positions_that_generate_does_not_give_are_refused_by_name(
    kind: str, made: Callable[..., Path]
) -> None:
    with pytest.raises(EngineLoadError) as caught:
        loaded(made(kind, {**SMALL, "is_decoder": True}))
    assert caught.value.reason == "SelfCheckFailed"
    assert f"({kind})" in caught.value.message

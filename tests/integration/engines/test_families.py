"""Families whose attention is more than keys and values under a causal mask: served like `generate` on both
sides of every bound that their configuration names, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
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
from tidegate.engines.transformers.batch import RowByRow
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.replica_args import EngineSpec

WINDOW = 64
SMALL = {
    "vocab_size": VOCABULARY + 8,  # qwen2's tokenizer adds one
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
    "ministral3": (
        "ministral3",
        {
            **SMALL,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": WINDOW,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
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
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0, 20.0],
    "original_max_position_embeddings": WINDOW,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MLA = {
    **SMALL,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
INDEXER = {"index_topk": 32, "index_n_heads": 2, "index_head_dim": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": HEADS, "n_inner": INNER // 2}
OTHERWISE: Mapping[str, Mapping[str, Any]] = {
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": HEADS, "d_inner": INNER // 2},
    "xmod": {**SMALL, "is_decoder": True},
}
# One by one, and a word of the reason why.
ALONE: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    # Its temperature counts what the cache holds, a row's padding with it.
    "llama4_text": ("llama4_text", {**LLAMA4, "attn_temperature_tuning": True}, "batched logits differ"),
    # Past a length, all rows of a batch would get other rotary factors.
    "phi3": (
        "phi3",
        {**SMALL, "rope_parameters": LONGROPE, "original_max_position_embeddings": WINDOW},
        "contextLength 64 or less",
    ),
    "phimoe": (
        "phimoe",
        {
            **SMALL,
            **EXPERTS,
            "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
            "original_max_position_embeddings": WINDOW,
        },
        "contextLength 64 or less",
    ),
    "llama": ("llama", {**SMALL, "rope_parameters": LONGROPE}, "contextLength 64 or less"),
    # Caches of other kinds.
    "deepseek_v32": ("deepseek_v32", {**MLA, **INDEXER}, "its cache has layers of another kind"),
    # Its layers keep the state of what ran last in themselves.
    "recurrent_gemma": (
        "recurrent_gemma",
        {**SMALL, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": WINDOW},
        "its cache has layers of another kind",
    ),
    "rwkv": (
        "rwkv",
        {"hidden_size": 64, "num_hidden_layers": 2, "context_length": CONTEXT},
        "its cache has layers of another kind",
    ),
    "glm_moe_dsa": ("glm_moe_dsa", {**MLA, **INDEXER}, "its cache has layers of another kind"),
}
PROMPTS = (7, 50, 90, 23, 130)  # tokens
LENGTHS = (60, 20, 8, 45, 6)


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


def loaded(folder: Path, record: Path | None = None, **spec: Any) -> tuple[TransformersEngine, LoadReport]:
    engine = TransformersEngine(
        EngineSpec(
            "transformers", str(folder), precision="float32", device="cpu", args={"threads": 1}, **spec
        ),
        record,
    )
    return engine, engine.load()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPTS]


def generated(folder: Path, prompts: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """What `generate` answers to each prompt alone, on a model that has seen no other."""
    fresh: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt, length in zip(prompts, lengths, strict=True):
        out = copy.deepcopy(fresh).generate(
            torch.tensor([prompt]),
            # Or it would take a padding token that the prompt itself has for padding.
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        answers.append([int(token) for token in out[0, len(prompt) :]])
    return answers


def assert_equals_generate(engine: TransformersEngine, folder: Path, *, arrivals: Sequence[int]) -> None:
    """`arrivals`: steps between one request and the next; 0: all at once."""
    expected = generated(folder, prompts(), LENGTHS)
    assert len({token for tokens in expected for token in tokens}) > 3
    requests = [
        a_request(str(index), prompt, max_tokens=length)
        for index, (prompt, length) in enumerate(zip(prompts(), LENGTHS, strict=True))
    ]
    for apart in arrivals:
        results = run(engine, requests, apart=apart)
        assert [results[request.id].tokens for request in requests] == expected


@pytest.mark.parametrize("name", BATCHED)
def test_a_bounded_attention_runs_in_batches(name: str, made: Callable[..., Path]) -> None:
    folder = made(*BATCHED[name])
    engine, report = loaded(folder)
    assert report.notes == ()
    assert_equals_generate(engine, folder, arrivals=(0, 4))


@pytest.mark.parametrize("name", ALONE)
def test_what_no_batch_holds_runs_row_by_row(name: str, made: Callable[..., Path]) -> None:
    kind, size, word = ALONE[name]
    folder = made(kind, size)
    engine, report = loaded(folder)
    assert report.notes[0].startswith("Requests run one by one")
    assert word in report.notes[0]
    assert_equals_generate(engine, folder, arrivals=(4,))


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
def test_positions_that_generate_does_not_give_are_refused_by_name(
    kind: str, made: Callable[..., Path]
) -> None:
    with pytest.raises(EngineLoadError) as caught:
        loaded(made(kind, {**SMALL, "is_decoder": True}))
    assert caught.value.reason == "SelfCheckFailed"
    assert f"({kind})" in caught.value.message


@pytest.mark.parametrize(
    ("kind", "size"),
    [("llama", {**SMALL, "max_position_embeddings": 8}), ("gpt2", {**GPT2, "n_positions": 8})],
)
def test_a_context_shorter_than_the_probe_is_proved_within_it(
    kind: str, size: Mapping[str, Any], made: Callable[..., Path]
) -> None:
    folder = made(kind, size)
    engine, report = loaded(folder)
    assert (report.context_length, report.notes) == (8, ())
    result = run(engine, [a_request("r", [5, 6, 7])])["r"]
    assert [result.tokens] == generated(folder, [[5, 6, 7]], [5])


@pytest.mark.parametrize("kind", ["xlnet", "xmod"])
def test_what_decodes_otherwise_than_its_forward_pass_is_refused_by_name(
    kind: str, made: Callable[..., Path]
) -> None:
    """xlnet looks ahead, xmod wants a language."""
    with pytest.raises(EngineLoadError) as caught:
        loaded(made(kind, OTHERWISE[kind]))
    assert caught.value.reason == "SelfCheckFailed"
    assert f"({kind}) cannot be served" in caught.value.message


def test_dynamic_factors_follow_from_the_row_alone(made: Callable[..., Path]) -> None:
    """Past `max_position_embeddings`, where rows of other lengths leave other factors behind."""
    folder = made("llama", {**SMALL, "max_position_embeddings": WINDOW, "rope_parameters": DYNAMIC})
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = RowByRow(model)
    chosen = [[int(row.argmax())] for row in batch.join(prompts())]
    for _ in range(39):
        logits = batch.decode(torch.tensor([tokens[-1] for tokens in chosen]))
        for tokens, row in zip(chosen, logits, strict=True):
            tokens.append(int(row.argmax()))
    assert chosen == generated(folder, prompts(), [40] * len(PROMPTS))


def test_rows_below_the_switch_of_rotary_factors_run_together(made: Callable[..., Path]) -> None:
    kind, size, _ = ALONE["phi3"]
    _, report = loaded(made(kind, size), context_length=WINDOW)
    assert report.notes == ()

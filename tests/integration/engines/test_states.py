"""State-space models, linear attention and hybrids: rows that hold a state each run together, and give what
`generate` gives for each prompt alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from transformers import AutoModelForCausalLM

from tests.checkpoints import VOCABULARY, save_model, save_tokenizer
from tests.engine_requests import a_request, run, run_one, run_steps
from tests.integration.engines.test_families import INDEXER, MLA, SMALL, generated, loaded
from tidegate.engines.transformers.batch import ArenaBatch
from tidegate.engines.transformers.kv_size import measure_kv
from tidegate.sources.facts import decoder_shape, kv_bytes_per_token, state_bytes

STATES = {"hidden_size": 64, "num_hidden_layers": 3}
MAMBA2 = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 32,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
STATEFUL: Mapping[str, Mapping[str, Any]] = {
    "mamba": {**STATES, "state_size": 8},
    "falcon_mamba": {**STATES, "state_size": 8},
    "mamba2": {
        **STATES,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 32,
    },
    "bamba": {**SMALL, **MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**SMALL, **MAMBA2, "mamba_d_ssm": 128},  # both in one layer
    "granitemoehybrid": {
        **SMALL,
        **MAMBA2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {
        **SMALL,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba": {
        **SMALL,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **SMALL,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "chunk_size": 32,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
    "nemotron_h": {
        **SMALL,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "moe"],  # the last keeps nothing
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "use_mamba_kernels": False,
    },
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**SMALL, **LINEAR, **EXPERTS},
    "qwen3_5_text": {**SMALL, **LINEAR},
    "olmo_hybrid": {**SMALL, **LINEAR},
    "kimi_linear": {
        **MLA,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
}
# Prompts that a convolution sees whole, and longer ones.
PROMPTS = (7, 1, 50, 2, 90, 3, 55)  # tokens
LENGTHS = (30, 12, 20, 9, 8, 16, 10)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        save_model(tmp_path, kind, STATEFUL[kind])
        save_tokenizer(tmp_path)
        return tmp_path

    return make


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPTS]


@pytest.mark.parametrize("kind", STATEFUL)
def test_rows_with_a_state_run_together(kind: str, made: Callable[[str], Path]) -> None:
    """They join at once and apart, leave, and take rows that others have left. A sampled answer that goes on
    elsewhere, beside others, is the undisturbed one."""
    folder = made(kind)
    engine, report = loaded(folder)
    assert report.notes == ()
    assert isinstance(engine._batch, ArenaBatch)
    expected = generated(folder, prompts(), LENGTHS)
    assert len({token for tokens in expected for token in tokens}) > 3
    requests = [
        a_request(str(index), prompt, max_tokens=length)
        for index, (prompt, length) in enumerate(zip(prompts(), LENGTHS, strict=True))
    ]
    for apart in (0, 4):
        results = run(engine, requests, apart=apart)
        assert [results[request.id].tokens for request in requests] == expected
    sampled = a_request("r", prompts()[0], max_tokens=20, temperature=0.9, top_p=0.95, frequency_penalty=0.4)
    whole = run_one(engine, sampled)
    begun = run_steps(engine, sampled, 9)
    rest = run(engine, [*requests, sampled], apart=1, logs={"r": begun.log})["r"]
    assert len(begun.tokens) == 9
    assert begun.tokens + rest.tokens == whole.tokens
    assert not engine.has_work()


def test_rows_with_a_state_follow_a_grammar(made: Callable[[str], Path]) -> None:
    """What it forces they take token by token."""
    engine, _ = loaded(made("mamba"))
    form = LLMatcher.grammar_from_lark('start: "The level is " /[0-9]{3}/ " metres above the sea."')
    requests = [
        a_request(
            str(seed), "Level?", seed=seed, temperature=1.0, max_tokens=60, grammar=form, ignore_eos=False
        )
        for seed in range(3)
    ]
    for result in run(engine, requests, apart=2).values():
        assert re.fullmatch("The level is [0-9]{3} metres above the sea.", result.text)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minicpm3"])
def test_the_control_loop_computes_what_latent_attention_keeps(kind: str, tmp_path: Path) -> None:
    is_sparse = kind in ("deepseek_v32", "glm_moe_dsa")
    save_model(tmp_path, kind, {**MLA, "head_dim": 8, **(INDEXER if is_sparse else {})})
    shape = decoder_shape(json.loads((tmp_path / "config.json").read_text()))
    found = measure_kv(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert shape.is_known
    # A sparse one keeps a position beside.
    assert found.bytes_per_token - 8 * is_sparse == kv_bytes_per_token(shape, "float32") > 0


@pytest.mark.parametrize("kind", sorted(STATEFUL))
def test_the_control_loop_computes_what_a_row_takes(kind: str, made: Callable[[str], Path]) -> None:
    folder = made(kind)
    shape = decoder_shape(json.loads((folder / "config.json").read_text()))
    found = measure_kv(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert shape.is_known
    assert found.bytes_per_row > 0
    assert (found.bytes_per_token, found.bytes_per_row) == (
        kv_bytes_per_token(shape, "float32"),
        state_bytes(shape),
    )


def test_the_state_of_a_row_counts_towards_the_cache(made: Callable[[str], Path]) -> None:
    folder = made("mamba")
    row = 3 * 128 * (4 + 8) * 4  # layers, channels, convolution and state, bytes
    engine, report = loaded(folder, kv_cache_bytes=3 * row)
    assert (report.kv_bytes_per_token, engine.free_slots()) == (0, 3)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "bamba"])
@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_every_slot_is_taken(kind: str, slots: int, made: Callable[[str], Path], tmp_path: Path) -> None:
    """Also the last one: of states alone a row of more tokens takes no more. So it is where the model loads
    as it is remembered."""
    folder, record = made(kind), tmp_path / "record"
    for _ in range(2):
        engine, report = loaded(folder, record=record, max_slots=slots)
        assert (report.notes, report.slots) == ((), slots)
        lengths = [*PROMPTS[: slots - 1], 90]  # the last one is prefilled in parts, where that is done
        prompts = [[3 + (row + token) % 90 for token in range(length)] for row, length in enumerate(lengths)]
        requests = [a_request(str(row), prompt, max_tokens=70) for row, prompt in enumerate(prompts)]
        results = run(engine, requests, apart=2)
        assert [results[request.id].tokens for request in requests] == generated(
            folder, prompts, [70] * slots
        )


def test_a_row_whose_numbers_are_not_finite_leaves_nothing_behind(made: Callable[[str], Path]) -> None:
    folder = made("bamba")
    engine, _ = loaded(folder)
    batch: Any = engine._batch
    decode = batch.decode

    def poison(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = decode(tokens)
        rows = [row for row, sequence in enumerate(engine._scheduler.running) if sequence.id == "bad"]
        for layer in batch._arena._arena_layers:
            for held in getattr(layer, "_held", {}).values():
                held[rows] = float("nan")
        logits[rows] = float("nan")
        return logits

    batch.decode = poison
    results = run(engine, [a_request("bad", [5] * 40, max_tokens=9), a_request("good", [7, 8], max_tokens=9)])
    assert results["bad"].finish is not None
    assert results["bad"].finish.code == "NumericalError"
    after = run(engine, [a_request("a", [9], max_tokens=9), a_request("b", [5] * 60, max_tokens=9)])
    found = [{**results, **after}[name].tokens for name in ("good", "a", "b")]
    assert found == generated(folder, [[7, 8], [9], [5] * 60], [9] * 3)

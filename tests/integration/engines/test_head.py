"""Log probabilities of prompts: the plain forward pass's, from logits of a bounded part of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import HEADS, save_model, save_tokenizer
from tests.engine_requests import a_request, run_one, run_steps
from tests.integration.engines.test_families import ALONE, BATCHED, SMALL
from tests.integration.engines.test_states import STATEFUL
from tidegate.engines.transformers import decoder_step, row_values
from tidegate.engines.transformers.batch import RowByRow
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.engines.transformers.head import Head, InParts
from tidegate.replica_args import EngineSpec

PROMPT = [(7 * n) % 400 + 3 for n in range(61)]
ROWS = 8  # that a part of the test may have
# What stands between their hidden states and their logits, or before, is of every kind.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "plain": ("llama", SMALL),
    "soft cap": ("gemma2", {**SMALL, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "divided": ("granite", {**SMALL, "logits_scaling": 3.0}),
    "multiplied": ("cohere", {**SMALL, "logit_scale": 0.25}),
    "a decoder in the base model, and a projection": (
        "opt",
        {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "a base model of another name": BATCHED["llama4_text"],
    "composite": BATCHED["gemma3"],
    "biased head": ("phi", SMALL),
    "one by one": ALONE["llama4_text"][:2],
    "asks for the last logits itself": ("bamba", STATEFUL["bamba"]),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TransformersEngine]:
    kind, size = FAMILIES[request.param]
    save_model(tmp_path, kind, size)
    save_tokenizer(tmp_path)
    found = TransformersEngine(
        EngineSpec("transformers", str(tmp_path), precision="float32", device="cpu", args={"threads": 1})
    )
    found.load()
    monkeypatch.setattr(row_values, "LOGITS_BYTES", ROWS * 4 * found._vocabulary_size)
    yield found
    found.close()


@pytest.fixture
def widths(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns that the output head sees at once, of what the model's own forward pass prefills."""
    monkeypatch.setattr(decoder_step, "MOST_OF_A_STEP", 0)
    seen: list[int] = []
    head = model_of(engine).get_output_embeddings()
    head.register_forward_hook(lambda _head, _inputs, logits: seen.append(logits.shape[1]))
    return seen


def model_of(engine: TransformersEngine) -> Any:
    batch: Any = engine._batch
    return (batch if isinstance(batch, RowByRow) else batch._forward)._head._model


def plain(folder: str, tokens: list[int]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([tokens]), use_cache=False).logits[0].float(), -1)


@pytest.mark.parametrize("engine", FAMILIES, indirect=True)
def test_log_probabilities_of_a_prompt_come_of_a_bounded_part_of_its_logits(
    engine: TransformersEngine, widths: list[int]
) -> None:
    request = a_request("r", PROMPT, max_tokens=12, echo=True, top_logprobs=2, prompt_logprobs=3)
    result = run_one(engine, request)
    assert max(widths) == ROWS
    assert sum(width for width in widths if width > 1) >= len(PROMPT) - 1
    tokens = PROMPT + result.tokens
    expected = plain(engine._spec.path, tokens)
    assert [entry.token_id for entry in result.logprobs] == tokens
    assert result.logprobs[0].logprob is None
    for place, entry in enumerate(result.logprobs[1:]):
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=2e-4)
        likeliest = expected[place].topk(2).values.tolist()
        assert [value for _, _, value, _ in entry.top] == pytest.approx(likeliest, abs=2e-4)
    first, *others = result.log[0].output.prompt_logprobs
    assert (first.logprob, len(others)) == (None, len(PROMPT) - 1)
    for entry, echoed in zip(others, result.logprobs[1:], strict=False):
        assert (entry.token_id, entry.logprob) == (echoed.token_id, echoed.logprob)
        assert entry.top[:2] == echoed.top and len(entry.top) == 3


@pytest.mark.parametrize("engine", ["plain", "one by one"], indirect=True)
def test_a_continued_answer_has_the_log_probabilities_of_the_undisturbed_one(
    engine: TransformersEngine, widths: list[int]
) -> None:
    request = a_request("r", PROMPT, max_tokens=20, top_logprobs=1, stop=["\0"])
    whole = run_one(engine, request)
    begun = run_steps(engine, request, 9)
    widths.clear()
    rest = run_one(engine, request, begun.log)
    assert max(widths) == ROWS
    found = [*begun.logprobs, *rest.logprobs]
    assert [entry.token_id for entry in found] == whole.tokens
    for entry, expected in zip(found, whole.logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected.logprob, abs=2e-4)


@pytest.mark.parametrize("engine", FAMILIES, indirect=True)
def test_a_prefill_takes_the_logits_of_one_token(engine: TransformersEngine, widths: list[int]) -> None:
    run_one(engine, a_request("r", PROMPT, max_tokens=3))
    assert set(widths) == {1}


def test_a_family_that_does_not_take_how_many_logits_to_keep() -> None:
    size = {"hidden_size": 64, "num_blocks": 2, "num_heads": HEADS, "vocab_size": 512, "chunk_size": 16}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("xlstm", **size))
    inputs = {"input_ids": torch.tensor([PROMPT[:48]]), "use_cache": False}
    parts: list[torch.Tensor] = []
    with torch.inference_mode():
        whole = model(**inputs).logits
        last = Head(model).run(inputs, last=3).logits
        Head(model).run(inputs, every=InParts(20, parts.append))
    torch.testing.assert_close(last, whole[:, -3:])
    assert [len(part) for part in parts] == [20, 20, 8]
    torch.testing.assert_close(torch.cat(parts), whole[0])


@pytest.mark.parametrize("engine", ["plain"], indirect=True)
def test_a_model_is_left_as_it_was(engine: TransformersEngine) -> None:
    model = model_of(engine)
    head, ids = Head(model), torch.tensor([PROMPT])

    def fail(_logits: torch.Tensor) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        head.run({"input_ids": ids}, every=InParts(ROWS, fail))
    assert not [module for module in model.modules() if "forward" in vars(module)]
    with torch.inference_mode():
        assert model(ids).logits.shape[1] == len(PROMPT)

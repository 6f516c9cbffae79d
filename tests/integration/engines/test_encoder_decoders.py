"""Encoder-decoders: batches that rows join and leave give what `generate` gives for each prompt alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.checkpoints import CONTEXT, ENCODER_DECODERS, EOS, VOCABULARY, save_model, save_tokenizer
from tests.engine_requests import a_request, add, run, run_one, run_steps
from tidegate.engines.base import Engine
from tidegate.engines.transformers import selfcheck
from tidegate.engines.transformers.encoder_decoder import EncoderDecoderBatch, EncoderDecoderRows
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.messages.work import MODEL_DEFAULTS
from tidegate.replica_args import EngineSpec

SOURCES = (7, 50, 90, 23, 130, 1)  # tokens
LENGTHS = (60, 20, 8, 45, 6, 30)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in SOURCES]


def generated(folder: Path, prompt: list[int], length: int, **options: Any) -> list[int]:
    """What `generate` answers to one prompt alone."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=length, do_sample=False, **{"eos_token_id": None, **options}
    )
    return [int(token) for token in out[0, 1:]]


@pytest.mark.parametrize("arch", sorted(ENCODER_DECODERS))
def test_rows_that_join_and_leave_equal_generate(
    arch: str, load: Callable[..., Engine], checkpoints: Callable[[str], Path]
) -> None:
    engine = load(arch)
    expected = [
        generated(checkpoints(arch), prompt, length)
        for prompt, length in zip(prompts(), LENGTHS, strict=True)
    ]
    assert len({token for tokens in expected for token in tokens}) > 4
    assert len({tuple(tokens[:6]) for tokens in expected}) > 3  # the prompts are read
    requests = [
        a_request(str(index), prompt, max_tokens=length)
        for index, (prompt, length) in enumerate(zip(prompts(), LENGTHS, strict=True))
    ]
    for apart in (0, 5):
        results = run(engine, requests, apart=apart)
        assert [results[request.id].tokens for request in requests] == expected
        assert [results[request.id].prompt_tokens for request in requests] == list(SOURCES)
    assert not engine.has_work()


@pytest.mark.parametrize("arch", sorted(ENCODER_DECODERS))
def test_a_sampled_stream_continued_elsewhere_equals_the_undisturbed_one(
    arch: str, load: Callable[..., Engine]
) -> None:
    """Also beside others, whose prompts are longer and shorter."""
    engine = load(arch)
    sampling = {"temperature": 0.9, "top_p": 0.95, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
    request = a_request("r", prompts()[1], max_tokens=24, top_logprobs=2, **sampling)
    whole = run_one(engine, request)
    begun = run_steps(engine, request, 9)
    others = [a_request(str(index), prompt, max_tokens=12) for index, prompt in enumerate(prompts())]
    rest = run(engine, [*others, request], apart=1, logs={"r": begun.log})["r"]
    assert len(begun.tokens) == 9
    assert begun.tokens + rest.tokens == whole.tokens
    assert begun.text + rest.text == whole.text
    assert rest.finish == whole.finish
    logprobs = [entry.logprob for entry in begun.logprobs + rest.logprobs]
    assert logprobs == pytest.approx([entry.logprob for entry in whole.logprobs], abs=1e-4)
    assert len(logprobs) == 24


def test_logprobs_are_those_of_generate(
    load: Callable[..., Engine], checkpoints: Callable[[str], Path]
) -> None:
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(checkpoints("t5"), dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompts()[0]]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = [logits.log_softmax(-1).max().item() for logits in out.logits]
    result = run_one(load("t5"), a_request("r", prompts()[0], max_tokens=12, top_logprobs=0))
    assert [entry.logprob for entry in result.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("bart", {"forced_bos_token_id": 9, "forced_eos_token_id": 2, "min_length": 12}),
        ("mbart", {"forced_bos_token_id": 7, "no_repeat_ngram_size": 2}),
        ("pegasus", {"repetition_penalty": 1.7, "forced_eos_token_id": 2}),
        ("t5", {"begin_suppress_tokens": [5, 6, 7], "suppress_tokens": [8, 9]}),
    ],
)
def test_the_generation_config_is_obeyed(
    arch: str,
    fields: dict[str, Any],
    load: Callable[..., Engine],
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(checkpoints(arch), tmp_path / arch))
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    engine = load(folder)
    wanted = {"ignore_eos": False, "left_out": MODEL_DEFAULTS}
    requests = [a_request(str(i), prompt, max_tokens=20, **wanted) for i, prompt in enumerate(prompts())]
    results = run(engine, requests, apart=2)
    for index, prompt in enumerate(prompts()):
        assert results[str(index)].tokens == generated(folder, prompt, 20, eos_token_id=EOS)


def test_an_end_that_is_forced_is_told_as_the_length_that_it_is(load: Callable[..., Engine]) -> None:
    result = run_one(load("bart"), a_request("r", prompts()[0], max_tokens=9, ignore_eos=False))
    assert result.finish is not None
    assert (len(result.tokens), result.tokens[-1], result.finish.reason) == (9, EOS, "length")


def test_the_longest_answer_of_the_generation_config_is_the_default(
    load: Callable[..., Engine], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """It counts the token that the decoder starts from, as `generate` does."""
    folder = Path(shutil.copytree(checkpoints("t5"), tmp_path / "t5"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_length": 10}))
    assert len(run_one(load(folder), a_request("r", prompts()[0])).tokens) == 9


def test_prompt_and_answer_have_the_context_each(load: Callable[..., Engine]) -> None:
    engine = load("bart")
    whole = run_one(engine, a_request("r", [5] * CONTEXT))
    assert whole.finish is not None
    assert (whole.prompt_tokens, len(whole.tokens), whole.finish.reason) == (CONTEXT, CONTEXT, "length")
    for prompt, most in ((CONTEXT + 1, 5), (CONTEXT + 1, None), (3, CONTEXT + 1)):
        refused = add(engine, a_request("r", [5] * prompt, max_tokens=most))
        assert refused is not None
        assert refused.finish is not None
        assert refused.finish.code == "ContextLengthExceeded"
        assert "256 tokens, for the prompt and for the answer each" in refused.finish.message


@pytest.mark.parametrize(
    ("name", "asked"), [("echo", {"echo": True}), ("prompt_logprobs", {"prompt_logprobs": 1})]
)
def test_what_asks_for_the_prompt_is_refused_by_name(
    name: str, asked: dict[str, Any], load: Callable[..., Engine]
) -> None:
    refused = add(load("t5"), a_request("r", [5, 6], max_tokens=3, **asked))
    assert refused is not None
    assert refused.finish is not None
    assert refused.finish.code == "InvalidPrompt"
    assert refused.finish.message.startswith(f"{name}: 'tiny' is an encoder-decoder.")


def test_a_text_is_read_whole(load: Callable[..., Engine], tmp_path: Path) -> None:
    """With the end token that the tokenizer puts behind it, which a decoder's prompt goes on without; a chat
    template writes its own."""
    save_model(tmp_path, *ENCODER_DECODERS["t5"], auto="AutoModelForSeq2SeqLM")
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    tokenizer.save_pretrained(tmp_path)
    engine = load(tmp_path)
    ids = tokenizer("The tide")["input_ids"]
    assert ids[-1] == EOS
    result = run_one(engine, a_request("r", "The tide", max_tokens=20, returns_prompt_ids=True))
    assert result.tokens == generated(tmp_path, ids, 20)
    assert result.log[0].output.prompt_ids == ids
    assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
    messages = [{"role": "user", "content": "The tide"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert run_one(engine, a_request("r", messages, max_tokens=20)).tokens == generated(tmp_path, ids, 20)


class Misplaced(EncoderDecoderBatch):
    """Puts a row's answer one position off."""

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            self._positions += 1
            logits = super().decode(tokens)
            self._positions -= 1
        return logits


def test_a_wrong_batch_is_found_and_requests_run_one_by_one(
    checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "EncoderDecoderBatch", Misplaced)
    engine = TransformersEngine(
        EngineSpec("transformers", str(checkpoints("bart")), device="cpu", args={"threads": 1})
    )
    (note,) = engine.load().notes
    assert note.startswith("Requests run one by one, which is slower: batched logits differ by")
    assert isinstance(engine._batch, EncoderDecoderRows)
    requests = [a_request(str(index), prompt, max_tokens=12) for index, prompt in enumerate(prompts())]
    results = run(engine, requests, apart=2)
    for index, prompt in enumerate(prompts()):
        assert results[str(index)].tokens == generated(checkpoints("bart"), prompt, 12)
    engine.close()


def test_a_row_whose_numbers_are_not_finite_leaves_nothing_behind(
    load: Callable[..., Engine], checkpoints: Callable[[str], Path]
) -> None:
    engine: Any = load("t5")
    decode = engine._batch.decode

    def poison(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = decode(tokens)
        rows = [row for row, sequence in enumerate(engine._scheduler.running) if sequence.id == "bad"]
        for layer in engine._batch._cross.layers:
            layer.keys[rows] = float("nan")
        logits[rows] = float("nan")
        return logits

    engine._batch.decode = poison
    results = run(engine, [a_request("bad", [5] * 40, max_tokens=9), a_request("good", [7, 8], max_tokens=9)])
    assert results["bad"].finish is not None
    assert results["bad"].finish.code == "NumericalError"
    after = run(engine, [a_request("a", [9], max_tokens=9), a_request("b", [5] * 60, max_tokens=9)])
    expected = {"good": [7, 8], "a": [9], "b": [5] * 60}
    for name, prompt in expected.items():
        assert {**results, **after}[name].tokens == generated(checkpoints("t5"), prompt, 9)

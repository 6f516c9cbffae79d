"""Vectors and judgements equal those of sentence-transformers and transformers on the same files."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from sentence_transformers import CrossEncoder, SentenceTransformer

from tests.encoders import MINILM, tiny_encoder, with_modules, write
from tests.engine_requests import a_request
from tidegate.engines.base import Engine, EngineLoadError, Prepared, StepOutput
from tidegate.engines.create import create_engine
from tidegate.engines.transformers import packed
from tidegate.messages.work import (
    Embed,
    Finish,
    Inputs,
    PairPrompt,
    Score,
    Scores,
    TextPrompt,
    Tokenize,
    TokenPrompt,
    Tokens,
    Vectors,
)
from tidegate.replica_args import EngineSpec
from tidegate.sources.checkpoint import read_description

TEXTS = (
    "The tide comes in.",
    "水 flows under the bridge",
    "A",
    "Hello there, how are you? I am fine, thank you very much indeed. " * 3,
    "the gates of the harbour are closed at night",
)
_loops = ThreadPoolExecutor(1)


@pytest.fixture(scope="module")
def minilm() -> Iterator[Engine]:
    engine = loaded(MINILM)
    yield engine
    engine.close()


def loaded(path: Path, **spec: Any) -> Engine:
    """With the task that resolving finds, as a host names it to its replicas."""
    args = {"threads": 1, **spec.pop("args", {})}
    spec.setdefault("task", read_description(path, "").task)
    spec.setdefault("precision", "float32")
    engine = create_engine(EngineSpec("transformers", path=str(path), device="cpu", args=args, **spec))
    engine.load()
    return engine


def prepared(engine: Engine, work: Embed | Score | Tokenize, name: str = "a.0") -> Prepared | Tokens | Finish:
    request = replace(a_request(name, ""), work=work)
    return _loops.submit(asyncio.run, engine.prepare(request)).result()


def run(engine: Engine, *works: Embed | Score) -> list[StepOutput]:
    """All of them together, in their order."""
    for place, work in enumerate(works):
        ready = prepared(engine, work, f"a.{place}")
        assert isinstance(ready, Prepared), ready
        assert engine.add(ready, []) is None
    outputs: dict[str, StepOutput] = {}
    while engine.has_work():
        outputs |= {output.request_id: output for output in engine.step()}
    assert engine.free_slots() == 64
    return [outputs[f"a.{place}"] for place in range(len(works))]


def texts(*found: str) -> Inputs:
    return Inputs([TextPrompt(text) for text in found])


def vectors(output: StepOutput) -> torch.Tensor:
    assert isinstance(output.result, Vectors), output.finish
    values = struct.unpack(f"<{len(output.result.values) // 4}f", output.result.values)
    return torch.tensor(values).view(-1, output.result.dimensions)


def embedded(engine: Engine, found: Sequence[str], **asked: Any) -> torch.Tensor:
    return vectors(run(engine, Embed(texts(*found), **asked))[0])


def refused(engine: Engine, work: Embed | Score) -> Finish:
    found = prepared(engine, work)
    assert isinstance(found, Finish)
    return found


def test_the_small_real_model_equals_sentence_transformers(minilm: Engine) -> None:
    expected = torch.tensor(SentenceTransformer(str(MINILM), device="cpu").encode(list(TEXTS)))
    one, other = run(minilm, Embed(texts(*TEXTS)), Embed(texts(*TEXTS[::-1])))
    torch.testing.assert_close(vectors(one), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(vectors(other), expected.flip(0), atol=1e-3, rtol=0)
    assert one.finish is not None
    assert one.finish.prompt_tokens == one.prompt_tokens > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_where_the_processor_has_none(
    precision: str, minilm: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "has_product", lambda _: False)
    engine: Any = loaded(MINILM, precision=precision)
    layers = {type(module) for module in engine._model.modules()}
    assert packed.FbgemmLinear in layers
    assert torch.nn.Linear not in layers
    alike = torch.cosine_similarity(embedded(engine, TEXTS), embedded(minilm, TEXTS))
    assert alike.min() > (0.999 if precision == "bfloat16" else 0.99999)
    engine.close()


def test_fewer_dimensions_are_normalised_again(minilm: Engine) -> None:
    whole, part = embedded(minilm, TEXTS), embedded(minilm, TEXTS, dimensions=7)
    torch.testing.assert_close(part, torch.nn.functional.normalize(whole[:, :7]), atol=1e-5, rtol=0)


def test_tokens_are_taken_as_they_are(minilm: Engine) -> None:
    ids = prepared(minilm, Tokenize(TextPrompt("The tide comes in.")))
    assert isinstance(ids, Tokens)
    given = [*ids.prompt_ids, 102]  # what a prompt to go on leaves out
    [output] = run(minilm, Embed(Inputs([TokenPrompt(given)])))
    torch.testing.assert_close(vectors(output), embedded(minilm, TEXTS[:1]), atol=1e-5, rtol=0)


def test_a_cut_input_keeps_its_first_tokens_and_what_stands_around_them(minilm: Engine) -> None:
    cut = embedded(minilm, ["the tide comes in " * 200], truncate=4)
    torch.testing.assert_close(cut, embedded(minilm, ["the tide"]), atol=1e-5, rtol=0)
    assert embedded(minilm, ["the tide comes in " * 200], truncate=-1).shape == (1, 384)


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (
            Embed(Inputs([TextPrompt("a"), TextPrompt("a " * 300)], 8)),
            "ContextLengthExceeded",
            "input 9 has 302",
        ),
        (Embed(texts("a"), dimensions=385), "TooManyDimensions", "384"),
        (Embed(texts("a"), truncate=2), "TruncatedTooFar", "at least 3"),
        (Embed(texts("a"), prompt_name="query"), "UnknownPromptName", "none"),
        (Embed(Inputs([TokenPrompt([30522])])), "InvalidPrompt", "30522"),
        (Score(texts("a")), "WrongTask", "embed"),
    ],
)
def test_what_cannot_be_is_refused(minilm: Engine, work: Embed | Score, code: str, said: str) -> None:
    finish = refused(minilm, work)
    assert (finish.reason, finish.code) == ("error", code)
    assert said in finish.message


def test_an_aborted_request_leaves_nothing(minilm: Engine) -> None:
    ready = prepared(minilm, Embed(texts(*TEXTS)))
    assert isinstance(ready, Prepared)
    minilm.add(ready, [])
    minilm.step()
    minilm.abort(ready.request.id)
    assert (minilm.has_work(), minilm.free_slots()) == (False, 64)


MEAN = {"pooling_mode_mean_tokens": True}
WEIGHTED = {"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True}


@pytest.mark.parametrize(
    ("name", "pooling", "more"),
    [
        ("bert", {"pooling_mode": "cls"}, {}),
        ("bert", {"pooling_mode": ["max", "mean"]}, {"normalises": False}),
        ("bert", {"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_mean_tokens": False}, {}),
        ("bert", MEAN, {"dense": {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}}),
        ("bert", MEAN, {"prompts": {"query": "query: "}, "default_prompt": "query"}),
        ("bert", MEAN, {"prompts": {"query": "Query: "}, "default_prompt": "query", "lowers": True}),
        ("bert", MEAN, {"lowers": True}),
        ("roberta", MEAN, {}),
        ("xlm-roberta", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {}),
        ("mpnet", MEAN, {}),
        ("modernbert", MEAN, {}),
        ("gpt_neo", WEIGHTED, {"normalises": False}),  # SGPT
        ("llama", {"pooling_mode": "lasttoken"}, {}),
    ],
)
def test_modules_of_all_families_act_as_sentence_transformers(
    tmp_path: Path, name: str, pooling: dict[str, Any], more: dict[str, Any]
) -> None:
    folder = with_modules(tiny_encoder(tmp_path / name, name), pooling, **more)
    engine = loaded(folder)
    found = embedded(engine, TEXTS)
    engine.close()
    expected = torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS)))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "mode"), [("bert", "mean"), ("gpt2", "lasttoken")])
def test_without_modules_encoders_are_averaged_and_decoders_end_with_their_last_token(
    tmp_path: Path, name: str, mode: str
) -> None:
    plain = tiny_encoder(tmp_path / "plain", name)
    engine = loaded(plain, task="embed")
    found = embedded(engine, TEXTS)
    engine.close()
    folder = with_modules(tiny_encoder(tmp_path / "modules", name), {"pooling_mode": mode})
    expected = torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS)))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_length_of_an_input_is_what_the_positions_hold(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "roberta", "roberta")
    engine = loaded(folder)
    assert vectors(run(engine, Embed(Inputs([TokenPrompt([5] * 256)])))[0]).shape == (1, 128)
    assert refused(engine, Embed(Inputs([TokenPrompt([5] * 257)]))).code == "ContextLengthExceeded"
    engine.close()
    with pytest.raises(EngineLoadError, match="256") as error:
        loaded(folder, context_length=257)
    assert error.value.reason == "InvalidEngineArgs"


PAIRS = [("where is the tide", text) for text in TEXTS]


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_scores_equal_those_of_a_cross_encoder(tmp_path: Path, name: str, activation: str | None) -> None:
    config = {} if activation is None else {"sentence_transformers": {"activation_fn": activation}}
    folder = tiny_encoder(
        tmp_path / name, name, auto="AutoModelForSequenceClassification", num_labels=1, **config
    )
    expected = CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    engine = loaded(folder)
    [output] = run(engine, Score(Inputs([PairPrompt(*pair) for pair in PAIRS])))
    engine.close()
    assert isinstance(output.result, Scores)
    assert [row[0] for row in output.result.rows] == pytest.approx(list(map(float, expected)), abs=1e-3)


@pytest.mark.parametrize(("problem", "total"), [(None, 1.0), ("multi_label_classification", None)])
def test_shares_equal_those_of_transformers(tmp_path: Path, problem: str | None, total: float | None) -> None:
    from transformers import pipeline

    folder = tiny_encoder(
        tmp_path / "bert",
        "bert",
        auto="AutoModelForSequenceClassification",
        id2label={0: "ok", 1: "toxic", 2: "spam"},
        label2id={"ok": 0, "toxic": 1, "spam": 2},
        problem_type=problem,
    )
    judge = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    expected = [{each["label"]: each["score"] for each in found} for found in judge(list(TEXTS))]
    engine = loaded(folder)
    [output] = run(engine, Score(texts(*TEXTS)))
    engine.close()
    result = output.result
    assert isinstance(result, Scores)
    assert result.labels == ["ok", "toxic", "spam"]
    for row, shares in zip(result.rows, expected, strict=True):
        assert dict(zip(result.labels, row, strict=True)) == pytest.approx(shares, abs=1e-3)
        assert total is None or sum(row) == pytest.approx(total)


def test_what_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    folder = with_modules(tiny_encoder(tmp_path / "bert", "bert"), {"pooling_mode": "mean"})
    write(folder / "1_Pooling" / "config.json", {"pooling_mode": "attention"})
    with pytest.raises(EngineLoadError, match="attention") as error:
        loaded(folder)
    assert error.value.reason == "UnsupportedModel"
    with pytest.raises(EngineLoadError, match="task is generate") as error:
        loaded(folder, task="generate")
    assert error.value.reason == "InvalidEngineArgs"

"""Checkpoints whose tokenizer does not fit the model or stands alone, from load to answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests.checkpoints import VOCABULARY
from tests.engine_requests import Result, a_request, run, run_one
from tidegate.engines.base import Engine, EngineLoadError
from tidegate.engines.create import create_engine
from tidegate.replica_args import EngineSpec

HELLO = [{"role": "user", "content": "hello"}]
Loaded = tuple[Engine, tuple[str, ...]]


@pytest.fixture
def folder(checkpoints: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints("llama"), tmp_path / "llama"))


@pytest.fixture
def load_it(folder: Path) -> Iterator[Callable[[], Loaded]]:
    engines: list[Engine] = []

    def make() -> Loaded:
        engine = create_engine(
            EngineSpec("transformers", str(folder), precision="float32", device="cpu", args={"threads": 1})
        )
        engines.append(engine)
        return engine, engine.load().notes

    yield make
    for engine in engines:
        engine.close()


def add_tokens(folder: Path, *tokens: str, template: str = "") -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def code(result: Result) -> str:
    assert result.finish is not None
    return result.finish.code


def test_a_token_beyond_the_embedding_fails_who_sends_it_alone(
    folder: Path, load_it: Callable[[], Loaded]
) -> None:
    add_tokens(folder, "<tool>", "<more>")
    engine, notes = load_it()
    assert any("2 tokens of the tokenizer (Token id 512 ('<tool>') ...)" in note for note in notes)
    alone = run_one(engine, a_request("r", "hello", max_tokens=8))
    asked = [
        a_request("ok", "hello", max_tokens=8),
        a_request("text", "to <tool>", max_tokens=8),
        a_request("chat", [{"role": "user", "content": "<more>"}], max_tokens=8),
        a_request("ids", [5, VOCABULARY + 1], max_tokens=8),
        a_request("fine chat", HELLO, max_tokens=8),
    ]
    results = run(engine, asked)
    assert results["ok"].tokens == alone.tokens
    assert [code(results[name]) for name in ("text", "chat", "ids")] == ["InvalidPrompt"] * 3
    assert code(results["fine chat"]) == ""


def test_end_and_pad_tokens_beyond_the_embedding_disturb_nobody(
    folder: Path, load_it: Callable[[], Loaded]
) -> None:
    add_tokens(folder, "<end>", "<fill>")
    change(folder / "tokenizer_config.json", eos_token="<end>", pad_token="<fill>")
    change(folder / "config.json", eos_token_id=VOCABULARY)
    change(folder / "generation_config.json", eos_token_id=[VOCABULARY], pad_token_id=VOCABULARY + 1)
    engine, notes = load_it()
    assert any(note.startswith("No end token (512)") for note in notes)
    asked = [a_request(f"{n}", [5] * (n + 1), max_tokens=9, min_tokens=5, ignore_eos=False) for n in range(3)]
    results = run(engine, asked)
    assert [len(result.tokens) for result in results.values()] == [9] * 3


def test_a_config_that_pads_beyond_the_embedding_is_refused_by_field(
    folder: Path, load_it: Callable[[], Loaded]
) -> None:
    change(folder / "config.json", pad_token_id=VOCABULARY)
    with pytest.raises(EngineLoadError) as caught:
        load_it()
    assert "config.json: pad_token_id is 512, but vocab_size is 512" in caught.value.message


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }", "<turn>{{ messages[0].content }}"]
)
def test_a_broken_template_leaves_completions(
    folder: Path, load_it: Callable[[], Loaded], template: str
) -> None:
    add_tokens(folder, "<turn>", template=template)
    engine, notes = load_it()
    assert any("template is broken" in note for note in notes)
    assert code(run_one(engine, a_request("r", HELLO, max_tokens=3))) == "ChatTemplateInvalid"
    assert len(run_one(engine, a_request("r", "hello", max_tokens=3)).tokens) == 3


def test_the_tokenizer_of_a_larger_model_is_refused(folder: Path, load_it: Callable[[], Loaded]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        token: number if number < 3 else number + VOCABULARY for token, number in vocabulary.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EngineLoadError) as caught:
        load_it()
    assert caught.value.reason == "TokenizerWrong"


def test_a_tokenizer_model_alone_is_served(
    folder: Path, load_it: Callable[[], Loaded], tmp_path: Path
) -> None:
    for file in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
        file.unlink()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(list(topics.values())[:10]))
    SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    engine, _ = load_it()
    for text in ("hello world", " café 潮汐"):
        found = run_one(engine, a_request("r", text, max_tokens=6, echo=True, top_logprobs=0))
        assert [item.token_id for item in found.logprobs] == [1, *original.encode(text), *found.tokens]
        by_ids = run_one(engine, a_request("r", [1, *original.encode(text)], max_tokens=6))
        assert (found.tokens, found.text) == (by_ids.tokens, text + by_ids.text)
        shown = b"".join(item.raw for item in found.logprobs).decode(errors="replace")
        assert shown.startswith(text)
    chat = run_one(engine, a_request("r", HELLO, max_tokens=3))
    assert chat.prompt_tokens == 1 + len(original.encode("[user] hello\n[assistant] "))

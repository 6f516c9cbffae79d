"""What is loaded as a checkpoint's tokenizer, and what is said at load."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from tests.checkpoints import EOS, VOCABULARY, save_tokenizer
from tests.engine_requests import a_request, prompt_ids
from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.tokenizer import (
    VOCABULARY_FILES,
    check_against_model,
    load_tokenizer,
    template_note,
)
from tidegate.engines.transformers.vocabulary import Vocabulary

TEXTS = [
    "hello world",
    "  two spaces  and\n\nnew ",
    "naïve café 潮汐 🌊",
    "",
    " lead",
    "tab\there 1234567",
    "a▁b ﬁ ½",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("\n".join(list(topics.values())[:10]))
    return file


def train(folder: Path, corpus: Path, kind: str, **rules: Any) -> SentencePieceProcessor:
    """Write a `tokenizer.model` and no other file of a tokenizer."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=400,
        minloglevel=2,
        num_threads=1,
        **{
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            **rules,
        },
    )
    (folder / "tokenizer.vocab").unlink()
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def refused(folder: Path) -> EngineLoadError:
    with pytest.raises(EngineLoadError) as caught:
        load_tokenizer(folder)
    return caught.value


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",), ("chat_template.jinja",)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen2", "opt", "falcon", "mistral"])
def test_without_a_vocabulary_file_nothing_is_made_up(
    folder: Path, model_type: str, kept: tuple[str, ...]
) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for file in [*folder.glob("tokenizer*"), *folder.glob("chat*")]:
        if file.name not in kept:
            file.unlink()
    error = refused(folder)
    assert error.reason == "TokenizerMissing"
    for name in VOCABULARY_FILES:
        assert name in error.message


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_an_empty_or_broken_tokenizer_is_refused_by_file(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    error = refused(folder)
    assert error.reason == "TokenizerMissing"
    assert str(folder) in error.message
    assert "\n" not in error.message


def test_a_vocabulary_without_its_merges_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (folder / "vocab.json").write_text("{}")
    assert refused(folder).reason == "TokenizerMissing"


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "llama", "gpt_neox", "codegen", "opt", "mistral"])
@pytest.mark.parametrize("rule", ["as trained", "digits", "letters", "lower case"])
def test_text_becomes_what_tokenizer_json_says(folder: Path, model_type: str, rule: str) -> None:
    """transformers 5 takes a class's own rules in place of the file's."""
    kind = TOKENIZER_MAPPING_NAMES.get(model_type) or "LlamaTokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "digits":
        written.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), by_bytes])
    elif rule == "letters":
        split = pre_tokenizers.Split(Regex("[A-Za-z](?=[a-z])"), "isolated")
        written.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    elif rule == "lower case":
        written.normalizer = normalizers.Lowercase()
    written.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        expected = written.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.chat_template and tokenizer.eos_token_id == EOS


def test_a_template_beside_the_processor_is_found(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "J{{ messages[0].content }}"}))
    request = a_request("r", [{"role": "user", "content": "x"}])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(prompt_ids(request, tokenizer, VOCABULARY)) == "Jx"


def test_what_tokenizer_and_model_do_not_share_is_noted(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert check_against_model(tokenizer, VOCABULARY, [EOS, VOCABULARY]) == []
    tokenizer.add_tokens(["<tool>", "<more>"])
    unknown, ends = check_against_model(tokenizer, VOCABULARY, [VOCABULARY])
    assert unknown.startswith("2 tokens of the tokenizer (Token id 512 ('<tool>') ...) are outside")
    assert ends.startswith("No end token (512) is in the model's vocabulary of 512")


def test_the_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(EngineLoadError) as caught:
        check_against_model(load_tokenizer(folder), 100, [EOS])
    assert caught.value.reason == "TokenizerWrong"
    assert "embedding 100" in caught.value.message


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% if %}", "line 1: "),
        ("{{ messages[0].text }}", "shows nothing"),
        ("<new>{{ messages[0].content }}", "'<new>'"),
    ],
)
def test_a_broken_template_is_noted(folder: Path, template: str, fault: str) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.add_tokens(["<new>"])
    [note] = template_note(tokenizer, VOCABULARY)
    assert note.startswith("Chat is refused, for its template is broken: ")
    assert fault in note


def test_a_checkpoint_without_a_template_is_noted_with_the_remedy(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    [note] = template_note(tokenizer, VOCABULARY)
    assert "spec.chatTemplate" in note
    assert "vicuna" in note


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"user_defined_symbols": ["<turn>", "\n\n"]},
        {"bos_id": 5, "eos_id": 6, "unk_id": 4, "pad_id": 0},
    ],
    ids=["llama", "nfkc", "no prefix", "no bytes", "symbols", "own ids"],
)
def test_a_tokenizer_model_alone_gives_sentencepieces_ids(
    tmp_path: Path, corpus: Path, kind: str, rules: dict[str, Any]
) -> None:
    original = train(tmp_path, corpus, kind, **rules)
    tokenizer = load_tokenizer(tmp_path)
    size = original.get_piece_size()
    assert (len(tokenizer), tokenizer.eos_token_id) == (size, original.eos_id())
    for text in TEXTS:
        expected = original.encode(text)
        assert prompt_ids(a_request("r", text), tokenizer, size) == [original.bos_id(), *expected], text
        detokenizer = Vocabulary(tokenizer).detokenizer(strip_first_space=True)
        assert "".join(map(detokenizer.push, expected)) == original.decode(expected).replace(
            " \u2047 ", ""
        ), text


@pytest.mark.parametrize(
    ("config", "text", "turn"),
    [
        ({}, "<s>▁hello▁you", "<s>▁hi</s>▁you[PAD]<turn>"),
        ({"add_bos_token": False}, "▁hello▁you", "<s>▁hi</s>▁you[PAD]<turn>"),
        ({"add_eos_token": True}, "<s>▁hello▁you", "<s>▁hi</s>▁you[PAD]<turn>"),
        ({"legacy": False}, "<s>▁hello▁you", "<s>hi</s>you[PAD]<turn>"),
    ],
)
def test_what_the_config_says_of_a_tokenizer_model_holds(
    tmp_path: Path, corpus: Path, config: dict[str, Any], text: str, turn: str
) -> None:
    train(tmp_path, corpus, "bpe")
    named = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | config))
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 400, "<turn>": 401}')
    tokenizer = load_tokenizer(tmp_path)

    def pieces(prompt: str) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(prompt_ids(a_request("r", prompt), tokenizer, 402)))

    assert pieces("hello you") == text
    assert pieces("<s>hi</s>you[PAD]<turn>") == turn


def test_a_tokenizer_model_of_another_kind_is_left_to_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_text("no sentencepiece")
    assert refused(tmp_path).reason == "TokenizerMissing"


def test_a_tokenizer_json_goes_first(folder: Path, corpus: Path) -> None:
    expected = AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    train(folder, corpus, "bpe")
    assert load_tokenizer(folder)("hello")["input_ids"] == expected

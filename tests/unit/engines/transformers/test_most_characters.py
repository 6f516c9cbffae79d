"""What a tokenizer's own rules prove of a text's length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tidegate.engines.transformers.tokenizer import most_characters_per_token
from tidegate.engines.transformers.vocabulary import BYTE_OF

LONGEST = "gate" * 3
WORDS = ["\N{LOWER ONE EIGHTH BLOCK}", "a", "\N{LOWER ONE EIGHTH BLOCK}a", LONGEST]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def byte_level(*, without: str = "") -> Tokenizer:
    tokens = ["<unk>", "<s>", *(character for character in BYTE_OF if character not in without)]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([LONGEST])
    return backend


def sentencepiece(*, byte_fallback: bool = True) -> Tokenizer:
    tokens = ["<unk>", "<s>", *BYTE_TOKENS, *WORDS]
    backend = Tokenizer(
        models.Unigram([(token, -1.0) for token in tokens], unk_id=0, byte_fallback=byte_fallback)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def with_normalizer(normalizer: Any) -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizer
    return backend


def with_pre_tokenizer(*steps: Any) -> Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(use_regex=False)])
    return backend


def with_token(**rules: bool) -> Tokenizer:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<end>", **rules)])
    return backend


PROVING: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "bytes after a split": lambda: with_pre_tokenizer(pre_tokenizers.Split(" ", "isolated")),
    "sentencepiece": sentencepiece,
    "prepended": lambda: with_normalizer(normalizers.Prepend("_")),
    "composed": lambda: with_normalizer(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "replaced by as much": lambda: with_normalizer(normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")),
    "special": lambda: with_token(single_word=True),
}
SWALLOWING: dict[str, Callable[[], Tokenizer]] = {
    "a byte without a token": lambda: byte_level(without="a"),
    "unknown runs become one": lambda: sentencepiece(byte_fallback=False),
    "stripped": lambda: with_normalizer(normalizers.Strip()),
    "replaced by less": lambda: with_normalizer(normalizers.Replace("  ", " ")),
    "replaced by a rule": lambda: with_normalizer(
        normalizers.Sequence([normalizers.Replace(" ", "  "), normalizers.StripAccents()])
    ),
    "split and dropped": lambda: with_pre_tokenizer(pre_tokenizers.Split(" ", "removed")),
    "whitespace dropped": lambda: with_pre_tokenizer(pre_tokenizers.WhitespaceSplit()),
    "a token takes the space before it": lambda: with_token(lstrip=True),
    "a token takes the space after it": lambda: with_token(rstrip=True),
    "words": lambda: Tokenizer(models.WordPiece({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>")),
}
TEXTS = st.text(
    st.one_of(st.sampled_from("a g\u0301\u0308e\t\n潮🌊ﬃ"), st.characters(exclude_categories=["Cs"])),
    max_size=200,
) | st.lists(st.sampled_from([LONGEST, "a", " ", "<end>"]), max_size=20).map("".join)


@pytest.mark.parametrize("kind", PROVING)
def test_no_text_has_fewer_tokens_than_its_characters_prove(kind: str) -> None:
    tokenizer = fast(PROVING[kind]())
    most = most_characters_per_token(tokenizer)
    assert most >= len(LONGEST)

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def holds(text: str) -> None:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) * most >= len(text)

    holds()


def test_it_is_the_length_of_the_longest_token() -> None:
    assert most_characters_per_token(fast(byte_level())) == len(LONGEST)
    composed = PROVING["composed"]()
    assert most_characters_per_token(fast(composed)) == 4 * len(LONGEST)


@pytest.mark.parametrize("kind", SWALLOWING)
def test_where_a_token_may_swallow_any_number_nothing_is_proved(kind: str) -> None:
    assert most_characters_per_token(fast(SWALLOWING[kind]())) == 0


def test_a_tokenizer_without_rules_to_read_proves_nothing() -> None:
    assert most_characters_per_token(object()) == 0

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tidegate.engines.transformers.vocabulary import Vocabulary

TEXTS = ["the tide rises and the gate opens", "naïve café", "潮汐 and 🌊", "1, 2, 3"] * 5


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        backend, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    )


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As llama's: spaces as U+2581, bytes where there is no token, the first space stripped."""
    tokens = [
        "<s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz",
        "▁t",
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "t")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return trained(backend, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<s>", "[UNK]"]))


def trained(backend: Any, trainer: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


BYTE_LEVEL, SENTENCEPIECE, WORD_PIECE = byte_level(), sentencepiece_like(), word_piece()


def incremental(vocabulary: Vocabulary, token_ids: list[int], *, strip_first_space: bool = True) -> str:
    return "".join(map(vocabulary.detokenizer(strip_first_space=strip_first_space).push, token_ids))


@settings(deadline=None)
@given(st.text(max_size=30))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_token_by_token_gives_the_tokenizers_own_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    vocabulary = Vocabulary(tokenizer)
    assert incremental(vocabulary, ids) == vocabulary.decode(ids)


@pytest.mark.parametrize("text", ["the tide rises", "gate opens the tide", "1, 2"])
def test_other_tokenizers_go_through_their_own_decoder(text: str) -> None:
    ids = WORD_PIECE(text, add_special_tokens=False)["input_ids"]
    vocabulary = Vocabulary(WORD_PIECE)
    assert incremental(vocabulary, ids) == vocabulary.decode(ids)


@pytest.mark.parametrize("text", ["the tide rises", "tide", ""])
@pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCEPIECE, WORD_PIECE], ids=["byte level", "sentencepiece", "word piece"]
)
def test_special_tokens_are_shown_where_they_are_not_skipped(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    vocabulary = Vocabulary(tokenizer)
    bos = tokenizer.bos_token_id
    for shown in ([bos, *ids], [*ids, bos], [*ids, bos, bos, *ids]):
        detokenizer = vocabulary.detokenizer(strip_first_space=True, skips_special=False)
        expected = tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert "".join(map(detokenizer.push, shown)) == expected
        assert vocabulary.decode(shown, skips_special=False) == expected
    assert vocabulary.shown(bos, skips_special=False) == ("<s>", b"<s>")
    assert vocabulary.shown(bos) == ("<s>", b"")


def test_a_continuation_keeps_the_space_between_prompt_and_answer() -> None:
    vocabulary = Vocabulary(SENTENCEPIECE)
    ids = SENTENCEPIECE("the tide rises", add_special_tokens=False)["input_ids"]
    assert incremental(vocabulary, ids, strip_first_space=False) == " the tide rises"


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=30), data=st.data())
@pytest.mark.parametrize("way", ["bytes", "window"])
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_a_continuation_begins_where_the_prompt_ends(tokenizer: Any, way: str, text: str, data: Any) -> None:
    """Even inside a character: what is whole in prompt and answer together is never lost."""
    ids = tokenizer("a " + text, add_special_tokens=False)["input_ids"]
    cut = data.draw(st.integers(1, len(ids)))
    vocabulary = Vocabulary(tokenizer)
    if way == "window":
        vocabulary._to_bytes = None
    shown = incremental(vocabulary, ids[:cut])
    detokenizer = vocabulary.detokenizer(strip_first_space=False, after=ids[:cut])
    assert shown + "".join(map(detokenizer.push, ids[cut:])) == vocabulary.decode(ids)


def test_a_word_goes_on_behind_the_prompt() -> None:
    ids = WORD_PIECE("tides", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    detokenizer = Vocabulary(WORD_PIECE).detokenizer(strip_first_space=False, after=ids[:-1])
    assert detokenizer.push(ids[-1]) == "s"


def test_a_special_token_ends_a_character() -> None:
    half = SENTENCEPIECE.convert_tokens_to_ids("<0xE6>")
    letter = SENTENCEPIECE.convert_tokens_to_ids("a")
    vocabulary = Vocabulary(SENTENCEPIECE)
    assert vocabulary.detokenizer(strip_first_space=False, after=[half, 0]).push(letter) == "a"


def test_special_tokens_are_silent_but_have_a_name() -> None:
    vocabulary = Vocabulary(BYTE_LEVEL)
    assert vocabulary.piece(0) == b""
    assert vocabulary.shown(0) == ("<s>", b"")
    assert vocabulary.is_silent([0, 0])
    assert not vocabulary.is_silent([0, 50])


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE, WORD_PIECE])
def test_an_id_without_a_token_is_silent(tokenizer: Any) -> None:
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.piece(100_000) == b""
    assert vocabulary.shown(100_000)[1] == b""
    assert vocabulary.detokenizer(strip_first_space=False).push(100_000) == ""


@pytest.mark.parametrize("token", ["<café>", "<think>", "潮汐x", "  "])
def test_an_added_token_stands_for_itself(token: str) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([token])
    ids = tokenizer(f"the{token}tide", add_special_tokens=False)["input_ids"]
    assert incremental(Vocabulary(tokenizer), ids) == f"the{token}tide"


def test_a_byte_that_is_no_character_shows_as_one_replacement() -> None:
    vocabulary = Vocabulary(SENTENCEPIECE)
    token_id = SENTENCEPIECE.convert_tokens_to_ids("<0xE6>")
    assert vocabulary.shown(token_id) == ("\N{REPLACEMENT CHARACTER}", b"\xe6")

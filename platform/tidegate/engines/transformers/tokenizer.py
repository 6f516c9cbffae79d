"""Loads a checkpoint's tokenizer, and says at load what it cannot do with this model and what is known of it
before any text comes. Imports no torch, so that the process that prepares prompts stays small.

Without a vocabulary file transformers makes up a tokenizer of a few tokens and says nothing, so the files are
looked for first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers import sentencepiece_model
from tidegate.engines.transformers.chat_templates import template_fault
from tidegate.engines.transformers.formats import template_of
from tidegate.engines.transformers.prompts import (
    CHAT_REMEDY,
    encoded,
    frame,
    known_as,
    outside,
    plain_chat_ids,
)
from tidegate.engines.transformers.vocabulary import BYTE_OF, PROBE
from tidegate.replica_args import CHAT_FORMATS, unknown_format

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)

# How many characters a normalizer can make one of, at most. The longest canonical composition has four.
SHRINKS_BY = {"Prepend": 1, "Lowercase": 1, "ByteLevel": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
KEEPS_ALL = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}  # pre-tokenizers that drop no character


def load_tokenizer(folder: Path, chat_template: str = "") -> Any:
    """Load the tokenizer of a checkpoint, with this chat template (`EngineSpec.chat_template`) or its own.
    Raises `EngineLoadError` (TokenizerMissing, InvalidEngineArgs)."""
    if unknown := unknown_format(chat_template):
        raise EngineLoadError("InvalidEngineArgs", f"chat_template: {unknown}.")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise EngineLoadError(
            "TokenizerMissing",
            f"{folder} holds no tokenizer: none of {', '.join(VOCABULARY_FILES)}. Copy the "
            "tokenizer's files into it from where the weights come from.",
        )
    try:
        tokenizer = sentencepiece_model.load(folder) or from_files(folder)
        sentencepiece_model.check(folder, tokenizer)
        frame(tokenizer)
        readable = encoded(PROBE, tokenizer)
    except Exception as error:  # broken files surface as OSError, ValueError, ImportError, KeyError, ...
        found = ", ".join(name for name in VOCABULARY_FILES if (folder / name).is_file())
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineLoadError(
            "TokenizerMissing", f"The tokenizer of {folder} ({found}) cannot be loaded: {reason}"
        ) from error
    if len({*readable} - {tokenizer.unk_token_id}) < 2:
        raise EngineLoadError(
            "TokenizerMissing",
            f"The tokenizer of {folder} has {len(tokenizer)} tokens and cannot write plain text with them: a "
            "vocabulary file is missing or empty.",
        )
    if chat_template:
        is_name = chat_template in CHAT_FORMATS
        tokenizer.chat_template = template_of(chat_template) if is_name else chat_template
    elif not tokenizer.chat_template:
        tokenizer.chat_template = processor_template(folder)
    return tokenizer


def from_files(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {
        "local_files_only": True,
        "trust_remote_code": False,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if is_as_written(tokenizer, folder / "tokenizer.json"):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(folder, **options)


def is_as_written(tokenizer: Any, file: Path) -> bool:
    """False where plain text becomes other tokens than by the file's own rules: transformers 5 takes of it no
    more than the vocabulary for classes that it knows, and splits text by rules of its own."""
    if not file.is_file():
        return True
    written = Tokenizer.from_file(str(file))
    written.no_truncation()
    written.no_padding()
    return all(
        encoded(text, tokenizer) == written.encode(text, add_special_tokens=False).ids
        for text in sentencepiece_model.PROBES
    )


def processor_template(folder: Path) -> str | None:
    """Read the template of a checkpoint that has it beside its processor, where tokenizers do not look."""
    file = folder / "chat_template.json"
    return json.loads(file.read_text())["chat_template"] if file.is_file() else None


def check_against_model(tokenizer: Any, vocabulary_size: int, end_ids: Collection[int]) -> list[str]:
    """Return notes on what the tokenizer and the model of `vocabulary_size` embeddings do not share.

    Raises `EngineLoadError` (TokenizerWrong) where they are of different models.
    """
    if outside(encoded(PROBE, tokenizer), vocabulary_size) is not None:
        raise EngineLoadError(
            "TokenizerWrong",
            "The tokenizer writes plain text with tokens that the model does not know: it has "
            f"{len(tokenizer)} and the model's embedding {vocabulary_size}. Use the tokenizer that the model "
            "was made with.",
        )
    return [
        *unknown_tokens_note(tokenizer, vocabulary_size),
        *end_note(end_ids, vocabulary_size),
    ]


def unknown_tokens_note(tokenizer: Any, vocabulary_size: int) -> list[str]:
    unknown = sorted(token for token in tokenizer.get_vocab().values() if token >= vocabulary_size)
    if not unknown:
        return []
    return [
        f"{len(unknown)} tokens of the tokenizer ({known_as(unknown[0], tokenizer)} ...) are outside the "
        f"model's vocabulary of {vocabulary_size}: prompts that hold one are refused."
    ]


def end_note(end_ids: Collection[int], vocabulary_size: int) -> list[str]:
    if not end_ids or any(token < vocabulary_size for token in end_ids):
        return []
    return [
        f"No end token ({', '.join(map(str, sorted(end_ids)))}) is in the model's vocabulary of "
        f"{vocabulary_size}: answers end by length or stop strings alone."
    ]


def template_note(tokenizer: Any, vocabulary_size: int) -> list[str]:
    """Return a note where chat cannot work. Runs the template, so only where that is bounded."""
    if not tokenizer.chat_template:
        return [f"The checkpoint has no chat template, so chat is refused: {CHAT_REMEDY}."]
    fault = template_fault(tokenizer)
    if not fault and (token := outside(plain_chat_ids(tokenizer), vocabulary_size)) is not None:
        fault = f"{known_as(token, tokenizer)} is outside the vocabulary of {vocabulary_size} tokens"
    return [broken_template_note(fault)] if fault else []


def broken_template_note(fault: str) -> str:
    return f"Chat is refused, for its template is broken: {fault}. Set spec.chatTemplate to one that works."


def most_characters_per_token(tokenizer: Any) -> int:
    """Count the characters of text that one token can stand for, so that a text's length alone may prove how
    many tokens it has at least. 0: nothing is proved, because a token may swallow any number (whitespace that
    is dropped, a run of unknown characters that become one token, a rule that is not known here)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return 0
    state = json.loads(backend.to_str())
    model, added = state["model"], state["added_tokens"]
    shrinks_by = 1
    for step in _steps(state["normalizer"], "normalizers"):
        shrinks_by *= _shrinks_by(step)
    pre_tokenizers = list(_steps(state["pre_tokenizer"], "pretokenizers"))
    if (
        not shrinks_by
        or not all(map(_keeps_all, pre_tokenizers))
        or any(token["lstrip"] or token["rstrip"] for token in added)
        or not _knows_every_byte(model, {step["type"] for step in pre_tokenizers})
    ):
        return 0
    return shrinks_by * max(map(len, backend.get_vocab(with_added_tokens=True)))


def _steps(step: Mapping[str, Any] | None, parts: str) -> Iterable[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[parts]:
            yield from _steps(part, parts)
    else:
        yield step


def _shrinks_by(normalizer: Mapping[str, Any]) -> int:
    """0: by any factor."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern and len(normalizer["content"]) >= len(pattern) else 0
    return SHRINKS_BY.get(normalizer["type"], 0)


def _keeps_all(pre_tokenizer: Mapping[str, Any]) -> bool:
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in KEEPS_ALL


def _knows_every_byte(model: Mapping[str, Any], pre_tokenizers: set[str]) -> bool:
    """True where no character is dropped or becomes an unknown token, which others may join."""
    tokens = model["vocab"]
    vocabulary = tokens if isinstance(tokens, dict) else {token for token, _ in tokens}
    if model["type"] == "BPE" and "ByteLevel" in pre_tokenizers:
        return all(character in vocabulary for character in BYTE_OF)
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))

"""Loads a checkpoint's tokenizer and says what is known of it before any text comes. Imports no torch, so
that the process that prepares prompts stays small."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.vocabulary import BYTE_OF

# How many characters a normalizer can make one of, at most. The longest canonical composition has four.
SHRINKS_BY = {"Prepend": 1, "Lowercase": 1, "ByteLevel": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
KEEPS_ALL = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}  # pre-tokenizers that drop no character


def load_tokenizer(path: Path) -> Any:
    """Raises `EngineLoadError` (TokenizerMissing)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, clean_up_tokenization_spaces=False
        )
    except Exception as error:  # missing files surface as OSError, ValueError, ImportError, KeyError, ...
        raise EngineLoadError(
            "TokenizerMissing", f"The tokenizer of {path} cannot be loaded: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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

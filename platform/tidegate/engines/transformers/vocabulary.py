"""Says what each token of a checkpoint's tokenizer stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, cast

from tidegate.engines.detokenizer import (
    REPLACEMENT,
    ByteDetokenizer,
    Detokenizer,
    WindowDetokenizer,
)

LONGEST_TAIL = 64  # tokens of a prompt without one that is whole in itself: bytes of rare characters
PROBE = "Tides rise twice a day: 12 h 25 min apart.\n\n  naïve café, 潮汐 🌊!"


class ShownTokens:
    """Remembers what a function says of each token. In lists: a step looks up thousands, and each place in
    memory that it comes by is one that the weights have pushed out of the caches."""

    def __init__(self, show: Callable[[int], tuple[str, bytes]]) -> None:
        self._show = show
        self._texts: list[str | None] = []
        self._raws: list[bytes] = []

    def columns(self, token_ids: Sequence[int]) -> tuple[list[str], list[bytes]]:
        try:
            texts = [self._texts[token_id] for token_id in token_ids]
        except IndexError:
            texts = [None]
        if None in texts:
            texts = [self._learn(token_id) for token_id in token_ids]
        return cast(list[str], texts), [self._raws[token_id] for token_id in token_ids]

    def _learn(self, token_id: int) -> str:
        # Bytes first: another thread may look for both as soon as there is a text.
        if (short := token_id + 1 - len(self._texts)) > 0:
            self._raws += [b""] * short
            self._texts += [None] * short
        text, self._raws[token_id] = self._show(token_id)
        self._texts[token_id] = text
        return text


class Vocabulary:
    """Turns token ids into bytes and text, for one tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        } | set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        self._added = {token_id: str(token) for token_id, token in added.items() if not token.special}
        self._known = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._pieces: dict[int, bytes] = {}
        self._shown = {skips: ShownTokens(partial(self._show, skips)) for skips in (False, True)}
        self._named: dict[str, frozenset[int]] = {}
        decoders = _decoders(tokenizer)
        self._to_bytes = _bytes_rule(decoders)
        self._strips = any(map(_strips_first_space, decoders))
        if self._to_bytes is not None and not self._agrees_with_tokenizer():
            self._to_bytes = None

    @property
    def special_ids(self) -> Collection[int]:
        return self._special

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; none for special tokens and ids without a token."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = b"" if token_id in self._special else self._look_up(token_id)
            self._pieces[token_id] = piece
        return piece

    def shown(self, token_id: int, *, skips_special: bool = True) -> tuple[str, bytes]:
        """Show a token on its own, as log probabilities do. Special tokens have a name but no bytes, so that
        the bytes of all tokens are those of the text."""
        (text,), (raw,) = self._shown[skips_special].columns([token_id])
        return text, raw

    def shown_columns(
        self, token_ids: Sequence[int], *, skips_special: bool = True
    ) -> tuple[list[str], list[bytes]]:
        """Return what `shown` says of each."""
        return self._shown[skips_special].columns(token_ids)

    def _show(self, skips_special: bool, token_id: int) -> tuple[str, bytes]:
        if token_id in self._special:
            name = str(self._tokenizer.convert_ids_to_tokens(token_id))
            return name, b"" if skips_special else name.encode()
        raw = self.piece(token_id)
        return raw.decode(errors="replace"), raw

    @property
    def has_silent_space(self) -> bool:
        """True where a text's first token may begin with a space that the text does not show."""
        return self._to_bytes is _spaced and self._strips

    def named_in(self, patterns: str) -> frozenset[int]:
        """Return the special tokens that regular expressions name."""
        if patterns not in self._named:
            self._named[patterns] = self._find_named(patterns)
        return self._named[patterns]

    def _find_named(self, patterns: str) -> frozenset[int]:
        names = {token: str(self._tokenizer.convert_ids_to_tokens(token)) for token in self._special}
        return frozenset(
            token for token, name in names.items() if name in patterns or re.escape(name) in patterns
        )

    def detokenizer(
        self,
        *,
        strip_first_space: bool,
        after: Sequence[int] = (),
        skips_special: bool = True,
        keeps: Collection[int] = (),
    ) -> Detokenizer:
        """Make a fresh one. `strip_first_space`: the text begins here, so the space that sentencepiece puts
        before a first word is none. `after`: it goes on behind these tokens, maybe inside a character.
        `keeps`: special tokens that have text all the same."""
        made: Detokenizer
        if self._to_bytes is None:
            made = WindowDetokenizer(partial(self.decode, skips_special=skips_special and not keeps))
        else:
            piece = self.piece if skips_special else lambda token: self.shown(token, skips_special=False)[1]
            if skips_special and keeps:
                piece = lambda token: self.shown(token, skips_special=token not in keeps)[1]  # noqa: E731
            made = ByteDetokenizer(piece, strip_first_space=strip_first_space and self.has_silent_space)
        for token_id in self._tail(after):
            made.push(token_id)
        return made

    def decode(self, token_ids: Sequence[int], *, skips_special: bool = True) -> str:
        """Decode as the tokenizer itself does."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skips_special, clean_up_tokenization_spaces=False
            )
        )

    def is_silent(self, token_ids: Sequence[int]) -> bool:
        """True where the tokens are all special: what follows begins a text."""
        return all(token_id in self._special for token_id in token_ids)

    def _tail(self, token_ids: Sequence[int]) -> list[int]:
        """Return the last tokens that what follows may depend on, back to one that is whole in itself. A
        special token ends a character."""
        tail: list[int] = []
        for token_id in reversed(token_ids[-LONGEST_TAIL:]):
            if token_id in self._special:
                break
            tail.insert(0, token_id)
            if REPLACEMENT not in self.shown(token_id)[0]:
                break
        return tail

    def _look_up(self, token_id: int) -> bytes:
        if token_id >= self._known:  # an embedding is often larger than the tokenizer
            return b""
        if self._to_bytes is None:
            return self.decode([token_id]).encode()
        if self._to_bytes is _byte_level and token_id in self._added:
            return self._added[token_id].encode()  # not written in the alphabet of bytes
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return b"" if token is None else self._to_bytes(token)

    def _agrees_with_tokenizer(self) -> bool:
        token_ids = self._tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        text = b"".join(map(self.piece, token_ids)).decode(errors="replace")
        expected = self.decode(token_ids)
        return REPLACEMENT in expected or text.removeprefix(" ") == expected.removeprefix(" ")


def _decoders(tokenizer: Any) -> list[dict[str, Any]]:
    """Return the steps from tokens to text, none for a tokenizer of another make."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    parts: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return parts


def _strips_first_space(part: dict[str, Any]) -> bool:
    if part["type"] == "Strip":
        return bool(part["content"] == " " and part["start"])
    return part["type"] == "Metaspace" and part.get("prepend_scheme") != "never"


def _bytes_rule(parts: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    """Choose by the decoder's steps how a token's string gives its bytes; None for other kinds."""
    kinds = {part["type"] for part in parts}
    if kinds == {"ByteLevel"}:
        return _byte_level
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (
        "Metaspace" in kinds or any(part.get("content") == " " for part in parts if part["type"] == "Replace")
    ):
        return _spaced
    return None


def _byte_level(token: str) -> bytes:
    """Byte-level BPE (GPT-2) writes each byte as a printable character."""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()  # an added token stands for itself


def _spaced(token: str) -> bytes:
    """Sentencepiece writes a space as U+2581 and a byte without a token as `<0xNN>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the printable character of each byte, as GPT-2 fixed it."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


BYTE_OF = _byte_alphabet()

"""Turns token ids into text one at a time, without ever releasing a broken character.

Pushing the same ids again rebuilds the same state, which is how a request is continued from its log.
A character that is still incomplete when the text ends is dropped with the detokenizer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes of UTF-8, each at most one token
LONGEST_WINDOW = 64  # tokens, where many say nothing
_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now."""
        ...


class ByteDetokenizer:
    """Serves tokenizers whose tokens are bytes: byte-level BPE, and sentencepiece with byte fallback.

    `piece` gives a token's bytes (empty for special tokens). Only an incomplete UTF-8 sequence is held;
    a byte that can start or continue nothing comes out as U+FFFD at once.
    """

    __slots__ = ("_decode", "_piece", "_strip")

    def __init__(self, piece: Callable[[int], bytes], *, strip_first_space: bool = False) -> None:
        self._piece = piece
        self._decode = _utf8("replace").decode
        self._strip = strip_first_space

    def push(self, token_id: int) -> str:
        text = self._decode(self._piece(token_id))
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """Serves any other tokenizer: decodes a short window of ids twice and releases the difference.

    `decode` is the tokenizer's own. Text that ends in U+FFFD is held, but for at most as many tokens as
    a character has bytes: what is not complete by then never will be.
    """

    __slots__ = ("_decode", "_ids", "_released")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window: released ids that give context, then held ones
        self._released = 0  # how many ids of the window are context

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[: self._released])
        text = self._decode(self._ids)
        held = len(self._ids) - self._released
        if text.endswith(REPLACEMENT) and held < LONGEST_CHARACTER:
            return ""
        if text != before:
            self._ids = self._ids[self._released :]
        elif len(self._ids) > LONGEST_WINDOW:  # what follows depends on the last that said something
            self._ids = self._ids[: LONGEST_WINDOW // 2] + self._ids[-LONGEST_WINDOW // 4 :]
        self._released = len(self._ids)
        return text[len(before) :]

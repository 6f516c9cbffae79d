"""Compiles the grammars that answers must follow, and keeps rows to them.

Who runs where. `refusal` is awaited on the event loop and compiles on a thread of its own, whose first work
is to read the vocabulary; the engine thread takes a `Matcher` for each row from what was compiled. The
library drops the GIL for both, and for masks, which its own threads fill, all rows at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from tidegate.engines.transformers.prompts import encoded
from tidegate.engines.transformers.vocabulary import Vocabulary

# Of grammars that are kept: as text, of which a compiled one was measured to take up to a hundred times as
# much, and in number, as each grows by the states that its answers reach.
CACHE_BYTES = 1 << 20
MOST_CACHED = 32
# Some ten ms a mask, and some 50 MB of states for all answers of a grammar. Each character of a text with a
# maxLength takes a few.
LIMITS = LLParserLimits(
    step_lexer_fuel=70_000, step_max_items=50_000, max_lexer_states=100_000, verbose_errors=False
)


class Masks(NamedTuple):
    """`size`: the width of the logits. `width`: that of a mask, as the tokenizer may have more tokens."""

    executor: LLExecutor
    size: int
    width: int

    def words(self, matchers: Sequence[Matcher]) -> Any:
        """Return what may come next in 32-bit words [rows, width / 32], a bit for each token."""
        words = allocate_token_bitmask(len(matchers), self.width)
        free = [(row._matcher, at) for at, row in enumerate(matchers) if not row.forced]
        if free:
            fill_next_token_bitmask_par(self.executor, free, words)
        for at, row in enumerate(matchers):
            if row.forced:
                words[at] = 0
                words.view(np.uint32)[at, row.forced[0] // 32] = 1 << row.forced[0] % 32
        return words


class Grammars:
    """Compiles for one tokenizer. `size`: the width of its model's logits."""

    def __init__(
        self, tokenizer: Any, vocabulary: Vocabulary, end_ids: Collection[int], *, size: int, threads: int
    ) -> None:
        self._can_end = bool(end_ids)
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._masks = Masks(LLExecutor(threads), size, width=max(size, len(tokenizer)))
        self._tokenizer = self._compiler.submit(
            _ll_tokenizer, tokenizer, vocabulary, sorted(end_ids), self._masks.width
        )
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    async def refusal(self, grammar: str) -> str | None:
        """Compile a grammar; returns why it cannot be. Takes about as long as the gateway's check did."""
        if not self._can_end:
            return "it has no end token, so no answer of it ends where the grammar does"
        if (compiled := self._cached(grammar)) is None:
            loop = asyncio.get_running_loop()
            compiled = await loop.run_in_executor(self._compiler, self._compile, grammar)
        return _plain(compiled.get_error()) or None

    def matcher(self, grammar: str) -> Matcher:
        """Return a matcher at the beginning of its grammar."""
        compiled = self._cached(grammar) or self._compile(grammar)
        return Matcher(compiled.deep_copy(), self._masks, partial(self._forget, grammar))

    def close(self) -> None:
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _cached(self, grammar: str) -> LLMatcher | None:
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
            return self._compiled.get(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        made = LLMatcher(self._tokenizer.result(), grammar, log_level=0, limits=LIMITS)
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > 1 and (
                len(self._compiled) > MOST_CACHED or sum(map(len, self._compiled)) > CACHE_BYTES
            ):
                self._compiled.popitem(last=False)
        return made

    def _forget(self, grammar: str) -> None:
        """Matchers of a grammar share the states that they reach: at a limit of one, others have none."""
        with self._lock:
            self._compiled.pop(grammar, None)


class Matcher:
    """Where one row stands in its grammar. Consuming the row's tokens again leads to the same place.

    `forced`: the tokens that come next where the text has one continuation only, as the tokenizer writes it.
    Other tokens could spell it too, but to choose among those is no choice of the model's.
    """

    __slots__ = ("_failed", "_matcher", "_may_force", "forced", "masks")

    def __init__(self, matcher: LLMatcher, masks: Masks, failed: Callable[[], None]) -> None:
        self._matcher = matcher
        self._failed = failed
        self._may_force = False
        self.masks = masks
        self.forced: list[int] = []

    def begin(self, tokens: Sequence[int], *, may_force: bool) -> None:
        """Take the row's tokens so far. `may_force`: nothing but the grammar rules tokens out."""
        self._may_force = may_force
        self._matcher.consume_tokens(list(tokens))
        self._look_ahead()

    def consume(self, token: int) -> bool:
        """Advance. False: it cannot, now or ever (see `error`)."""
        # A matcher that failed over a mask takes an end token all the same.
        if not self._matcher.consume_token(token) or self._matcher.is_error():
            self.fail()
            return False
        if self.forced[:1] == [token]:
            del self.forced[0]
        if not self.forced:
            self._look_ahead()
        return True

    def fail(self) -> str:
        """Give the grammar up, as one that met a limit goes nowhere; returns why."""
        self._failed()
        return self.error

    def _look_ahead(self) -> None:
        forced = self._matcher.compute_ff_tokens() if self._may_force else []
        self.forced = list(takewhile(lambda token: token < self.masks.size, forced))

    @property
    def error(self) -> str:
        return _plain(self._matcher.get_error())

    @property
    def is_complete(self) -> bool:
        """True where nothing more may come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


def allowed_tokens(matchers: Sequence[Matcher], like: Tensor) -> Tensor:
    """Return what may come next, bool [rows, vocabulary], on the device of `like`."""
    size = like.shape[-1]
    # The tokenizer may have more tokens than the logits: those never come.
    words = matchers[0].masks.words(matchers)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=size, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).to(like.device)


def _plain(error: str) -> str:
    return error.removesuffix("<non-verbose/>").strip()


def _ll_tokenizer(tokenizer: Any, vocabulary: Vocabulary, end_ids: list[int], width: int) -> LLTokenizer:
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        with contextlib.suppress(ValueError):  # of a make that the library does not read
            return LLTokenizer(backend.to_str(), n_vocab=width, eos_token=end_ids)
    return LLTokenizer(TokenizerWrapper(_Spelled(tokenizer, vocabulary)), n_vocab=width, eos_token=end_ids)


class _Spelled:
    """Any other tokenizer, by the bytes that its tokens add to a text."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.tokens = [vocabulary.shown(token, skips_special=False)[1] for token in range(len(tokenizer))]

    def __call__(self, text: str) -> list[int]:
        return encoded(text, self._tokenizer)

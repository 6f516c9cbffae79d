"""Keeps keys and values of what prompts begin with: the next one that begins alike need not compute them.

Tokens are kept in blocks. A block's name is the hash of its tokens and of the block before it, the first
one's of a salt (as vLLM names them, vllm/v1/core/kv_cache_utils.py). So who finds a block has found all
before it, and nobody finds those of another salt. The blocks are copies, in memory of their own that is never
exceeded: the least recently used one makes room. In each use a block comes before those behind it, so the end
of a chain goes first, and no block outlives one before it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256

import torch
from torch import Tensor

BLOCK = 16  # tokens


class PrefixCache:
    def __init__(self, most_bytes: int, bytes_per_token: int) -> None:
        blocks = most_bytes // max(1, BLOCK * bytes_per_token)
        self._places: OrderedDict[bytes, int] = OrderedDict()  # by name, least recently used first
        self._free = list(range(blocks))
        self._most = blocks
        self._pools: list[Tensor] = []  # [blocks, heads, BLOCK, head size], for each of a row's tensors

    def held(self, tokens: Sequence[int], salt: bytes) -> int:
        """Return how many of the first tokens are kept. Not all: the last one has to be computed."""
        return BLOCK * len(self._known(names(tokens[:-1], salt)))

    def fill(self, row: Sequence[Tensor], tokens: Sequence[int], salt: bytes) -> None:
        """Copy the first `tokens`, which are kept, into a row's keys and values [heads, tokens, head size] of
        all layers."""
        chain = self._known(names(tokens, salt))
        self._use(chain)
        places = self._indices(chain, row[0].device)
        for pool, target in zip(self._pools, row, strict=True):
            target.copy_(pool.index_select(0, places).transpose(0, 1).flatten(1, 2))

    def keep(self, row: Callable[[slice], Sequence[Tensor]], tokens: Sequence[int], salt: bytes) -> None:
        """Keep the whole blocks of a row's tokens. `row` returns keys and values of some of them."""
        chain = names(tokens, salt)[: self._most]
        known = len(self._known(chain))
        self._use(chain[:known])  # before anything makes room
        if not (new := chain[known:]):
            return
        while len(self._free) < len(new):
            self._free.append(self._places.popitem(last=False)[1])
        found = row(slice(known * BLOCK, len(chain) * BLOCK))
        if not self._pools:
            self._pools = [
                held.new_empty((self._most, held.shape[0], BLOCK, held.shape[2])) for held in found
            ]
        for name in new:
            self._places[name] = self._free.pop()
        self._use(chain)
        places = self._indices(new, found[0].device)
        for pool, held in zip(self._pools, found, strict=True):
            pool.index_copy_(0, places, held.reshape(len(held), len(new), BLOCK, -1).transpose(0, 1))

    def clear(self) -> None:
        self._free += self._places.values()
        self._places.clear()

    def _known(self, chain: Sequence[bytes]) -> list[bytes]:
        known: list[bytes] = []
        for name in chain:
            if name not in self._places:
                break
            known.append(name)
        return known

    def _use(self, chain: Sequence[bytes]) -> None:
        for name in reversed(chain):
            self._places.move_to_end(name)

    def _indices(self, chain: Sequence[bytes], device: torch.device) -> Tensor:
        return torch.tensor([self._places[name] for name in chain], dtype=torch.long, device=device)


def names(tokens: Sequence[int], salt: bytes) -> list[bytes]:
    """Return the names of the whole blocks of `tokens`."""
    raw, size = array("q", tokens).tobytes(), 8 * BLOCK
    found: list[bytes] = []
    name = sha256(salt).digest()
    for begin in range(0, len(raw) - size + 1, size):
        name = sha256(name + raw[begin : begin + size]).digest()
        found.append(name)
    return found

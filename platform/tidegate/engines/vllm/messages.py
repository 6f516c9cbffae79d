"""What a replica and its vLLM process tell each other, as frames of msgpack.

    replica ──Load, Turn, Turn, ...──> process
            <─Loaded, Stepped, Stepped, ...   (Failed in the place of any: it ends)

Requests are rows with a number that is never used again, so that what comes for one that has left is nobody
else's.
"""

from __future__ import annotations

import msgspec

from tidegate.messages.codec import read_extension
from tidegate.messages.work import Sampling
from tidegate.replica_args import VllmArgs

Logprob = tuple[float, list[int], list[float]]  # of the token; the likeliest in its place, and theirs


class Load(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`device` is auto, cpu or cuda; what is 0 is not given (see `EngineSpec`)."""

    path: str
    precision: str
    device: str
    context_length: int
    max_slots: int
    kv_cache_bytes: int
    memory_cap_bytes: int
    weights_bytes: int
    args: VllmArgs


class Added(msgspec.Struct, frozen=True, array_like=True):
    """A row that joins. It goes on behind `generated`, for `limit` tokens in all. `salt`: only rows with the
    same share what their prompts begin with. `prefill_logprobs`: log probabilities of all tokens so far are
    due, with so many of the likeliest; None: none are."""

    row: int
    salt: str
    prompt: list[int]
    generated: list[int]
    limit: int
    sampling: Sampling
    end_ids: list[int]
    bad_words: list[list[int]]
    prefill_logprobs: int | None
    # The model's own end tokens, where its generation config rules every answer; None: it does not.
    ruled_ends: list[int] | None
    has_grammar: bool


class Turn(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One step, and what changes before it. `masks`: of rows with a grammar, the tokens that may come next,
    one bit for each in 32-bit words."""

    added: list[Added] = []
    left: list[int] = []
    masks: list[tuple[int, bytes]] = []


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    vocabulary_size: int  # the width of the logits
    slots: int
    kv_tokens: int  # that the KV cache holds
    blocks: int
    # Of each group of layers: tokens of a block, and the blocks that a row takes at most.
    groups: list[tuple[int, int]]
    device: str
    version: str


class Stepped(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The next token of each row in `rows`. Rows in `ended` are known to have had their last."""

    rows: list[int] = []
    tokens: list[int] = []
    ended: list[int] = []
    not_finite: list[int] = []
    closed: list[int] = []  # rows whose grammar and other parameters leave no token
    logprobs: dict[int, Logprob] = {}
    prefill: dict[int, tuple[list[Logprob], list[int]]] = {}  # (of each token but the first, ranks)
    cached: dict[int, int] = {}  # with a row's first token: what was not computed of the tokens before it
    failed: dict[int, str] = {}  # rows that vLLM refused


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    reason: str  # of an `EngineLoadError`
    message: str


TO_PROCESS = msgspec.msgpack.Decoder(Load | Turn, ext_hook=read_extension)
TO_REPLICA = msgspec.msgpack.Decoder(Loaded | Stepped | Failed)

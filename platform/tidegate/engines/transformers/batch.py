"""Runs the rows of a batch through a model, in one of two ways: together in an arena, or one by one.

Both answer with logits for the next token of each row. Row indices are 0..count-1; `leave` moves the last
row into the hole. `RowByRow` is the slow path that depends on no padding, mask or arena: it is what an
architecture falls back to whose batches the self-check finds wrong.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from tidegate.engines.base import is_out_of_memory
from tidegate.engines.transformers.decoder_step import DecoderStep
from tidegate.engines.transformers.graphs import Capture, GraphedStep
from tidegate.engines.transformers.head import Head, InParts
from tidegate.engines.transformers.kv import Arena, LayerKind
from tidegate.engines.transformers.paged import PagedPool
from tidegate.engines.transformers.prefixes import PrefixCache
from tidegate.engines.transformers.room import Room

log = logging.getLogger(__name__)

# Where recurrent_gemma's layers keep the state of what ran last, which no cache holds.
KEPT_IN_LAYERS = ("conv1d_state", "recurrent_states")
# What a model raises on a path that it was not made for.
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


@dataclass(slots=True)
class Staged:
    """A prompt that is prefilled in parts."""

    tokens: Sequence[int]
    every: InParts | None = None  # gets the logits after each token
    held: int = 0  # of its tokens, how many the cache has
    ahead: Tensor | None = None  # what `advance` finds next, where that is computed already

    @property
    def left(self) -> int:
        return len(self.tokens) - self.held


class Batch(Protocol):
    can_stage: bool
    has_runs: bool  # rows may take several tokens a step, and forget them again
    page: int  # what rows take of memory; see `room.Room`

    @property
    def count(self) -> int: ...

    def join(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] = (),
        every: InParts | None = None,
    ) -> Tensor:
        """Prefill new rows. Returns logits [rows, vocabulary] after the last token; `every` gets those after
        each token of what is then one row. `sources` are the tokens that the encoder of an encoder-decoder
        reads for each row. On an exception no row has joined."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Add one token to every row, `tokens` [count]; returns logits [count, vocabulary]."""
        ...

    def begin(
        self, tokens: Sequence[int], *, every: InParts | None = None, salt: bytes | None = None
    ) -> Staged:
        """Begin to prefill one row in parts, which `advance` computes and `drop` ends early. Until it has
        joined it is no row, but takes the place of one. One is staged at a time, and only where
        `can_stage`. With a `salt` it begins with the tokens that are `cached`."""
        ...

    def advance(self, staged: Staged, count: int) -> Tensor | None:
        """Prefill `count` more of its tokens. Returns logits [1, vocabulary] after the last one, with which
        it has joined as the last row, else None. On an exception it has not, and has to be dropped."""
        ...

    def decode_beside(self, tokens: Tensor, staged: Staged, count: int) -> Tensor:
        """Do what `decode` does, and where one pass can do both compute what `advance` with the same `count`,
        which has to be called next, is about to. What fails of that fails there."""
        ...

    def drop(self, staged: Staged) -> None: ...

    def cached(self, tokens: Sequence[int], salt: bytes) -> int:
        """Return with how many of its first tokens computed a row of these would begin."""
        ...

    def keep(self, row: int, tokens: Sequence[int], salt: bytes) -> None:
        """Keep what a row holds, the first of these tokens, for others of its salt that begin alike. Only
        the next one that is kept may make it forgotten."""
        ...

    def longest_run(self) -> int:
        """Return how many tokens one row may add at most while others add fewer."""
        ...

    def run(self, tails: Sequence[Sequence[int]], counts: Sequence[int], last: int = 1) -> Tensor:
        """Add `counts[row]` tokens to each row, the last ones of its tail. All tails have `max(counts)`
        tokens, of which the row has the first ones. Returns logits [count, last, vocabulary] after the `last`
        ones of each tail."""
        ...

    def take_back(self, counts: Sequence[int]) -> None:
        """Let each row forget its last `counts[row]` tokens, which `run` has added."""
        ...

    def leave(self, row: int, *, clear: bool = False) -> None: ...


class Forward:
    """Calls a causal language model with the arguments that its class takes."""

    def __init__(self, model: Any) -> None:
        self._head = Head(model)
        self.device: torch.device = model.device
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._cache = "cache_params" if "cache_params" in takes else "past_key_values"

    def __call__(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        last: int = 1,
        every: InParts | None = None,
    ) -> Tensor:
        """Return logits [rows, columns, vocabulary] of the `last` columns; see `Head.run` for `every`."""
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            self._cache: cache,
            "use_cache": cache is not None,
            "return_dict": True,
        }
        if self._takes_positions and positions is not None:
            inputs["position_ids"] = positions
        with torch.inference_mode():
            logits: Tensor = self._head.run(inputs, last=last, every=every).logits
        return logits


class ArenaBatch:
    """Runs rows together: in an arena, or in pages where `room` has them.

    `makes_masks`: steps hand the model a finished attention mask [rows, 1, 1, window] instead of a padding
    mask [rows, window]. Faster, as long as it is the mask that the model would make itself (`takes_masks`).
    `step`: what decodes one token of each row in the place of the model's own forward pass.
    """

    def __init__(
        self,
        model: Any,
        *,
        layers: Sequence[LayerKind],
        max_rows: int,
        max_length: int,
        pad_id: int,
        makes_masks: bool = False,
        step: DecoderStep | None = None,
        room: Room | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`capture`: what captures steps of a pool, so that they are replayed."""
        self._forward = Forward(model)
        self._step: DecoderStep | GraphedStep | None = step
        if step is not None and capture is not None and room is not None and room.page:
            self._step = GraphedStep(step, max_rows, capture)
        self._makes_masks = makes_masks
        self.has_runs = self.can_stage = True  # until the self-check finds otherwise
        self.prefixes: PrefixCache | None = None
        self.page = room.page if room is not None else 0
        self._arena: Arena | PagedPool
        if room is not None and room.page:
            self._arena = PagedPool(layers, max_rows, max_length, self._forward.device, room)
        else:
            self._arena = Arena(layers, max_rows, max_length, self._forward.device, room)
        self._pad_id = pad_id
        self._positions: Tensor = torch.zeros(0, dtype=torch.long, device=self._forward.device)

    @property
    def count(self) -> int:
        return self._arena.count

    def join(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] = (),  # noqa: ARG002 - a decoder reads nothing beside
        every: InParts | None = None,
    ) -> Tensor:
        lengths = [len(sequence) for sequence in sequences]
        longest = max(lengths)
        with torch.inference_mode():
            mask = self._arena.begin_prefill(lengths)
            padded = [[self._pad_id] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
            ids = torch.tensor(padded, dtype=torch.long, device=self._forward.device)
            positions = (mask.long().cumsum(-1) - 1).clamp_(min=0)
            if (found := self._by_step(ids.numel(), longest, every)) is not None:
                # Padding attends to itself: what attends to nothing is no number.
                seen = causal(mask, longest).squeeze(1) | torch.eye(longest, dtype=torch.bool)
                step, arena = found
                logits = step.prefill(ids, positions, seen, arena)
            else:
                logits = self._forward(
                    ids, mask=mask.long(), positions=positions, cache=self._arena, every=every
                )
            self._arena.commit_prefill(lengths)
            self._positions = torch.cat((self._positions, positions[:, -1] + 1))
        return logits[:, -1]

    def _by_step(self, tokens: int, columns: int, every: InParts | None) -> tuple[DecoderStep, Arena] | None:
        """Return the step and its arena where it prefills so many tokens, which attend to `columns`; None:
        the model's own forward pass does."""
        step, arena = self._step, self._arena
        if every is None and isinstance(step, DecoderStep) and isinstance(arena, Arena):
            return (step, arena) if step.prefills(tokens, columns, arena) else None
        return None

    def decode(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._decoded(tokens, self._arena.begin_decode())

    def _decoded(self, tokens: Tensor, opened: Tensor) -> Tensor:
        """Do what `decode` does in the column that the arena has `opened`."""
        if self._step is not None:
            positions = self._positions.unsqueeze(-1)
            logits = self._step(tokens.unsqueeze(-1), positions, opened.unsqueeze(1), self._arena)
        else:
            mask = opened[:, None, None, :] if self._makes_masks else opened.long()
            logits = self._forward(
                tokens.unsqueeze(-1),
                mask=mask if self._arena.has_tokens else None,  # states mask nothing but a prompt's padding
                positions=self._positions.unsqueeze(-1),
                cache=self._arena,
            )
        self._positions += 1
        return logits[:, -1]

    def begin(
        self, tokens: Sequence[int], *, every: InParts | None = None, salt: bytes | None = None
    ) -> Staged:
        held = 0
        with torch.inference_mode():
            try:
                self._arena.begin_staged(len(tokens))
                prefixes = self.prefixes
                if prefixes is not None and salt is not None and (held := prefixes.held(tokens, salt)):
                    fill = partial(prefixes.fill, tokens=tokens[:held], salt=salt)
                    self._arena.fill_staged(held, fill)
            except Exception:
                self._arena.drop_staged()
                raise
        return Staged(tokens, every, held)

    def decode_beside(self, tokens: Tensor, staged: Staged, count: int) -> Tensor:
        rows, columns = len(tokens), staged.held + count
        if (found := self._by_step(rows + count, columns, staged.every)) is None:
            return self.decode(tokens)
        step, arena = found
        with torch.inference_mode():
            opened = arena.begin_decode()
            try:
                running = step.running(opened.unsqueeze(1), arena)
                part, positions, mask = self._begin_part(staged, count)
                assert mask is not None
                logits = step.compute(
                    torch.cat((tokens, part[0])),
                    torch.cat((self._positions, positions[0])),
                    arena,
                    [running, step.joining(mask.squeeze(1), arena)],
                )
            except ERRORS as error:
                if is_out_of_memory(error):
                    raise
                log.warning("a part of a prompt fails beside rows that run: %s", error)
                return self._decoded(tokens, opened)
            self._positions += 1
            staged.ahead = logits[rows:].unsqueeze(0)
        return logits[:rows]

    def advance(self, staged: Staged, count: int) -> Tensor | None:
        with torch.inference_mode():
            if (logits := staged.ahead) is None:
                logits = self._advanced(staged, count)
            staged.ahead = None
            self._arena.commit_part(count)
            staged.held += count
            if staged.left:
                return None
            self._arena.commit_staged()
            self._positions = torch.cat((self._positions, self._positions.new_tensor([staged.held])))
        return logits[:, -1]

    def _advanced(self, staged: Staged, count: int) -> Tensor:
        """Compute `count` more of its tokens. Returns logits [1, any, vocabulary] after the last ones."""
        tokens, positions, mask = self._begin_part(staged, count)
        if mask is not None and (found := self._by_step(count, staged.held + count, staged.every)):
            step, arena = found
            return step.prefill(tokens, positions, mask.squeeze(1), arena)
        return self._forward(tokens, mask=mask, positions=positions, cache=self._arena, every=staged.every)

    def _begin_part(self, staged: Staged, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Open columns for `count` more of its tokens. Returns these and their positions, [1, count], and
        the mask that a forward pass takes."""
        begin, end, device = staged.held, staged.held + count, self._forward.device
        self._arena.begin_part(count)
        mask: Tensor | None = None
        if self._arena.has_tokens:
            ones = torch.ones((1, end), dtype=torch.bool, device=device)
            mask = causal(ones, count) if self._makes_masks else ones.long()
        positions = torch.arange(begin, end, device=device).unsqueeze(0)
        return torch.tensor([list(staged.tokens[begin:end])], device=device), positions, mask

    def drop(self, staged: Staged) -> None:  # noqa: ARG002 - there is one
        with torch.inference_mode():
            self._arena.drop_staged()

    def cached(self, tokens: Sequence[int], salt: bytes) -> int:
        return self.prefixes.held(tokens, salt) if self.prefixes is not None else 0

    def keep(self, row: int, tokens: Sequence[int], salt: bytes) -> None:
        if self.prefixes is not None:
            with torch.inference_mode():
                held = self._arena.lengths()[row]
                self.prefixes.keep(partial(self._arena.tensors, row), tokens[:held], salt)

    def longest_run(self) -> int:
        if not self.has_runs:
            return 1
        longest = min(self._arena.lengths()) + 1
        return min(longest, max(1, self._arena.spare())) if isinstance(self._arena, PagedPool) else longest

    def run(self, tails: Sequence[Sequence[int]], counts: Sequence[int], last: int = 1) -> Tensor:
        width, device = max(counts), self._forward.device
        with torch.inference_mode():
            opened = self._arena.begin_run(counts)
            self._positions += torch.tensor(counts, device=device)
            positions = self._positions.unsqueeze(-1) + torch.arange(-width, 0, device=device)
            tokens = torch.tensor(tails, dtype=torch.long, device=device)
            if self._step is not None:
                seen = causal(opened, width).squeeze(1)
                return self._step(tokens, positions, seen, self._arena, last)
            mask = causal(opened, width) if self._makes_masks else opened.long()
            return self._forward(tokens, mask=mask, positions=positions, cache=self._arena, last=last)

    def take_back(self, counts: Sequence[int]) -> None:
        with torch.inference_mode():
            self._arena.take_back(counts)
            self._positions -= torch.tensor(counts, device=self._positions.device)

    def leave(self, row: int, *, clear: bool = False) -> None:
        with torch.inference_mode():
            self._arena.remove(row, clear=clear)
            if row < self._arena.count:
                self._positions[row] = self._positions[-1]
            self._positions = self._positions[:-1]


def causal(mask: Tensor, width: int) -> Tensor:
    """Return the attention mask [rows, 1, width, window] of the last `width` columns of `mask` [rows,
    window]."""
    window = mask.shape[-1]
    before = torch.ones((width, window), dtype=torch.bool, device=mask.device).tril(window - width)
    return mask[:, None, None, :] & before


def takes_masks(model: Any) -> bool:
    """True where a decoding step may hand the model a finished mask: one of full attention through SDPA.

    Making its own, a model first asks the padding mask whether there is padding at all, which on CUDA waits
    for the device. And where there is none it leaves the mask out: on CPU PyTorch's SDPA with grouped heads
    is three times slower then (measured in bfloat16: 670 against 200 microseconds for 16 rows).
    """
    text = model.config.get_text_config(decoder=True)
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and getattr(text, "_attn_implementation", "") == "sdpa"
        and set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not text.is_heterogeneous  # its layers may have windows of their own
        and not getattr(text, "sliding_window", None)
        and not getattr(text, "attention_chunk_size", None)
    )


@dataclass(slots=True)
class OwnRow:
    """A row as `generate` keeps it: all its tokens [1, tokens], and what it hands on from step to step."""

    ids: Tensor
    kwargs: dict[str, Any]
    states: list[Tensor | None]  # of layers that keep them in themselves


class OneAtATime:
    """A batch whose rows begin whole, and add one token a step each."""

    can_stage = has_runs = False
    page = 0

    def begin(
        self, tokens: Sequence[int], *, every: InParts | None = None, salt: bytes | None = None
    ) -> NoReturn:
        raise AssertionError(f"rows begin whole: {tokens}, {every}, {salt!r}")

    def advance(self, staged: Staged, count: int) -> NoReturn:
        raise AssertionError(f"rows begin whole: {staged}, {count}")

    def decode_beside(self, tokens: Tensor, staged: Staged, count: int) -> NoReturn:
        raise AssertionError(f"rows begin whole: {tokens}, {staged}, {count}")

    def drop(self, staged: Staged) -> NoReturn:
        raise AssertionError(f"rows begin whole: {staged}")

    def cached(self, tokens: Sequence[int], salt: bytes) -> int:  # noqa: ARG002 - nothing is kept
        return 0

    def keep(self, row: int, tokens: Sequence[int], salt: bytes) -> None:
        pass

    def longest_run(self) -> int:
        return 1

    def run(self, tails: Sequence[Sequence[int]], counts: Sequence[int], last: int = 1) -> NoReturn:
        raise AssertionError(f"rows add one token each: {counts}, {tails}, {last}")

    def take_back(self, counts: Sequence[int]) -> NoReturn:
        raise AssertionError(f"rows add one token each, and keep it: {counts}")


class RowByRow(OneAtATime):
    """Runs each row by the hooks of transformers' own `generate`: what a family needs beside ids (a cache of
    its own kind, a cache that starts anew where rotary factors change) lives there."""

    page = 1

    def __init__(self, model: Any) -> None:
        self._model = model
        self._head = Head(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._rotaries = [module for module in model.modules() if hasattr(module, "max_seq_len_cached")]
        self._keepers = [
            (module, name) for module in model.modules() for name in KEPT_IN_LAYERS if name in vars(module)
        ]
        self.rows: list[OwnRow] = []

    @property
    def count(self) -> int:
        return len(self.rows)

    def join(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] = (),
        every: InParts | None = None,
    ) -> Tensor:
        rows = [self._empty(sequence) for sequence in sequences]
        for row, source in zip(rows, sources, strict=False):
            row.kwargs |= self._read(source)
        logits = [self._forward(row, every, is_first_iteration=True) for row in rows]
        self.rows += rows
        return torch.cat(logits)

    def decode(self, tokens: Tensor) -> Tensor:
        logits = []
        for row, token in zip(self.rows, tokens.view(-1, 1, 1), strict=True):
            row.ids = torch.cat((row.ids, token), dim=-1)
            logits.append(self._forward(row, next_sequence_length=1))
        return torch.cat(logits)

    def leave(self, row: int, *, clear: bool = False) -> None:  # noqa: ARG002 - caches are not shared
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def _empty(self, sequence: Sequence[int]) -> OwnRow:
        ids = torch.tensor([list(sequence)], dtype=torch.long, device=self._model.device)
        kwargs: dict[str, Any] = {"use_cache": True}
        if self._takes_positions:
            kwargs["position_ids"] = self._model._prepare_position_ids_for_generation(ids, {})
        # Not with its generation config: a static cache that it names would hold full length for each row.
        self._model._prepare_cache_for_generation(
            GenerationConfig(), kwargs, GenerationMode.GREEDY_SEARCH, 1, 0
        )
        return OwnRow(ids, kwargs, [None] * len(self._keepers))

    def _read(self, source: Sequence[int]) -> dict[str, Any]:  # noqa: ARG002 - a decoder reads nothing beside
        """Return what a row hands on of what its encoder has read."""
        return {}

    def _forward(self, row: OwnRow, every: InParts | None = None, **step: Any) -> Tensor:
        """Return logits [1, vocabulary] after the last of the row's new tokens."""
        for rotary in self._rotaries:
            # Dynamic factors follow from this row's length alone, not from what a longer one before it left.
            for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
                setattr(rotary, name, 0)
        for (module, name), state in zip(self._keepers, row.states, strict=True):
            setattr(module, name, state)
        with torch.inference_mode():
            inputs = self._model.prepare_inputs_for_generation(row.ids, **row.kwargs, **step)
            output = self._head.run({**inputs, "return_dict": True}, every=every)
        row.states = [getattr(module, name) for module, name in self._keepers]
        row.kwargs = self._model._update_model_kwargs_for_generation(output, row.kwargs)
        logits: Tensor = output.logits
        return logits[:, -1]

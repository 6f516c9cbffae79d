"""Plans the memory that a model's KV cache gets once its weights are loaded, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tidegate.engines.transformers.batch import Batch
from tidegate.engines.transformers.kv_size import KvSize
from tidegate.engines.transformers.loading import Loaded, free_bytes
from tidegate.engines.transformers.memory import kv_budget, within_cap
from tidegate.engines.transformers.paged import paged_room
from tidegate.engines.transformers.prefixes import PrefixCache
from tidegate.engines.transformers.room import LEAST_TOKENS, Room
from tidegate.replica_args import EngineSpec, TransformersArgs
from tidegate.sources.facts import CONTEXT_SLACK


@dataclass(frozen=True, slots=True)
class CachePlan:
    """`room` is that of an arena, `pages` that of a pool in the same bytes where one may take its place."""

    slots: int
    room: Room
    pages: Room | None
    prefixes: PrefixCache | None

    def room_of(self, batch: Batch) -> Room:
        """Return how the rows of the batch that was chosen take their room."""
        if self.pages is not None and batch.page == self.pages.page:
            return self.pages
        return replace(self.room, page=batch.page)


def plan_cache(
    loaded: Loaded, kv: KvSize, spec: EngineSpec, args: TransformersArgs, context_length: int
) -> CachePlan:
    """`kv` is what requests hold in the cache of the model. Raises `EngineLoadError` (OutOfMemory)."""
    cap, device = spec.memory_cap_bytes, loaded.device
    is_decoder = not loaded.model.config.is_encoder_decoder
    keeps_only_tokens = bool(kv.layers) and all(kind.has_tokens and not kind.states for kind in kv.layers)
    keeps_prefixes = args.prefix_cache and keeps_only_tokens and is_decoder
    budget = kv_budget(
        free_bytes=within_cap(free_bytes(device), cap, loaded.weights_bytes, device),
        device=device,
        kv_cache_bytes=spec.kv_cache_bytes,
        # Under a cap nobody else counts on what the weights leave of it.
        share=args.kv_cache_share or (1.0 if cap else 0.0),
        bytes_per_row=kv.of_row(context_length + CONTEXT_SLACK),
        least_bytes=kv.of_row(min(context_length, LEAST_TOKENS) + CONTEXT_SLACK),
        max_slots=spec.max_slots,
        keeps_prefixes=keeps_prefixes,
        prefix_bytes=args.prefix_cache_bytes,
    )
    room = Room(budget.bytes, kv.bytes_per_token, kv.bytes_per_row)
    wants_pages = device == "cuda" if args.kv_pages is None else args.kv_pages
    has_pages = wants_pages and keeps_only_tokens and is_decoder
    return CachePlan(
        budget.slots,
        room,
        paged_room(room, device, context_length) if has_pages else None,
        PrefixCache(budget.prefix_bytes, kv.bytes_per_token) if keeps_prefixes else None,
    )

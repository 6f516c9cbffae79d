"""The arguments of the vLLM engine (`EngineSpec.args`). Their names are vLLM's own where it has them."""

from __future__ import annotations

from typing import Annotated

import msgspec


class VllmArgs(msgspec.Struct, frozen=True):
    # CPU threads of one model operation; 0: all cores that this process may use.
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    # True: nothing is compiled and no CUDA graph captured. Starts sooner, answers slower.
    enforce_eager: bool = False
    # Tokens of one step at most, of prompts and answers together; 0: vLLM's own default.
    max_num_batched_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    # Whether prompts share the KV cache of what they begin with alike.
    enable_prefix_caching: bool = True
    # Share of a GPU's memory that all of the engine may take, where the platform caps it no lower.
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.85

"""The arguments of the transformers engine (`EngineSpec.args`)."""

from __future__ import annotations

from typing import Annotated

import msgspec

MOST_LOOKED_UP = 32  # tokens: they lie in `CONTEXT_SLACK`, and cost every row of the step


class TransformersArgs(msgspec.Struct, frozen=True):
    # CPU threads of one model operation; 0: those that decode fastest when tried while requests run, up to
    # all cores that this process may use.
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    # Prompt tokens that join per step at most (one request always may): bounds how long others wait.
    prefill_tokens_per_step: Annotated[int, msgspec.Meta(ge=1)] = 4096
    # Keep keys and values of what prompts begin with, so that the next prompt of the same tenant that begins
    # alike need not compute them.
    prefix_cache: bool = True
    # Memory for that, a part of the KV cache's; 0: up to a ninth of it.
    prefix_cache_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    # Keep keys and values in pages, not in an arena, where rows are padded to the longest. None: on a GPU, of
    # models that attend by the pages there. Only where layers keep nothing else and the self-check passes.
    kv_pages: bool | None = None
    # Tokens that a step may take of a request beyond its next one, proposed by what followed when its last
    # ones came up before (prompt lookup). The answers are the same, faster where they repeat what they have
    # seen; 0: off.
    prompt_lookup_num_tokens: Annotated[int, msgspec.Meta(ge=0, le=MOST_LOOKED_UP)] = 0
    # Begin a step before the tokens of the one before have come to the host, while nobody joins and no row's
    # choice hangs on them. None: on a GPU, which else waits for the host.
    async_scheduling: bool | None = None
    # On a GPU: launch each operation of a decoding step instead of replaying the step as a captured graph.
    enforce_eager: bool = False
    # Share of the memory free after loading that the KV cache may take, where `kv_cache_bytes` is not set;
    # 0: 0.25 on CPU (at most 2 GiB there), 0.85 on CUDA.
    kv_cache_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    # On a CPU: unpack GPTQ weights of 4 bits into `precision` at load. Four times the memory; steps of more
    # than 8 rows are faster, those of fewer slower.
    unpacks_gptq: bool = False

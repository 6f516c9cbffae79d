"""Loads a model into vLLM and steps it, in vLLM's own process: one turn of the replica, one step.

Who runs where. All but reading is on the main thread: it takes up what turns say, lets vLLM make one step,
and writes what that said. A thread reads the replica's frames as they come, however long a step or the load
takes: so neither end waits for the other to read, and this process ends with the replica. Another tells the
metrics, on a socket of their own.
"""

from __future__ import annotations

import os
import platform
import queue
import re
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidegate.engines.base import EngineLoadError, is_out_of_memory
from tidegate.engines.frames import receive, send
from tidegate.engines.transformers.described import Described
from tidegate.engines.transformers.generation_rules import GenerationRules
from tidegate.engines.transformers.memory import (
    CPU_MOST_BYTES,
    CPU_SHARE,
    MOST_SLOTS,
    check_weights_fit,
    free_host_bytes,
    within_cap,
)
from tidegate.engines.vllm.messages import TO_PROCESS, Added, Failed, Load, Loaded, Logprob, Stepped, Turn
from tidegate.engines.vllm.metrics import tell
from tidegate.errors import shortened
from tidegate.messages.codec import encode_open

ENDED_WITH_REPLICA = 71  # the exit code
MOST_TOLD = 600  # characters of vLLM's error
NO_ROOM = re.compile(r"KV cache|No available memory|Free memory on device", re.IGNORECASE)
UNSUPPORTED = re.compile(r"[Mm]odel architectures? .* (not|failed)|not supported|does not support", re.DOTALL)
PACKED_PRODUCT = "cpu_gemm_wna16"  # what vLLM multiplies by packed weights with on x86


def main(descriptor: int, metrics: int) -> None:
    lane, asking = socket.socket(fileno=descriptor), socket.socket(fileno=metrics)
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lane, frames), daemon=True).start()
    try:
        load = TO_PROCESS.decode(frames.get())
        assert isinstance(load, Load)
        try:
            stepping = Stepping(load)
        except Exception as error:  # vLLM raises what it likes
            send(lane, encode_open(_failed(error)))
            raise
        send(lane, encode_open(stepping.loaded))
        threading.Thread(target=tell, args=(asking,), daemon=True).start()
        due = 0
        while True:
            due += _take_up(stepping, frames, waits=not due)
            try:
                stepped = stepping.step()
            except Exception as error:
                send(lane, encode_open(Failed("EngineCrashed", f"vLLM {_version()} failed: {_told(error)}")))
                raise
            send(lane, encode_open(stepped))
            due -= 1
    except ConnectionError:  # the replica is gone
        pass


def _take_up(stepping: Stepping, frames: queue.SimpleQueue[bytes], *, waits: bool) -> int:
    """Take up what all turns say that have come: who joins does not wait for the steps that were asked
    before. Returns their number, with `waits` at least 1."""
    count = 0
    while not frames.empty() or (waits and not count):
        turn = TO_PROCESS.decode(frames.get())
        assert isinstance(turn, Turn)
        stepping.change(turn)
        count += 1
    return count


class Stepping:
    def __init__(self, load: Load) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from tidegate.engines.vllm.choice import Choices

        device = _device(load.device, str(current_platform.device_type))
        self._choices = Choices()
        model = {"model": load.path, "skip_tokenizer_init": True, "dtype": load.precision}
        # Raises where vLLM does not take the context. Then it gets one token more: it wants to say one, and a
        # prompt of the whole context may be scored. That token is never fed, so no position is past the end.
        asked = EngineArgs(**model, max_model_len=load.context_length).create_model_config()
        _check_kernels(asked.quantization, device)
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        options: dict[str, Any] = {}
        # No step has more rows than tokens, and vLLM refuses to be told otherwise.
        if most_tokens := load.args.max_num_batched_tokens:
            options["max_num_batched_tokens"] = most_tokens
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                **model,
                max_model_len=load.context_length + _one_more(asked.hf_text_config, load.context_length),
                max_num_seqs=min(load.max_slots or MOST_SLOTS, most_tokens or MOST_SLOTS),
                max_logprobs=-1,  # the gateway bounds them
                enforce_eager=load.args.enforce_eager,
                enable_prefix_caching=load.args.enable_prefix_caching,
                # What a row may choose can depend on its last token, which the host has to know.
                async_scheduling=False,
                logits_processors=[self._choices.processor()],
                disable_log_stats=False,  # of them its metrics are made
                trust_remote_code=False,
                **_memory(load, device),
                **options,
            )
        )
        config = self._engine.vllm_config
        cache = config.cache_config
        blocks = int(cache.num_gpu_blocks or 0)
        scheduler = self._engine.engine_core.engine_core.scheduler
        self._path, self._device = Path(load.path), device
        vocabulary_size = int(config.model_config.get_vocab_size())
        self.loaded = Loaded(
            vocabulary_size=vocabulary_size,
            slots=min(int(config.scheduler_config.max_num_seqs), max(1, blocks)),
            kv_tokens=int(getattr(cache, "kv_cache_size_tokens", 0) or blocks * cache.block_size),
            blocks=max(1, blocks - 1),  # one is vLLM's own
            groups=[_group(config, group) for group in scheduler.kv_cache_config.kv_cache_groups],
            device=device,
            version=_version(),
        )
        self._rules: GenerationRules | None = None
        self._refused: dict[int, str] = {}  # rows, since the last step
        self._silent: set[int] = set()  # rows that have no token yet

    def change(self, turn: Turn) -> None:
        """Take up what a turn changes before the next step."""
        for number in turn.left:
            self._silent.discard(number)
            if self._choices.rows.pop(number, None) is not None:
                self._engine.abort_request([str(number)])
        for added in turn.added:
            try:
                self._add(added)
            except (ValueError, TypeError, EngineLoadError) as error:
                self._choices.rows.pop(added.row, None)
                self._silent.discard(added.row)
                self._refused[added.row] = _told(error)
        for number, words in turn.masks:
            if (row := self._choices.rows.get(number)) is not None:
                row.matcher.allowed = np.frombuffer(words, dtype=np.int32)

    def step(self) -> Stepped:
        refused, self._refused = self._refused, {}
        outputs = self._engine.step() if self._engine.has_unfinished_requests() else []
        return self._stepped(outputs, refused)

    def _add(self, added: Added) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from tidegate.engines.vllm.choice import ROW, Row

        rules = None
        if added.ruled_ends is not None:
            rules = self._generation_rules(added.ruled_ends).of_prompt(len(added.prompt), added.limit)
        self._choices.rows[added.row] = Row(added, rules)
        self._silent.add(added.row)
        prompt: dict[str, Any] = {"prompt_token_ids": [*added.prompt, *added.generated]}
        if added.salt:
            prompt["cache_salt"] = added.salt
        self._engine.add_request(
            str(added.row),
            prompt,
            SamplingParams(
                temperature=0.0,
                max_tokens=max(1, added.limit - len(added.generated)),
                ignore_eos=True,  # the row's own end tokens are all that count
                stop_token_ids=added.end_ids,
                prompt_logprobs=added.prefill_logprobs,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args={ROW: added.row},
            ),
        )

    def _stepped(self, outputs: list[Any], failed: dict[int, str]) -> Stepped:
        stepped = Stepped(failed=failed)
        for output in outputs:
            number = int(output.request_id)
            (token,) = output.outputs[0].token_ids
            stepped.rows.append(number)
            stepped.tokens.append(token)
            if number in self._silent:
                self._silent.discard(number)
                stepped.cached[number] = output.num_cached_tokens or 0
            if output.prompt_logprobs:
                stepped.prefill[number] = _prefill(output.prompt_token_ids, output.prompt_logprobs)
            if output.finished:
                stepped.ended.append(number)
                del self._choices.rows[number]
        told, known = self._choices.told, set(stepped.rows)  # rows in the middle of a prompt are not told of
        stepped.not_finite.extend(number for number in told.not_finite if number in known)
        stepped.closed.extend(number for number in told.closed if number in known)
        stepped.logprobs.update((number, found) for number, found in told.logprobs.items() if number in known)
        return stepped

    def _generation_rules(self, end_ids: list[int]) -> GenerationRules:
        if self._rules is None:
            described = Described(self._path, self.loaded.vocabulary_size, self._device)
            self._rules = GenerationRules(described, end_ids)
        return self._rules


def _memory(load: Load, device: str) -> dict[str, Any]:
    """Return what vLLM is told of memory. Raises `EngineLoadError` (OutOfMemory)."""
    cap = load.memory_cap_bytes
    if device == "cpu":
        free = free_host_bytes()
        check_weights_fit(load.weights_bytes, within_cap(free, cap, 0, device), device)
        left = within_cap(free, cap, load.weights_bytes, device)
        most = left if cap else min(int(left * CPU_SHARE), CPU_MOST_BYTES)
        return {"kv_cache_memory_bytes": min(load.kv_cache_bytes or most, left)}
    total = int(torch.cuda.mem_get_info()[1])
    share = min(load.args.gpu_memory_utilization, cap / total if cap else 1.0)
    found: dict[str, Any] = {"gpu_memory_utilization": share}
    if load.kv_cache_bytes:
        found["kv_cache_memory_bytes"] = load.kv_cache_bytes
    return found


def _one_more(config: Any, context_length: int) -> int:
    """Return the token that vLLM is told of beyond the context; none where it would change the factors by
    which all positions are turned."""
    rope = getattr(config, "rope_parameters", None) or {}
    switch = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", 0
    )
    return int(rope.get("rope_type") != "longrope" or switch != context_length)


def _group(config: Any, group: Any) -> tuple[int, int]:
    spec = group.kv_cache_spec
    return int(spec.block_size), max(1, -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes))


def _device(asked: str, found: str) -> str:
    if asked not in ("auto", found):
        raise EngineLoadError(
            "InvalidEngineArgs",
            f"device is {asked}, but the vLLM that is installed here computes on {found or 'nothing'}: "
            "set device to auto, or install vLLM's build for the other.",
        )
    return found


def _check_kernels(quantization: str | None, device: str) -> None:
    """Refuse packed weights where vLLM's build for the processor cannot multiply by them: it finds out only
    when it is in the middle of it."""
    import vllm._custom_ops

    if not quantization or device != "cpu" or platform.machine() != "x86_64":
        return
    if not hasattr(torch.ops._C, PACKED_PRODUCT):
        raise EngineLoadError(
            "UnsupportedModel",
            f"vLLM {vllm.__version__} does not multiply by packed weights ({quantization}) on a processor "
            "without AVX-512: set engine.name to transformers, which does.",
        )


def _prefill(tokens: list[int], found: list[Any]) -> tuple[list[Logprob], list[int]]:
    """Turn vLLM's log probabilities of a prompt into those of each token but the first, and its ranks."""
    values: list[Logprob] = []
    ranks: list[int] = []
    for token, entries in zip(tokens[1:], found[1:], strict=True):
        likeliest = sorted(entries.items(), key=lambda entry: entry[1].rank)
        ids, logprobs = [other for other, _ in likeliest], [entry.logprob for _, entry in likeliest]
        values.append((entries[token].logprob, ids, logprobs))
        ranks.append(entries[token].rank)
    return values, ranks


def _failed(error: Exception) -> Failed:
    """Sort what vLLM raised into the reasons of `EngineLoadError`."""
    if isinstance(error, EngineLoadError):
        return Failed(error.reason, error.message)
    said = _told(error)
    if is_out_of_memory(error) or NO_ROOM.search(said):
        return Failed("OutOfMemory", f"vLLM has too little memory: {said}")
    if UNSUPPORTED.search(said):
        return Failed("UnsupportedModel", f"vLLM {_version()} does not serve this model: {said}")
    return Failed("WeightsWrong", f"vLLM {_version()} could not load the model: {said}")


def _told(error: Exception) -> str:
    words = " ".join(str(error).split()).partition(" Supported architectures:")[0]  # hundreds
    return shortened(f"{type(error).__name__}: {words}", MOST_TOLD)


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _read(lane: socket.socket, frames: queue.SimpleQueue[bytes]) -> None:
    """End this process when the replica's end of the socket closes."""
    try:
        while (frame := receive(lane)) is not None:
            frames.put(frame)
    finally:
        os._exit(ENDED_WITH_REPLICA)

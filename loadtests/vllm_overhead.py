"""What the platform costs around vLLM: `python -m loadtests.vllm_overhead CHECKPOINT`.

The same rows and tokens, in turn and in one run: by vLLM's `LLMEngine` alone, and by a replica's vLLM engine
(its process, and the replica's engine thread). Figures are CPU time per token, which a busy machine stretches
less than the clock. TG_VLLM_PYTHON names vLLM's interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.engine_requests import a_request
from tidegate.engines.base import Prepared
from tidegate.engines.create import create_engine
from tidegate.engines.vllm.engine import VllmEngine
from tidegate.engines.vllm.process import environment, find_python
from tidegate.replica_args import EngineSpec, VllmArgs

PROMPT_TOKENS = 32
# Reads {"rows": n, "tokens": n, "sampling": {...}} from each line, runs it, and writes its CPU seconds.
BARE = """
import json, sys, time
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

path, precision, eager = sys.argv[1:]
engine = LLMEngine.from_engine_args(EngineArgs(model=path, dtype=precision, skip_tokenizer_init=True,
    max_num_seqs=256, kv_cache_memory_bytes=1 << 29, enforce_eager=eager == "1", disable_log_stats=True))
print("ready", flush=True)
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    began = time.process_time()
    for row in range(asked["rows"]):
        engine.add_request(f"{number}.{row}", {"prompt_token_ids": asked["prompts"][row]}, SamplingParams(
            max_tokens=asked["tokens"], ignore_eos=True, detokenize=False, seed=row,
            output_kind=RequestOutputKind.DELTA, **asked["sampling"]))
    while engine.has_unfinished_requests():
        engine.step()
    print("took", time.process_time() - began, flush=True)
"""


class Bare:
    def __init__(self, path: Path, precision: str, args: VllmArgs) -> None:
        self._process = subprocess.Popen(
            [find_python(os.environ), "-c", BARE, str(path), precision, str(int(args.enforce_eager))],
            env=environment(os.environ, args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read("ready")

    def run(self, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> float:
        asked = {"rows": len(prompts), "prompts": prompts, "tokens": tokens, "sampling": sampling}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return float(self._read("took")[0])

    def close(self) -> None:
        self._process.communicate()

    def _read(self, word: str) -> list[str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            first, *rest = line.split()
            if first == word:
                return rest
        raise SystemExit(f"vLLM ended with {self._process.wait()}")


def run(engine: VllmEngine, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> list[float]:
    """Return the CPU seconds of vLLM's process, and of this thread."""
    assert engine._process is not None
    vllm = psutil.Process(engine._process.pid)
    requests = [
        a_request(f"r{row}", prompt, max_tokens=tokens, **{**sampling, "seed": row})
        for row, prompt in enumerate(prompts)
    ]

    async def prepared() -> list[Any]:
        return [await engine.prepare(request) for request in requests]

    ready = asyncio.run(prepared())
    times = vllm.cpu_times()
    began, theirs = time.thread_time(), times.user + times.system
    for one in ready:
        assert isinstance(one, Prepared)
        engine.add(one, [])
    while engine.has_work():
        engine.step()
    times = vllm.cpu_times()
    return [times.user + times.system - theirs, time.thread_time() - began]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    asked = parser.parse_args()
    args = VllmArgs(threads=asked.threads, enforce_eager=asked.eager)
    path = asked.checkpoint.resolve()
    bare = Bare(path, asked.precision, args)
    spec = EngineSpec(
        "vllm",
        path=str(path),
        precision=asked.precision,
        kv_cache_bytes=1 << 29,
        args={"threads": asked.threads, "enforce_eager": asked.eager},
    )
    engine = create_engine(spec)
    assert isinstance(engine, VllmEngine)
    engine.load()
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 0.8, "top_p": 0.95},
    }
    sys.stdout.write(
        "CPU microseconds a token: vLLM alone / vLLM's process / engine thread, and both to alone\n"
    )
    for rows in asked.rows:
        prompts = [[3 + (7 * row + place) % 400 for place in range(PROMPT_TOKENS)] for row in range(rows)]
        for kind, sampling in kinds.items():
            found: list[list[float]] = []
            for _ in range(asked.rounds + 1):
                alone = bare.run(prompts, asked.tokens, sampling)
                found.append([alone, *run(engine, prompts, asked.tokens, sampling)])
            alone, theirs, ours = (
                statistics.median(each) / rows / asked.tokens * 1e6 for each in zip(*found[1:], strict=True)
            )
            figures = f"{alone:8.0f} / {theirs:8.0f} / {ours:6.0f}   {(theirs + ours) / alone:.3f}"
            sys.stdout.write(f"{rows:3} rows {kind:8} {figures}\n")
            sys.stdout.flush()
    engine.close()
    bare.close()


if __name__ == "__main__":
    main()

"""What the platform costs around vLLM: `python -m loadtests.vllm_overhead CHECKPOINT`.

The same rows and tokens, in turn and in one run: by vLLM's `LLMEngine` as vLLM itself starts it (its worker
in a process of its own, its threads and where they run), by one in our environment and nothing of ours in it,
and by a replica's vLLM engine (its process, and the replica's engine thread), with each of `--threads`.
Figures are CPU time a token, which a busy machine stretches less than the clock, and tokens a second of
vLLM's own, which say what waiting costs. TG_VLLM_PYTHON names vLLM's interpreter, else that of the tests.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.engine_requests import a_request
from tests.vllm.environment import vllm_python
from tidegate.engines.base import Prepared
from tidegate.engines.create import create_engine
from tidegate.engines.vllm.engine import VllmEngine
from tidegate.engines.vllm.process import ENVIRONMENT, PYTHON_VARIABLE, environment
from tidegate.replica_args import EngineSpec, VllmArgs

PROMPT_TOKENS, CONTEXT, KV_BYTES = 32, 2048, 1 << 29
# Reads {"prompts": [...], "tokens": n, "sampling": {...}} from each line, runs it, and says so. vLLM starts
# its worker by importing this file again.
BARE = """
import json, sys

def main():
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    path, precision, eager, context, kv_bytes = sys.argv[1:]
    engine = LLMEngine.from_engine_args(EngineArgs(model=path, dtype=precision, skip_tokenizer_init=True,
        max_model_len=int(context), max_num_seqs=256, kv_cache_memory_bytes=int(kv_bytes),
        enforce_eager=eager == "1", disable_log_stats=False))
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        for row, prompt in enumerate(asked["prompts"]):
            engine.add_request(f"{number}.{row}", {"prompt_token_ids": prompt}, SamplingParams(
                max_tokens=asked["tokens"], ignore_eos=True, detokenize=False, seed=row,
                output_kind=RequestOutputKind.DELTA, **asked["sampling"]))
        while engine.has_unfinished_requests():
            engine.step()
        print("done", flush=True)

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one round: by the clock, of CPU time of vLLM's processes, and of the engine thread."""

    wall: float
    vllm: float
    thread: float = 0.0


class Side(Protocol):
    def run(self, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> Took: ...

    def close(self) -> None: ...


class Bare:
    def __init__(self, script: Path, path: Path, precision: str, args: VllmArgs, *, is_ours: bool) -> None:
        """`is_ours`: in the environment of a replica's vLLM, with its engine in one process."""
        environ = environment(os.environ, args)
        if not is_ours:
            ours = {*ENVIRONMENT, "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"} - os.environ.keys()
            environ = {name: value for name, value in environ.items() if name not in ours}
            environ["HF_HUB_OFFLINE"] = environ["VLLM_NO_USAGE_STATS"] = "1"
        words = [str(path), precision, str(int(args.enforce_eager)), str(CONTEXT), str(KV_BYTES)]
        self._process = subprocess.Popen(
            [str(vllm_python()), str(script), *words],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read("ready")

    def run(self, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> Took:
        asked = {"prompts": prompts, "tokens": tokens, "sampling": sampling}
        assert self._process.stdin is not None
        began, theirs = time.perf_counter(), cpu_seconds(self._process.pid)
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        self._read("done")
        return Took(time.perf_counter() - began, cpu_seconds(self._process.pid) - theirs)

    def close(self) -> None:
        self._process.communicate()

    def _read(self, word: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == word:
                return
        raise SystemExit(f"vLLM ended with {self._process.wait()}")


class Ours:
    def __init__(self, path: Path, precision: str, threads: int, *, eager: bool) -> None:
        args = {"threads": threads, "enforce_eager": eager}
        spec = EngineSpec("vllm", path=str(path), precision=precision, kv_cache_bytes=KV_BYTES, args=args)
        engine = create_engine(spec)
        assert isinstance(engine, VllmEngine)
        engine.load()
        self._engine = engine

    def run(self, prompts: list[list[int]], tokens: int, sampling: dict[str, Any]) -> Took:
        engine = self._engine
        assert engine._process is not None
        requests = [
            a_request(f"r{row}", prompt, max_tokens=tokens, **{**sampling, "seed": row})
            for row, prompt in enumerate(prompts)
        ]

        async def prepared() -> list[Any]:
            return [await engine.prepare(request) for request in requests]

        ready = asyncio.run(prepared())
        theirs = cpu_seconds(engine._process.pid)
        wall, thread = time.perf_counter(), time.thread_time()
        for one in ready:
            assert isinstance(one, Prepared)
            engine.add(one, [])
        while engine.has_work():
            engine.step()
        thread = time.thread_time() - thread
        return Took(time.perf_counter() - wall, cpu_seconds(engine._process.pid) - theirs, thread)

    def close(self) -> None:
        self._engine.close()


def cpu_seconds(pid: int) -> float:
    """Of a process and those that it started."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[0], help="0: what a replica chooses")
    parser.add_argument("--eager", action="store_true")
    asked = parser.parse_args()
    path, eager = asked.checkpoint.resolve(), asked.eager
    os.environ[PYTHON_VARIABLE] = str(vllm_python())
    script = path.with_name(f"{path.name}-bare-vllm.py")
    script.write_text(BARE)
    sides: dict[str, Side] = {
        "vLLM's own": Bare(script, path, asked.precision, VllmArgs(enforce_eager=eager), is_ours=False)
    }
    for threads in asked.threads:
        args = VllmArgs(threads=threads, enforce_eager=eager)
        name = f"{threads} threads" if threads else "default threads"
        sides[f"bare, {name}"] = Bare(script, path, asked.precision, args, is_ours=True)
        sides[f"replica, {name}"] = Ours(path, asked.precision, threads, eager=eager)
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 0.8, "top_p": 0.95},
    }
    sys.stdout.write(
        "Medians: CPU microseconds a token of vLLM's processes + the engine thread, of vLLM's own; tokens/s, "
        "of vLLM's own\n"
    )
    for rows in asked.rows:
        prompts = [[3 + (7 * row + place) % 400 for place in range(PROMPT_TOKENS)] for row in range(rows)]
        for kind, sampling in kinds.items():
            found: dict[str, list[Took]] = {name: [] for name in sides}
            for number in range(asked.rounds + 1):
                for name, side in sides.items():
                    took = side.run(prompts, asked.tokens, sampling)
                    if number:
                        found[name].append(took)
            own = found["vLLM's own"]
            for name, mine in found.items():
                told(f"{rows:3} rows, {kind}, {name}", mine, own, rows * asked.tokens)
    for side in sides.values():
        side.close()


def told(what: str, mine: list[Took], own: list[Took], tokens: int) -> None:
    cpu = statistics.median(
        (one.vllm + one.thread) / (other.vllm) for one, other in zip(mine, own, strict=True)
    )
    rate = statistics.median(other.wall / one.wall for one, other in zip(mine, own, strict=True))
    vllm, thread = (
        statistics.median(each) / tokens * 1e6
        for each in zip(*((one.vllm, one.thread) for one in mine), strict=True)
    )
    wall = statistics.median(one.wall for one in mine)
    sys.stdout.write(
        f"{what:44} {vllm:7.0f} + {thread:4.0f}  {cpu:5.2f}   {tokens / wall:7.0f}/s  {rate:5.2f}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""What each way of choosing and reading tokens costs beside greedy, in an engine of its own:
`python -m loadtests.sampling [CHECKPOINT ...]`.

Without checkpoints: the demo model, and two Llamas of random weights, whose vocabularies have 32,000 and
128,256 tokens and whose likeliest tokens are as likely as a trained one's; with `--flat` any token is about
as likely as any other, which is the hardest there is for `top_p` and `min_p`. In each round every case runs
once, between runs of greedy, with all rows from the first token to the last; a figure is the CPU time of the
engine's thread (one: the model computes in it too) in a step that only decodes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from msgspec.structs import replace as with_fields

from loadtests.constrained import made
from loadtests.requests import request_for
from tidegate.engines.base import Prepared, StepOutput
from tidegate.engines.create import create_engine
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.messages.codec import encode_segment
from tidegate.messages.work import ChatPrompt, Generate, Request, Sampling, Segment, TextPrompt, TokenPrompt
from tidegate.replica_args import EngineSpec

DEMO = Path(__file__).parents[1] / "platform/tidegate/demo/weights/tide-demo"
VOCABULARIES = (32_000, 128_256)
HIDDEN = 384
ROWS, TOKENS, ROUNDS = (1, 16, 64), 24, 5
IN_A_ROW = 3
MOST = 1.10
TEXT = "The water stands higher inside than outside, so"
TOOLS = [{"type": "function", "function": {"name": "read_gauge", "parameters": {"type": "object"}}}]
CHAT = ChatPrompt([{"role": "user", "content": TEXT}], tools=TOOLS, tool_choice="auto")

GREEDY = "greedy"
CASES: dict[str, dict[str, Any]] = {
    GREEDY: {},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "top_k, top_p": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "presence, frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "logprobs 20": {"top_logprobs": 20},
    "4 stop strings": {"stop": ("\n\nQ:", "</answer>", "Observation:", "###")},
    "a seed each": {"temperature": 1.0},
    "n 8": {"temperature": 1.0},
    "logit_bias of 300": {"logit_bias": tuple((3 + 4 * at, (at % 5) / 10) for at in range(300))},
    "bad_words": {"bad_words": ("water", "inside", "tide gate", "higher than")},
    "min_tokens": {"min_tokens": TOKENS, "ignore_eos": False},
    "a long prompt": {},
    "tools and thoughts": {},  # with that prompt
    "a tokenizer's own decode": {},
}
OF = {"tools and thoughts": "a long prompt"}  # others are compared with greedy
SPREAD = 4.0  # the standard deviation of logits
SEEDED = ("a seed each", "n 8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.sampling", description=__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--flat", action="store_true", help="logits differ by little")
    chosen = parser.parse_args()
    cases = [case for case in CASES if case in {GREEDY, *chosen.cases, *map(OF.get, chosen.cases)}]
    with tempfile.TemporaryDirectory() as folder:
        paths = chosen.checkpoints or [DEMO, *(Path(folder) / str(size) for size in VOCABULARIES)]
        for path in paths:
            if not path.exists():
                made(path, int(path.name), HIDDEN, None if chosen.flat else SPREAD)
            compare(path, Path(folder), cases, chosen.rows, chosen.rounds)


def compare(path: Path, folder: Path, cases: Sequence[str], rows: Sequence[int], rounds: int) -> None:
    engine = loaded(path, max(rows))
    decoding = loaded(with_other_decoder(path, folder), max(rows))  # by its tokenizer, a window at a time
    print(f"\n{path.name}: {engine._vocabulary_size:,} tokens, ms a step and what it is of greedy's\n")
    print("| case |" + "".join(f" {count} rows | |" for count in rows) + " µs a token to encode |")
    print("|---|" + "---:|---:|" * len(rows) + "---:|")
    found: dict[int, list[dict[str, Measured]]] = {}
    for count in rows:
        of_round = partial(a_round, engine, decoding, cases, count)
        of_round()  # warms up
        found[count] = [of_round() for _ in range(rounds)]
    for case in cases:
        line = f"| {case} |"
        for count in rows:
            ratio = median([each[case].of_greedy for each in found[count]])
            line += f" {1e3 * median([each[case].seconds for each in found[count]]):.2f} |"
            line += f" {ratio:.2f}{' (!)' if ratio > MOST else ''} |"
        print(line + f" {1e6 * median([each[case].encoding for each in found[rows[-1]]]):.1f} |")
    engine.close()
    decoding.close()


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float  # of CPU time, of a step
    encoding: float  # seconds of CPU time, of a token
    of_greedy: float = 1.0


def a_round(
    engine: TransformersEngine, decoding: TransformersEngine, cases: Sequence[str], rows: int
) -> dict[str, Measured]:
    """Run all cases, a few between two runs of greedy, whose mean they are compared with."""
    others = [case for case in cases if case != GREEDY]
    before = measured(engine, GREEDY, rows)
    found = {GREEDY: before}
    for begin in range(0, len(others), IN_A_ROW):
        some = {
            case: measured(decoding if case == "a tokenizer's own decode" else engine, case, rows)
            for case in others[begin : begin + IN_A_ROW]
        }
        after = measured(engine, GREEDY, rows)
        for case, its in some.items():
            base = {**found, **some}[OF[case]].seconds if case in OF else (before.seconds + after.seconds) / 2
            found[case] = replace(its, of_greedy=its.seconds / base)
        before = after
    return found


def measured(engine: TransformersEngine, case: str, rows: int) -> Measured:
    """Returns the thread's CPU seconds for a step of all rows (the middle one), and for encoding a token."""
    for number in range(rows):
        prepared = asyncio.run(engine.prepare(a_request(case, number)))
        assert isinstance(prepared, Prepared), prepared
        if case in OF.values():
            request = a_request(GREEDY, number)
            work = with_fields(request.work, prompt=TokenPrompt(list(prepared.prompt)))
            prepared = asyncio.run(engine.prepare(with_fields(request, work=work)))
            assert isinstance(prepared, Prepared), prepared
        assert engine.add(prepared, []) is None
    engine.step()  # their prompts
    steps, outputs, last = [], list[StepOutput](), list[StepOutput]()
    while not any(output.finish for output in last):  # all rows are in the batch
        outputs += last
        begun = time.thread_time()
        last = engine.step()
        steps.append(time.thread_time() - begun)
    assert len(outputs) > rows, f"rows of {case!r} end at once"
    begun = time.thread_time()
    for output in outputs:
        encode_segment(Segment(output.request_id, 1, output.finish, output.output))
    encoding = (time.thread_time() - begun) / len(outputs)
    while engine.has_work():
        engine.step()
    return Measured(median(steps), encoding)


def a_request(case: str, number: int) -> Request:
    text = TextPrompt(TEXT if case == "n 8" else f"{number}. {TEXT}")
    prompt = CHAT if case in OF or case in OF.values() else text
    sampling = Sampling(seed=7 * number if case in SEEDED else 1, temperature=0.0, ignore_eos=True)
    sampling = with_fields(sampling, max_tokens=TOKENS, **CASES[case])
    return request_for(str(number), Generate(prompt, sampling))


def loaded(path: Path, rows: int) -> TransformersEngine:
    spec = EngineSpec(
        "transformers", path=str(path), chat_template="hermes", max_slots=rows, args={"threads": 1}
    )
    engine = create_engine(spec)
    engine.load()
    assert isinstance(engine, TransformersEngine)
    return engine


def with_other_decoder(path: Path, folder: Path) -> Path:
    """Copy a checkpoint with a tokenizer whose tokens are no bytes."""
    copy = folder / f"{path.name}-decode"
    copy.mkdir()
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, copy / file.name)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

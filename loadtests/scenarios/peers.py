"""Our engine and vLLM's, each through the whole platform, beside bare vLLM: same checkpoint, calls in turn.

Bare vLLM is its own OpenAI server with its defaults, from the environment of the tests, which is made where
it is missing, or the one whose interpreter `TG_VLLM_PYTHON` names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, company, middle, percentile, ratio, spread
from loadtests.generator import MARK
from loadtests.machine import Processes, StartFailed, free_port, wait_for
from loadtests.measure import GeneratorFailed, Load, Run, Target, run_load
from loadtests.plot import bars
from loadtests.stack import EngineShape, answers, start_platform
from tidegate.engines.vllm.process import PYTHON_VARIABLE

REQUESTS = (1, 16, 64)
ALONE = (
    4  # requests in a row where one runs at once: the first finds caches that the sides before it have left
)
CONTEXT = 2048
TOKENS = 128
# About 32 tokens of the checkpoint's tokenizer. No prompt begins like another: nothing is held of it.
PROMPT = (
    f"{MARK}: the statement is executed by first evaluating the object and then the name of the "
    "attribute in the list of its values"
)
FORMATS = ("bfloat16", "GPTQ")
BARE_ROLE = "vllm"
BARE, OURS, AROUND = "bare vLLM", "Tidegate, transformers", "Tidegate, vllm"
ENGINES = {BARE: "", OURS: "transformers", AROUND: "vllm"}
GREEDY: dict[str, object] = {"temperature": 0}
START_SECONDS = 600.0  # vLLM compiles
OF_BARE = Goal("higher", 0.9, 1.0)
TTFT_OF_BARE = Goal("lower", 1.0)
AROUND_OF_BARE = Goal("higher", 0.97)


@dataclass(slots=True)
class Found:
    """The runs of one side at one number of requests, by rounds."""

    runs: list[Run] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Tokens per second."""
        return [ratio(run.tally.tokens, run.tally.busy_seconds()) for run in self.runs]

    def first(self) -> list[float]:
        """Seconds to the first token, the median of a round's requests."""
        return [percentile(run.tally.ttft, 50) for run in self.runs]


def run(context: Context) -> Section:
    from loadtests.checkpoints import llama, quantized  # other scenarios need no torch
    from tests.vllm.environment import vllm_python

    python = os.environ[PYTHON_VARIABLE] = str(vllm_python())  # for the replica too
    found: dict[tuple[str, str, int], Found] = {}
    left_out: list[str] = []
    plain = llama(context.folder / FORMATS[0])
    for name, checkpoint in zip(FORMATS, (plain, quantized(context.folder / FORMATS[1], plain)), strict=True):
        with ExitStack() as stack:
            try:
                targets = start(stack, context, checkpoint, python)
            except StartFailed as error:
                if not str(error).startswith(f"{BARE_ROLE} "):
                    raise
                # It does not serve everything on every processor.
                left_out.append(f"{name} is not compared: {str(error).splitlines()[0].rstrip(':')}")
                continue
            for count in REQUESTS:
                load = load_of(count, GREEDY)
                for measured in range(-1, context.rounds):  # the first is not counted
                    for side, target in targets.items():
                        done = answered(target, load)
                        if measured >= 0:
                            found.setdefault((name, side, count), Found()).runs.append(done)
    if not found:
        raise StartFailed("; ".join(left_out))
    section = summarize(found)
    section.remarks += left_out
    plot = context.folder / "peers.svg"
    plot.write_text(bars("Tokens per second, bare vLLM being 1", shares_of(found)))
    section.remarks.append(f"Plot: {plot}")
    return section


def answered(target: Target, load: Load) -> Run:
    """Raises `GeneratorFailed` where a request was not answered: such a server is not compared."""
    run = run_load(target, load)
    if run.tally.statuses.keys() != {"200"} or run.tally.connection_errors:
        raise GeneratorFailed(f"{target.name}: {run.tally.statuses}, {run.tally.connection_errors} cut off")
    return run


def load_of(count: int, more: Mapping[str, object]) -> Load:
    """So many requests at once, with these fields."""
    return Load(
        count,
        TOKENS,
        seconds=300.0,
        spread_seconds=1e-6,
        requests_per_client=ALONE if count == 1 else 1,
        is_counted_at_once=True,
        prompt=PROMPT,
        more=more,
    )


def start(
    stack: ExitStack, context: Context, checkpoint: Path, python: str, wanted: Mapping[str, str] = ENGINES
) -> dict[str, Target]:
    """Start sides, each with its engine, and return where they answer."""
    sides = {}
    slots = max(REQUESTS)
    for side, engine in wanted.items():
        folder = context.folder / checkpoint.name / side.replace(" ", "-").replace(",", "")
        processes = stack.enter_context(Processes(folder, context.nice))
        if not engine:
            sides[side] = start_bare(processes, checkpoint, python, slots)
            continue
        words = ("--engine", engine, "--path", str(checkpoint), "--slots", str(slots))
        sides[side] = start_platform(processes, EngineShape(slots, 0), engine=words, model="llama").target
    return sides


def start_bare(processes: Processes, checkpoint: Path, python: str, slots: int) -> Target:
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", "llama", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(slots), "--dtype", "bfloat16"]
    server = processes.start(BARE_ROLE, command, {"VLLM_CPU_KVCACHE_SPACE": "2"})
    target = Target(BARE, "127.0.0.1", port, "llama", process_ids={BARE_ROLE: server.pid})
    wait_for(server, answers(target), START_SECONDS, "answer")
    return target


def shares_of(found: dict[tuple[str, str, int], Found]) -> dict[str, dict[str, float]]:
    """Pure. Tokens per second of bare vLLM's, by weights and number of requests, then by side."""
    groups: dict[str, dict[str, float]] = {}
    for (name, side, count), mine in found.items():
        bare = found[name, BARE, count].rates()
        groups.setdefault(f"{name}, {count}", {})[side] = middle(mine.rates()) / middle(bare)
    return groups


def summarize(found: dict[tuple[str, str, int], Found]) -> Section:
    """Pure."""
    section = Section("peers", f"Greedy streams of {TOKENS} tokens over HTTP, beside bare vLLM, in turn")
    rows: list[list[str]] = []
    for (name, side, count), mine in found.items():
        bare = found[name, BARE, count]
        shares = [ratio(one, other) for one, other in zip(mine.rates(), bare.rates(), strict=True)]
        waits = [ratio(one, other) for one, other in zip(mine.first(), bare.first(), strict=True)]
        lengths = sorted({length for run in mine.runs for length in run.tally.token_counts})
        rows.append(
            [
                name,
                str(count),
                side,
                f"{middle(mine.rates()):.0f}",
                f"{middle(shares):.2f} ({spread(shares, 2)})",
                f"{1000 * middle(mine.first()):.0f}",
                f"{middle(waits):.2f}",
                ", ".join(lengths),
            ]
        )
        if side == BARE:
            continue
        goal = OF_BARE if side == OURS else AROUND_OF_BARE
        section.figures.append(
            Figure(f"{side}: {name}, {count} at once, tokens/s of bare", middle(shares), "", goal)
        )
        if side == OURS:
            section.figures.append(
                Figure(f"{side}: {name}, {count} at once, TTFT p50 of bare", middle(waits), "", TTFT_OF_BARE)
            )
    head = [
        "weights",
        "requests",
        "side",
        "tokens/s",
        "of bare (rounds)",
        "TTFT p50, ms",
        "of bare",
        "tokens",
    ]
    section.tables.append((head, rows))
    section.remarks.append(company([run.cores_of_others for each in found.values() for run in each.runs]))
    return section

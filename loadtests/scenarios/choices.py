"""What each way of choosing tokens costs a user beside greedy: tokens per second over HTTP, in turn, of our
engine through the whole platform and of bare vLLM (`peers`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, company, middle, ratio, spread
from loadtests.generator import MARK
from loadtests.measure import Run
from loadtests.scenarios.peers import BARE, ENGINES, FORMATS, GREEDY, OURS, answered, load_of, start

REQUESTS = (16, 64)
IN_A_ROW = 3  # cases, between two runs of greedy that they are compared with
SAMPLED: dict[str, object] = {"temperature": 1, "ignore_eos": True}
CASES: dict[str, dict[str, object]] = {
    "temperature": SAMPLED,
    "top_p 0.9": SAMPLED | {"top_p": 0.9},
    "top_k 40": SAMPLED | {"top_k": 40},
    "top_k 40, top_p 0.9": SAMPLED | {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "min_p 0.05": SAMPLED | {"min_p": 0.05},
    "presence, frequency": GREEDY | {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "repetition_penalty": GREEDY | {"repetition_penalty": 1.1},
    "20 log probabilities": GREEDY | {"logprobs": True, "top_logprobs": 20},
    "4 stop strings": GREEDY | {"stop": ["\n\nQ:", "</answer>", "Observation:", "###"]},
    "a seed each": SAMPLED | {"seed": int("1" + MARK)},  # in whose place is a number of the client's
    "n 8": SAMPLED | {"n": 8},
    "a bias of 300 tokens": GREEDY | {"logit_bias": {str(3 + 4 * at): (at % 5) / 10 for at in range(300)}},
}
OF_GREEDY = Goal("higher", 1 / 1.1)
Found = dict[tuple[int, str, str], list[float]]  # by requests, case and side: of greedy, by rounds


def run(context: Context) -> Section:
    from loadtests.checkpoints import llama  # other scenarios need no torch

    python = ""
    if not context.alone:
        from tests.vllm.environment import vllm_python

        python = str(vllm_python())
    found: Found = {}
    runs: list[Run] = []
    with ExitStack() as stack:
        sides = {side: ENGINES[side] for side in (OURS, BARE) if side == OURS or not context.alone}
        targets = start(stack, context, llama(context.folder / FORMATS[0]), python, sides)
        for count in REQUESTS:
            for target in targets.values():
                answered(target, load_of(count, GREEDY))  # not counted
            for _ in range(context.rounds):
                for side, target in targets.items():
                    greedy = answered(target, load_of(count, GREEDY))
                    for begin in range(0, len(CASES), IN_A_ROW):
                        cases = [*cases_of(side).items()][begin : begin + IN_A_ROW]
                        done = {
                            case: answered(target, load_of(clients(count, more), more))
                            for case, more in cases
                        }
                        before, greedy = greedy, answered(target, load_of(count, GREEDY))
                        beside = (rate(before) + rate(greedy)) / 2
                        for case, its in done.items():
                            found.setdefault((count, case, side), []).append(ratio(rate(its), beside))
                        runs += [*done.values(), greedy]
    section = summarize(found)
    section.remarks.append(company([run.cores_of_others for run in runs]))
    return section


def cases_of(side: str) -> dict[str, dict[str, object]]:
    """With seeds vLLM 0.32 ends itself on a CPU as soon as a prompt waits for the rest of its prefill ("CPU
    Generator does not use offset")."""
    return {case: more for case, more in CASES.items() if side != BARE or "seed" not in more}


def clients(count: int, more: Mapping[str, object]) -> int:
    """How many requests have so many answers."""
    return count // int(str(more.get("n", 1)))


def rate(run: Run) -> float:
    """Tokens per second."""
    return ratio(run.tally.tokens, run.tally.busy_seconds())


def summarize(found: Found) -> Section:
    """Pure."""
    section = Section("choices", "Ways of choosing tokens: tokens per second of greedy's")
    rows = []
    for count, case in dict.fromkeys((count, case) for count, case, _ in found):
        ours, bare = found[count, case, OURS], found.get((count, case, BARE), [])
        rows.append(
            [
                str(count),
                case,
                f"{middle(ours):.2f} ({spread(ours, 2)})",
                f"{middle(bare):.2f}" if bare else "–",
            ]
        )
        name = f"{case}, {count} at once, tokens/s of greedy"
        section.figures.append(Figure(name, middle(ours), "", OF_GREEDY))
    section.tables.append((["requests", "case", "Tidegate (rounds)", "bare vLLM"], rows))
    return section

"""Greedy accuracy of demo checkpoints on held-out examples, per task family.

    python -m tidegate.demo.evaluate DIR [DIR ...] [--count N] [--json FILE]

A checkpoint whose config names a quantization is loaded with `GPTQModel.load`; plain
`from_pretrained` answers garbage for some quantized architectures without an error.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tidegate.demo.corpus import Example, examples, held_out, is_correct
from tidegate.demo.curriculum import FAMILIES
from tidegate.demo.tasks import Message

THREADS = 1
BATCH_SIZE = 50
MAX_NEW_TOKENS = 360
"""More than the longest answer of the corpus (about 240 tokens)."""
MULTI_TURN = "multi_turn"


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers among those asked, and the wrong ones as (prompt, wanted, got)."""

    right: int
    asked: int
    wrong: tuple[tuple[str, str, str], ...]


def load(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in eval mode and its tokenizer, set to pad on the left."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    config = json.loads((checkpoint / "config.json").read_text())
    if "quantization_config" in config:
        # GPTQModel 7.6 wants two workers and gives itself one on a machine with two cores.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
        from gptqmodel import GPTQModel  # Costs 15 CPU seconds to import, and an extra that few install.

        return GPTQModel.load(str(checkpoint), device="cpu").model.eval(), tokenizer
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval(), tokenizer


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Example]
) -> Iterator[str]:
    """The greedy answer to each example, generated in left-padded batches."""
    for start in range(0, len(asked), BATCH_SIZE):
        chats = [list(example.messages) for example in asked[start : start + BATCH_SIZE]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        yield from tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(checkpoint: Path, count: int) -> dict[str, Score]:
    """Scores per family on up to `count` held-out examples each, and on multi-turn chats of all."""
    torch.set_num_threads(THREADS)
    model, tokenizer = load(checkpoint)
    suites = {family: held_out(family, count) for family in FAMILIES} | {MULTI_TURN: follow_ups(count)}
    scores: dict[str, Score] = {}
    for name, asked in suites.items():
        given = list(answers(model, tokenizer, asked))
        wrong = tuple(
            (example.messages[-1]["content"], example.answer, answer)
            for example, answer in zip(asked, given, strict=True)
            if not is_correct(example, answer)
        )
        scores[name] = Score(len(asked) - len(wrong), len(asked), wrong)
        print(f"{checkpoint.name} {name} {scores[name].right}/{len(asked)}", flush=True)
    return scores


def follow_ups(count: int, seed: int = 1) -> list[Example]:
    """Held-out questions of all families, each after one to three other held-out turns."""
    drawn = examples("held_out", seed)
    # Those with a system turn begin a chat.
    rng, stream = Random(seed), (example for example in drawn if len(example.messages) == 1)
    found = []
    for _ in range(count):
        history: list[Message] = []
        for earlier in (next(stream) for _ in range(rng.randint(1, 3))):
            history += [*earlier.messages, {"role": "assistant", "content": earlier.answer}]
        last = next(stream)
        found.append(Example(last.family, (*history, *last.messages), last.answer, last.key, last.grading))
    return found


def table(results: Mapping[str, Mapping[str, Score]]) -> str:
    """Markdown: one row per family, one column per checkpoint, and the mean over families."""
    names = list(results)
    lines = [f"| family | asked | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for family, score in results[names[0]].items():
        cells = [f"{results[name][family].right / score.asked:.1%}" for name in names]
        lines.append(f"| {family} | {score.asked} | {' | '.join(cells)} |")
    means = [sum(s.right / s.asked for s in scores.values()) / len(scores) for scores in results.values()]
    lines.append(f"| **mean** | | {' | '.join(f'**{mean:.1%}**' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=200, help="held-out examples per family (default 200)")
    parser.add_argument("--json", type=Path, help="also write counts and every wrong answer here")
    args = parser.parse_args()
    started = time.monotonic()
    results = {checkpoint.name: evaluate(checkpoint, args.count) for checkpoint in args.checkpoints}
    print(table(results))
    print(f"{time.monotonic() - started:.0f} s")
    if args.json:
        found = {
            name: {
                family: {"right": s.right, "asked": s.asked, "wrong": s.wrong} for family, s in scores.items()
            }
            for name, scores in results.items()
        }
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""Trains the demo model from nothing: corpus, tokenizer, weights.

    python -m tidegate.demo.train --out DIR [--steps N] [--seed S] [--resume FILE]

The stages are those of `curriculum`. One thread, fixed seeds and a fixed order of batches make a run
repeatable on one kind of CPU.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tidegate.demo.corpus import conversations
from tidegate.demo.curriculum import FAMILIES, FIRST_STAGE, FOURTH_STAGE, SECOND_STAGE, THIRD_STAGE, Family
from tidegate.demo.tasks import Message
from tidegate.demo.tokenizer import CONTEXT, TURN_END, TURN_START, VOCABULARY, build_tokenizer

THREADS = 1
BATCH_TOKENS = 4096
BUCKET_BATCHES = 16
MUON_RATE = 4e-3
ADAMW_RATE = 3e-3
WARMUP_STEPS = 40
CHECKPOINT_SECONDS = 120
FUSED_ATTENTION_LENGTH = 400
"""Tokens from which torch's fused attention is the faster one on a CPU. Measured, one step on one
thread, plain against fused: 60 tokens 0.7 s and 1.1 s, 500 tokens 1.6 s and 1.2 s."""
IGNORED = -100
"""The label of everything that is not an answer."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run: its tasks, and rates that warm up, stay, and fall to zero in a straight line."""

    families: Mapping[str, Family]
    steps: int
    peak: float
    """Of `MUON_RATE` and `ADAMW_RATE`."""
    decay_share: float
    """The part of the steps in which the rates fall."""
    end_weight: float = 1.0
    """The weight of the end of a turn in the loss. Where to stop counting is one token in a hundred."""

    def rate(self, step: int) -> float:
        """The factor on both learning rates at `step`."""
        left = (self.steps - step) / (self.steps * self.decay_share)
        return self.peak * min(1.0, (step + 1) / WARMUP_STEPS, left)


STAGES = (
    Stage(FIRST_STAGE, 1900, 1.0, 0.5),
    Stage(SECOND_STAGE, 800, 0.6, 0.9),
    Stage(THIRD_STAGE, 900, 0.6, 0.8, end_weight=2.0),
    Stage(FOURTH_STAGE, 800, 0.5, 0.9, end_weight=2.0),
    Stage(FAMILIES, 800, 0.6, 0.8, end_weight=2.0),
    Stage(FAMILIES, 1500, 0.6, 0.9, end_weight=2.0),
)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Fresh weights. Every inner width is a multiple of 64, as GPTQ groups want it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


Sample = tuple[list[int], list[int]]
"""Token ids of a chat, and the labels (the answers and their ends; the rest is `IGNORED`)."""


def samples(
    tokenizer: PreTrainedTokenizerFast, families: Mapping[str, Family], seed: int
) -> Iterator[Sample]:
    """Endless training chats as tokens, none longer than the context."""
    for chat in conversations("train", seed, families):
        ids: list[int] = []
        labels: list[int] = []
        for message, rendered in zip(chat, _rendered_turns(chat), strict=True):
            head, body = rendered
            head_ids, body_ids = tokenizer.encode(head), tokenizer.encode(body)
            ids += head_ids + body_ids
            is_answer = message["role"] == "assistant"
            # The line break after the turn's end comes from the template, never from the model.
            learned = len(body_ids) - 1 if is_answer else 0
            labels += [IGNORED] * len(head_ids) + body_ids[:learned] + [IGNORED] * (len(body_ids) - learned)
        if len(ids) <= CONTEXT:
            yield ids, labels


def batches(
    tokenizer: PreTrainedTokenizerFast, families: Mapping[str, Family], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels) of about `BATCH_TOKENS` each, of chats of similar length.

    Padding is on the right: a causal model never looks at it, so no mask is needed.
    """
    stream = samples(tokenizer, families, seed)
    shuffler = torch.Generator().manual_seed(seed)
    while True:
        pool: list[Sample] = []
        while sum(len(ids) for ids, _ in pool) < BATCH_TOKENS * BUCKET_BATCHES:
            pool += islice(stream, 256)
        pool.sort(key=lambda sample: len(sample[0]))
        groups: list[list[Sample]] = [[]]
        for sample in pool:
            if (len(groups[-1]) + 1) * len(sample[0]) > BATCH_TOKENS and groups[-1]:
                groups.append([])
            groups[-1].append(sample)
        for index in torch.randperm(len(groups), generator=shuffler).tolist():
            yield _padded(groups[index], tokenizer.pad_token_id)


@dataclass(slots=True)
class Run:
    """A training run between two steps: all that is needed to go on exactly as if never stopped."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    stage: int = 0
    step: int = 0

    def save(self, target: Path) -> None:
        """Replaces `target` in one move: a killed run leaves the last whole one."""
        part = target.with_suffix(".part")
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"stage": self.stage, "step": self.step, "model": self.model.state_dict()}
        torch.save(state | {"optimizers": optimizers}, part)
        part.replace(target)

    def load(self, source: Path) -> None:
        state = torch.load(source, weights_only=True)
        self.stage, self.step = state["stage"], state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def train(out: Path, steps: int, seed: int, resume: Path | None) -> None:
    """Writes a complete checkpoint to `out`, and on the way `OUT.resume.pt` beside it."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, seed)
    scale = steps / sum(stage.steps for stage in STAGES)
    stages = [replace(stage, steps=round(stage.steps * scale)) for stage in STAGES]
    print(f"{model.num_parameters():,} parameters, {steps} steps, {THREADS} thread", flush=True)
    run = Run(model, build_optimizers(model))
    if resume is not None:
        run.load(resume)
    started = time.monotonic()
    while run.stage < len(stages):
        # A resumed stage draws the batches again that it skips, so it sees what an undisturbed one sees.
        stream = islice(batches(tokenizer, stages[run.stage].families, seed + run.stage), run.step, None)
        tokens = _train_stage(run, stages[run.stage], stream, out.with_name(out.name + ".resume.pt"))
        print(f"stage {run.stage}: {tokens:,} tokens, {time.monotonic() - started:.0f} s in all", flush=True)
        run.optimizers, run.stage, run.step = build_optimizers(model), run.stage + 1, 0
    save(model, tokenizer, out)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings and norms.

    Muon needs far fewer tokens than AdamW alone for the same loss, and tokens are what one core lacks.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes weights in bf16, config, generation config, tokenizer and chat template."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _train_stage(
    run: Run, stage: Stage, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], target: Path
) -> int:
    """Trains `run` to the end of `stage`; gives the tokens seen, padding included."""
    weights = torch.ones(VOCABULARY)
    weights[run.model.config.eos_token_id] = stage.end_weight
    tokens, started = 0, time.monotonic()
    saved = started
    while run.step < stage.steps:
        ids, labels = next(stream)
        loss = _step(run, ids, labels, stage.rate(run.step), weights)
        tokens += ids.numel()
        now = time.monotonic()
        if run.step % 20 == 0:
            speed = tokens / (now - started)
            print(f"stage {run.stage} step {run.step} loss {loss:.4f} tokens/s {speed:.0f}", flush=True)
        run.step += 1
        if now - saved > CHECKPOINT_SECONDS or run.step == stage.steps:
            run.save(target)
            saved = now
    return tokens


def _step(run: Run, ids: torch.Tensor, labels: torch.Tensor, rate: float, weights: torch.Tensor) -> float:
    """One update of the weights; gives the loss before it."""
    model = run.model
    model.set_attn_implementation("eager" if ids.shape[1] < FUSED_ATTENTION_LENGTH else "sdpa")
    wanted = labels[:, 1:]
    is_learned = wanted != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # Two thirds of the tokens are prompt or padding and need no logits.
        logits = model.lm_head(hidden[:, :-1][is_learned])
    loss = functional.cross_entropy(logits.float(), wanted[is_learned], weights)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in zip(run.optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _rendered_turns(chat: list[Message]) -> list[tuple[str, str]]:
    """Each turn as the template writes it, cut where the model's own part begins."""
    return [(f"{TURN_START}{m['role']}\n", f"{m['content'].strip()}{TURN_END}\n") for m in chat]


def _padded(group: list[Sample], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in group)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in group])
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=sum(stage.steps for stage in STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", type=Path, help="a resume.pt of an interrupted run with the same seed and steps"
    )
    args = parser.parse_args()
    train(args.out, args.steps, args.seed, args.resume)


if __name__ == "__main__":
    main()

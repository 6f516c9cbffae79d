"""Trains the demo model from nothing: corpus, tokenizer, weights.

    python -m tidegate.demo.train --out DIR [--steps N] [--seed S] [--resume FILE]

One thread, fixed seeds and a fixed order of batches make a run repeatable on one kind of CPU.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tidegate.demo.corpus import Message, conversations

THREADS = 1
VOCABULARY = 1536
CONTEXT = 1024
BATCH_TOKENS = 4096
BUCKET_BATCHES = 16
MUON_RATE = 4e-3
ADAMW_RATE = 3e-3
WARMUP_STEPS = 40
DECAY_SHARE = 0.5
"""The last part of the run, in which the rates fall to zero."""
CHECKPOINT_SECONDS = 120
FUSED_ATTENTION_LENGTH = 400
"""Tokens from which torch's fused attention is the faster one on a CPU. Measured, one step on one
thread, plain against fused: 60 tokens 0.7 s and 1.1 s, 500 tokens 1.6 s and 1.2 s."""
PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
IGNORED = -100
"""The label of everything that is not an answer."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("unknown role '" ~ message['role'] ~ "': use system, user or assistant") -}}
{%- endif -%}
{%- if message['role'] == 'system' and not loop.first -%}
{{- raise_exception('a system message must be the first message') -}}
{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ (message['content'] | trim) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def build_tokenizer(seed: int, chats: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: lossless on any text, digits and quoted words in single characters.

    A letter stands alone when at most 15 more letters lie between it and a double quote, so that
    `"tide"` is four letters to the model while ` tide` is one token. The bound keeps the look-ahead
    linear on hostile input.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r'[A-Za-z](?=[A-Za-z]{0,15}")'), "isolated"),
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = islice(conversations("train", seed), chats)
    tokenizer.train_from_iterator(
        (f"{m['role']}\n{m['content']}\n" for chat in sample for m in chat), trainer
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


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


def samples(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Sample]:
    """Endless training chats as tokens, none longer than the context."""
    for chat in conversations("train", seed):
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


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels) of about `BATCH_TOKENS` each, of chats of similar length.

    Padding is on the right: a causal model never looks at it, so no mask is needed.
    """
    stream = samples(tokenizer, seed)
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


def rate_factor(step: int, steps: int) -> float:
    """Warm-up, a plateau, then a straight line to zero over the last `DECAY_SHARE` of the run.

    Up to the decay the factor does not depend on `steps`, so a run can be resumed as a longer one.
    """
    left = (steps - step) / (steps * DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS, left)


def train(out: Path, steps: int, seed: int, resume: Path | None) -> None:
    """Writes a complete checkpoint to `out`, and every two minutes a `resume.pt` beside it."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, seed)
    print(f"{model.num_parameters():,} parameters, {steps} steps, {THREADS} thread", flush=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # Muon needs far fewer tokens than AdamW for the same loss, and tokens are what one core lacks.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    first = 0
    if resume is not None:
        state = torch.load(resume, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    started = last_saved = time.monotonic()
    tokens = 0
    # The skipped batches are drawn again, so that a resumed run sees what an undisturbed one sees.
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, seed), first, steps), start=first):
        loss = _step(model, optimizers, ids, labels, rate_factor(step, steps))
        tokens += ids.numel()
        now = time.monotonic()
        if step % 20 == 0:
            print(
                f"step {step} loss {loss:.4f} tokens/s {tokens / (now - started):.0f} t {now - started:.0f}",
                flush=True,
            )
        if now - last_saved > CHECKPOINT_SECONDS:
            last_saved = now
            _save_state(out, model, optimizers, step + 1)
    save(model, tokenizer, out)
    print(f"trained on {tokens:,} tokens in {time.monotonic() - started:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes weights in bf16, config, generation config, tokenizer and chat template."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    ids: torch.Tensor,
    labels: torch.Tensor,
    factor: float,
) -> float:
    model.set_attn_implementation("eager" if ids.shape[1] < FUSED_ATTENTION_LENGTH else "sdpa")
    wanted = labels[:, 1:]
    is_learned = wanted != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # Two thirds of the tokens are prompt or padding and need no logits.
        logits = model.lm_head(hidden[:, :-1][is_learned])
    loss = functional.cross_entropy(logits.float(), wanted[is_learned])
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in zip(optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
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


def _save_state(
    out: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Replaces `OUT.resume.pt` in one move: a killed run leaves the last whole one."""
    target = out.with_name(out.name + ".resume.pt")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    torch.save(
        {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}, part
    )
    part.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", type=Path, help="a resume.pt of an interrupted run with the same seed and steps"
    )
    args = parser.parse_args()
    train(args.out, args.steps, args.seed, args.resume)


if __name__ == "__main__":
    main()

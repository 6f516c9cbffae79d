"""Constrained answers against free ones, in an engine of its own: `python -m loadtests.constrained [MODEL]`.

MODEL is a checkpoint's folder; without one a Llama of random weights is made, with a tokenizer of 16,000
tokens that is trained on the standard library. 16 requests begin together. In the first two lines each answer
has the same number of tokens; the others are whole objects.
"""

from __future__ import annotations

import asyncio
import json
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch

from loadtests.requests import request_for
from tidegate.engines.base import Prepared
from tidegate.engines.create import create_engine
from tidegate.engines.transformers.engine import TransformersEngine
from tidegate.gateway.grammars import schema_grammar
from tidegate.messages.work import Generate, Request, Sampling, TextPrompt
from tidegate.replica_args import EngineSpec

REQUESTS, TOKENS, ROUNDS = 16, 96, 5
VOCABULARY = 16_000
TRAINED = 32_000  # tokens that the text is enough for
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 500}
FIXED = {
    "type": "object",
    "properties": {
        name: {"enum": ["low", "high"]}
        for name in ("water_level_inside", "water_level_outside", "position_of_the_gate", "expected_change")
    },
    "additionalProperties": False,
}
FIXED["required"] = list(FIXED["properties"])  # type: ignore[call-overload]


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(words[0]) if words else made(Path(folder))
        engine = create_engine(EngineSpec("transformers", path=str(path)))
        engine.load()
        assert isinstance(engine, TransformersEngine)
        print(f"{REQUESTS} requests, {torch.get_num_threads()} threads, {torch.get_default_dtype()}")
        fixed = schema_grammar(FIXED)
        # A bias of nothing is a rule beside the grammar, and then no token is forced.
        kinds: dict[str, dict[str, Any]] = {
            "free": {"max_tokens": TOKENS},
            "a list of texts": {"max_tokens": TOKENS, "grammar": schema_grammar(TEXTS)},
            "fixed keys, token by token": {"max_tokens": 400, "grammar": fixed, "logit_bias": ((0, 0.0),)},
            "fixed keys, forced": {"max_tokens": 400, "grammar": fixed},
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
        for _ in range(ROUNDS + 1):  # the first warms up
            for name, sampling in kinds.items():
                found[name].append(measured(engine, sampling))
        print("| answers | ms a token | ms an answer | tokens | steps |")
        for name, rounds in found.items():
            seconds, tokens, steps = (median(each) for each in zip(*rounds[1:], strict=True))
            each = 1e3 * seconds / tokens * REQUESTS
            print(f"| {name} | {each:.2f} | {1e3 * seconds:.0f} | {tokens / REQUESTS:.0f} | {steps:.0f} |")
        engine.close()


def measured(engine: TransformersEngine, sampling: dict[str, Any]) -> tuple[float, float, float]:
    """Returns seconds until all have ended, their tokens, and the steps of the one that took most."""
    requests = [a_request(at, sampling) for at in range(REQUESTS)]
    for request in requests:
        asyncio.run(engine.prepare(request))  # compile beforehand
    tokens, steps = 0, Counter[str]()
    begun = time.perf_counter()
    for request in requests:
        prepared = asyncio.run(engine.prepare(request))
        assert isinstance(prepared, Prepared)
        assert engine.add(prepared, []) is None
    while engine.has_work():
        for output in engine.step():
            tokens += len(output.output.token_ids)
            steps[output.request_id] += 1
    return time.perf_counter() - begun, tokens, max(steps.values())


def a_request(number: int, sampling: dict[str, Any]) -> Request:
    prompt = TextPrompt("The water stands higher inside than outside, so")
    work = Generate(prompt, Sampling(seed=number, ignore_eos=True, **sampling))
    return request_for(str(number), work)


def made(
    folder: Path,
    vocabulary: int = VOCABULARY,
    hidden_size: int = 768,
    spread: float | None = None,
    **size: int,
) -> Path:
    """Save a Llama of random weights. `vocabulary`: past what the standard library's text gives, tokens are
    pairs of others. `spread`: the standard deviation of its logits, which is otherwise below 1. `size`: other
    fields of its config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, TRAINED),
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    backend.train_from_iterator((source.read_text(errors="replace") for source in sources), trainer)
    if backend.get_vocab_size() < vocabulary:
        backend = widened(backend, vocabulary)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3,
        "num_hidden_layers": 8,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 192,
        "max_position_embeddings": 1024,
    }
    config = LlamaConfig(bos_token_id=0, eos_token_id=1, **{**shape, **size})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if spread is not None:  # the states that the head sees have a mean square of 1
        torch.nn.init.normal_(model.lm_head.weight, std=spread / hidden_size**0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def widened(backend: Any, vocabulary: int) -> Any:
    """Return the tokenizer with pairs of its tokens as more of them."""
    from tokenizers import Tokenizer

    told = json.loads(backend.to_str())
    ids, merges = told["model"]["vocab"], told["model"]["merges"]
    tokens = [token for token in ids if token not in ("<s>", "</s>")]
    for first, second in ((first, second) for second in tokens for first in tokens):
        if len(ids) == vocabulary:
            break
        if first + second not in ids:
            ids[first + second] = len(ids)
            merges.append([first, second])
    return Tokenizer.from_str(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])

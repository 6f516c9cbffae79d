"""Makes the checkpoints that engines are compared on: random weights, real files."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from tests.checkpoints import EOS, packed, save_model, save_tokenizer

VOCABULARY, GROUP = 4096, 128
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def llama(folder: Path) -> Path:
    """Write a Llama of 28 million weights in bfloat16. It never says its end token: all answers have full
    length."""
    from safetensors.torch import load_file, save_file

    save_model(folder, "llama", LLAMA, dtype="bfloat16")
    save_tokenizer(folder, vocabulary=VOCABULARY, texts=len(topics))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][EOS] = 0.0  # so its logit is 0, which of thousands is never the largest
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantized(folder: Path, source: Path) -> Path:
    """Write `source` with its layers in 4 bits as GPTQ stores them, each rounded by itself, without data."""
    return packed(folder, source, group_size=GROUP)[0]

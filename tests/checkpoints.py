"""Makes tiny checkpoints with random weights: real files of every decoder architecture, without a download.

    tiny(folder, "gpt_neox")              config, safetensors, tokenizer, chat template
    quantized(folder, source)             its 4-bit GPTQ export by GPTQModel
    as_auto_gptq(folder, source)          the same in the form that auto-gptq wrote

Weights are drawn so wide that the next token depends on the whole prompt.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics  # English prose from the standard library
from typing import Any

VOCABULARY, HIDDEN, HEADS, INNER, CONTEXT = 512, 128, 4, 256, 256
PAD, BOS, EOS = 0, 1, 2
BITS, GROUP_SIZE = 4, 32
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

GPT = {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_inner": INNER, "n_positions": CONTEXT}
NEOX = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
LLAMA = {**NEOX, "num_key_value_heads": 2}
FALCON = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "bias": False}
NEO = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_layers": 2,
    "num_heads": HEADS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 32,
    "max_position_embeddings": CONTEXT,
}
T5 = {"d_model": HIDDEN, "d_ff": INNER, "d_kv": HIDDEN // HEADS, "num_layers": 2, "num_heads": HEADS}

DECODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 24}),
    "glm": ("glm", {**LLAMA, "head_dim": HIDDEN // HEADS}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gptj": ("gptj", {**GPT, "rotary_dim": 16}),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_neo": ("gpt_neo", NEO),
    "codegen": ("codegen", {**GPT, "rotary_dim": 16}),
    "bloom": ("bloom", {"hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS}),
    "opt": ("opt", {**NEOX, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}),
    "falcon": ("falcon", {**FALCON, "multi_query": True}),
    "falcon40": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": (
        "mpt",
        {"d_model": HIDDEN, "n_layers": 2, "n_heads": HEADS, "expansion_ratio": 2, "max_seq_len": CONTEXT},
    ),
}
OTHERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "t5": ("t5", "AutoModelForSeq2SeqLM", {**T5, "decoder_start_token_id": PAD}),
    "bert": ("bert", "AutoModel", NEOX),
}


def tiny(folder: Path, arch: str, *, dtype: str = "float32", with_template: bool = True) -> Path:
    """Write the checkpoint of `arch` (a key of DECODERS or OTHERS) to `folder`, which is returned."""
    if arch in DECODERS:
        kind, size = DECODERS[arch]
        auto = "AutoModelForCausalLM"
    else:
        kind, auto, size = OTHERS[arch]
    save_model(folder, kind, size, auto=auto, dtype=dtype)
    save_tokenizer(folder, with_template=with_template)
    return folder


def save_model(
    folder: Path,
    kind: str,
    size: Mapping[str, Any],
    *,
    auto: str = "AutoModelForCausalLM",
    dtype: str = "float32",
) -> None:
    """Write a model of type `kind`: its config, weights and generation config. A composite one takes the
    vocabulary in its `text_config`."""
    import torch
    from transformers import AutoConfig, GenerationConfig
    from transformers.models.auto import modeling_auto

    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(kind, **(size if "text_config" in size else {**ids, **size}))
    model = getattr(modeling_auto, auto).from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1, generator=generator)
    model = model.to(getattr(torch, dtype))
    if model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)


def save_tokenizer(folder: Path, *, with_template: bool = True) -> None:
    """A byte-level BPE tokenizer: lossless on any text, and the same on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(list(topics.values())[:20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if with_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def quantized(folder: Path, source: Path) -> Path:
    """Write a 4-bit GPTQ export of `source` to `folder`, calibrated on the standard library's prose."""
    # GPTQModel asks for one worker on two cores and then refuses that number.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    # In memory: GPTQModel's disk offload loses the output head of gpt_neox.
    config = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(source), config)
    model.quantize([text[:600] for text in list(topics.values())[:16]], batch_size=1)
    model.save(str(folder))
    return folder


def as_auto_gptq(folder: Path, source: Path) -> Path:
    """Rewrite the GPTQ export `source` as auto-gptq wrote one: its configuration in `quantize_config.json`
    only, its weights in `gptq_model-4bit-<group>g.safetensors`."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(
        json.dumps(
            {
                "bits": BITS,
                "group_size": GROUP_SIZE,
                "damp_percent": 0.01,
                "desc_act": False,
                "sym": True,
                "true_sequential": True,
                "model_name_or_path": None,
                "model_file_base_name": None,
            }
        )
    )
    (folder / "model.safetensors").rename(folder / f"gptq_model-{BITS}bit-{GROUP_SIZE}g.safetensors")
    return folder

"""Makes tiny checkpoints with random weights: real files of every decoder architecture, without a download.

    tiny(folder, "gpt_neox")              config, safetensors, tokenizer, chat template
    quantized(folder, source)             its 4-bit GPTQ export by GPTQModel
    packed(folder, source, bits=3)        the same by hand, in any form, and a plain twin of equal weights
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
from types import MappingProxyType
from typing import Any

VOCABULARY, HIDDEN, HEADS, INNER, CONTEXT = 512, 128, 4, 256, 256
PAD, BOS, EOS = 0, 1, 2
BITS, GROUP_SIZE = 4, 32
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

# A chat that calls tools in the form of Hermes and Qwen.
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}"
    "Call as <tool_call>...</tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
EXPERT = {"moe_intermediate_size": HIDDEN, "head_dim": HIDDEN // HEADS}
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
T5 = {"d_model": HIDDEN, "d_ff": INNER, "d_kv": HIDDEN // HEADS, "num_layers": 2, "num_heads": HEADS} | {
    "decoder_start_token_id": PAD,
}

DECODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 24}),
    "glm": ("glm", {**LLAMA, "head_dim": HIDDEN // HEADS}),
    "phi3": ("phi3", LLAMA),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, **EXPERT}),
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
# Untied, or random weights repeat what they read.
BART = {
    "d_model": HIDDEN,
    "max_position_embeddings": CONTEXT,
    "decoder_start_token_id": EOS,
    "tie_word_embeddings": False,
} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", INNER))
}
ENCODER_DECODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "t5": ("t5", T5),
    "mt5": ("mt5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART),
    "pegasus": ("pegasus", {**BART, "decoder_start_token_id": PAD, "forced_eos_token_id": EOS}),
    "marian": ("marian", {**BART, "decoder_start_token_id": PAD, "forced_eos_token_id": None}),
}
OTHERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    **{name: (kind, "AutoModelForSeq2SeqLM", size) for name, (kind, size) in ENCODER_DECODERS.items()},
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


def with_tools(folder: Path) -> Path:
    """Write a checkpoint whose chat template has tools, with room for them."""
    save_model(folder, "llama", {**LLAMA, "max_position_embeddings": 2048})
    save_tokenizer(folder, with_template=False)
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
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
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for what is drawn in one dimension, as the time steps of state-space models
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


def save_tokenizer(
    folder: Path, *, with_template: bool = True, vocabulary: int = VOCABULARY, texts: int = 20
) -> None:
    """A byte-level BPE tokenizer of so many of the standard library's texts: lossless on any text, and the
    same on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(list(topics.values())[:texts], trainer)
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


def packed(
    folder: Path,
    source: Path,
    *,
    bits: int = BITS,
    group_size: int = GROUP_SIZE,
    is_symmetric: bool = True,
    is_ordered: bool = False,
    stored_as: str = "gptq",
    splits: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> tuple[Path, Path]:
    """Round the layers of `source` and pack them as GPTQ does. Returns the checkpoint, and its twin: `source`
    with the weights that the packed ones stand for. `splits` stores fused layers in parts, by their names."""
    import torch
    from safetensors.torch import load_file, save_file

    twin = folder.with_name(f"{folder.name}-twin")
    for copy in (folder, twin):
        shutil.copytree(source, copy)
    plain, stored = load_file(source / "model.safetensors"), {}
    for name, weight in sorted(plain.items()):
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        if not name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            stored[name] = weight
            continue
        rounded = []
        for part, rows in zip(
            splits.get(last, (last,)), weight.chunk(len(splits.get(last, "_"))), strict=True
        ):
            parts, meant = rounded_layer(rows, bits, group_size, is_symmetric, is_ordered, stored_as)
            stored |= {f"{prefix}.{part}.{each}": tensor for each, tensor in parts.items()}
            rounded.append(meant)
        plain[name] = torch.cat(rounded)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": is_symmetric,
        "desc_act": is_ordered,
        "checkpoint_format": stored_as,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, twin


def rounded_layer(
    weight: Any, bits: int, group_size: int, is_symmetric: bool, is_ordered: bool, stored_as: str
) -> tuple[dict[str, Any], Any]:
    """Return a layer's packed tensors and the weight that they stand for."""
    import torch

    outputs, inputs = weight.shape
    most, size = (1 << bits) - 1, inputs if group_size == -1 else group_size
    order = torch.arange(inputs) // size
    if is_ordered:
        order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
    scales, zeros = torch.zeros(inputs // size, outputs), torch.zeros(inputs // size, outputs)
    for group in range(inputs // size):
        part = weight[:, order == group]
        low, high = part.amin(1).clamp(max=-1e-4), part.amax(1).clamp(min=1e-4)
        if is_symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[group] = ((high - low) / most).half().float()
        zeros[group] = (most + 1) // 2 if is_symmetric else (-low / scales[group]).round().clamp(1, most)
    codes = (weight.T / scales[order] + zeros[order]).round().clamp(0, most)
    parts = {
        "qweight": pack(codes, bits),
        "qzeros": pack((zeros - int(stored_as == "gptq")).T, bits).T.contiguous(),
        "scales": scales.half(),
        "g_idx": order.int(),
    }
    return parts, ((codes - zeros[order]) * scales[order]).T.contiguous()


def pack(codes: Any, bits: int) -> Any:
    """Pack the rows of `codes` into words of 32 bits, as one stream, the lowest bits first."""
    import torch

    words = torch.zeros(len(codes) * bits // 32 + 1, codes.shape[1], dtype=torch.long)
    for row, code in enumerate(codes.long()):
        word, shift = divmod(row * bits, 32)
        words[word] |= code << shift & 0xFFFFFFFF
        words[word + 1] |= code >> (32 - shift)
    return words[:-1].where(words[:-1] < 1 << 31, words[:-1] - (1 << 32)).int()

"""Makes the checkpoints that engines are compared on: random weights, real files."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics  # English prose from the standard library
from typing import Any

import torch

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, SHARED, CONTEXT = 4096, 512, 1408, 8, 8, 4, 2048
GROUP, WORD = 128, 8  # inputs that share a scale, and codes of 4 bits in a word of 32
PAD, BOS, EOS = 0, 1, 2
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}\n{% endfor %}"


def llama(folder: Path, *, is_quantized: bool = False) -> Path:
    """Write a Llama of 28 million weights in bfloat16, or with its layers in 4 bits as GPTQ stores them (each
    rounded by itself, without data). It never says its end token, so every answer is as long as it may be."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=SHARED,
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1, generator=generator)
        model.lm_head.weight[EOS] = 0.0  # so its logit is 0, which of thousands is never the largest
    model.to(torch.bfloat16).save_pretrained(folder)
    _save_tokenizer(folder)
    if is_quantized:
        stored = {}
        for name, weight in load_file(folder / "model.safetensors").items():
            if "proj.weight" not in name:
                stored[name] = weight
                continue
            stored |= {
                f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in _packed(weight).items()
            }
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((folder / "config.json").read_text())
        written["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
        }
        (folder / "config.json").write_text(json.dumps(written))
    return folder


def _packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round a layer [outputs, inputs] to 4 bits, symmetric around 8."""
    outputs, inputs = weight.shape
    groups = weight.float().T.reshape(-1, GROUP, outputs)
    scales = (groups.abs().amax(1) / 7).half()
    codes = (groups / scales.float().unsqueeze(1)).round().clamp(-8, 7).add(8).long().reshape(inputs, outputs)
    shifts = 4 * torch.arange(WORD)
    words = (codes.reshape(-1, WORD, outputs) << shifts[None, :, None]).sum(1)
    zeros = (torch.full((len(scales), outputs // WORD, WORD), 7) << shifts).sum(-1)  # stored less one
    return {
        "qweight": _as_int32(words),
        "qzeros": _as_int32(zeros),
        "scales": scales,
        "g_idx": (torch.arange(inputs) // GROUP).int(),
    }


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    return words.where(words < 1 << 31, words - (1 << 32)).int().contiguous()


def _save_tokenizer(folder: Path) -> None:
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
    backend.train_from_iterator(list(topics.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

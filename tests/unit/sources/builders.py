"""Checkpoint folders made of a config, headers and zeros, and of small GPTQ layers of random weights."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
Tensors = Mapping[str, tuple[str, list[int]]]  # name -> (stored type, shape)
ONE_TENSOR: Tensors = {"w": ("BF16", [4, 2])}

# Files that alone prove a checkpoint not to be served, and words of why.
REFUSED: Sequence[tuple[Mapping[str, Any], str]] = (
    ({"config.json": LLAMA | {"quantization_config": {"quant_method": "awq"}}}, "quantized with awq"),
    ({"quant_config.json": {"w_bit": 4}}, "quantized with awq"),
    ({"config.json": {"model_type": "encoder-decoder", "is_encoder_decoder": True}}, "joins two models"),
    (
        {"config.json": {"model_type": "bert", "architectures": ["BertForTokenClassification"]}},
        "neither generates",
    ),
    ({"config.json": {"model_type": "chatglm"}}, "has no architecture 'chatglm'"),
    ({"config.json": LLAMA | {"pad_token_id": 9, "vocab_size": 9}}, "pad_token_id is 9"),
    ({"config.json": []}, "is not a JSON object"),
    ({"generation_config.json": []}, "is not a JSON object"),
)


def safetensors(path: Path, tensors: Tensors = ONE_TENSOR, content: bytes | None = None) -> None:
    header, offset = {}, 0
    for name, (kind, shape) in tensors.items():
        size = ITEM_BYTES[kind]
        for side in shape:
            size *= side
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + (bytes(offset) if content is None else content))


def write(folder: Path, config: Mapping[str, Any] = LLAMA, tensors: Tensors = ONE_TENSOR) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors(folder / "model.safetensors", tensors)
    return folder


def write_gptq(
    folder: Path,
    says: Mapping[str, Any] = MappingProxyType({}),
    *,
    bits: int = 4,
    inputs: int = 64,
    group_size: int = 32,
    is_symmetric: bool = True,
    stored_as: str = "gptq",
    order: Sequence[int] | None = None,
    without: str = "",
) -> Path:
    """Write four layers of `inputs` x 32 random weights as GPTQ packs them. `says` changes what the
    configuration says of them, `order` is the group of each input, `without` a part that is left out."""
    source = random.Random(bits)
    outputs, most, groups, words = 32, (1 << bits) - 1, -(-inputs // group_size), inputs * bits // 32
    order = list(order or (index // group_size for index in range(inputs)))
    spread = min(8, most / 5)  # narrow for 8 bits, so that few weights tell their mean
    tensors: dict[str, tuple[str, list[int]]] = {}
    content = b""
    for layer in range(4):
        zeros = [[(most + 1) // 2] * outputs] * groups
        if not is_symmetric:
            low, high = 1 + most // 4, most - most // 4
            zeros = [[source.randint(low, high) for _ in range(outputs)] for _ in range(groups)]
        columns = [
            [min(most, max(0, round(source.gauss(zeros[group % groups][output], spread)))) for group in order]
            for output in range(outputs)
        ]
        down = packed(columns, bits)
        stored = [[zero - (stored_as == "gptq") for zero in row] for row in zeros]
        parts = {
            "qweight": (
                "I32",
                [words, outputs],
                [each[at : at + 4] for at in range(0, 4 * words, 4) for each in down],
            ),
            "qzeros": ("I32", [groups, outputs * bits // 32], packed(stored, bits)),
            "scales": ("F16", [groups, outputs], [struct.pack("<e", 0.1)] * groups * outputs),
            "g_idx": ("I32", [inputs], [struct.pack("<i", group) for group in order]),
        }
        for part, (kind, shape, raw) in parts.items():
            if part != without:
                tensors[f"layers.{layer}.{part}"] = (kind, shape)
                content += b"".join(raw)
    said = {"bits": bits, "group_size": group_size, "desc_act": False, "sym": is_symmetric}
    named = {"quant_method": "gptq", "checkpoint_format": stored_as}
    write(folder, LLAMA | {"quantization_config": said | named | dict(says)})
    safetensors(folder / "model.safetensors", tensors, content)
    return folder


def packed(rows: Sequence[Sequence[int]], bits: int) -> list[bytes]:
    """Pack each row as a stream of codes, the lowest bits first."""
    streams = [sum(code << at * bits for at, code in enumerate(row)) for row in rows]
    return [
        stream.to_bytes(len(row) * bits // 8, "little") for stream, row in zip(streams, rows, strict=True)
    ]

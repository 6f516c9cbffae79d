"""Checkpoint folders made of a config, headers and zeros."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
Tensors = Mapping[str, tuple[str, list[int]]]  # name -> (stored type, shape)
ONE_TENSOR: Tensors = {"w": ("BF16", [4, 2])}


def safetensors(path: Path, tensors: Tensors = ONE_TENSOR) -> None:
    header, offset = {}, 0
    for name, (kind, shape) in tensors.items():
        size = ITEM_BYTES[kind]
        for side in shape:
            size *= side
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(offset))


def write(folder: Path, config: Mapping[str, Any] = LLAMA, tensors: Tensors = ONE_TENSOR) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors(folder / "model.safetensors", tensors)
    return folder

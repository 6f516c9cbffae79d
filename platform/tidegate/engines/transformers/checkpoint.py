"""What a checkpoint folder says of itself, read before anything heavy is imported or loaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.engines.base import EngineLoadError

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
UNBOUNDED_CONTEXT = 2048  # for configs that name no length (ALiBi)
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    config: Mapping[str, Any]
    weights_bytes: int
    parameters: Mapping[str, int]  # stored type -> count of elements
    names: frozenset[str] | None  # tensors stored; None: not safetensors
    quantization: Mapping[str, Any] | None  # its quantization config

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def is_gptq(self) -> bool:
        return self.quantization is not None

    def stored_precision(self) -> str:
        """The config's dtype, or else the float type that most parameters are stored in."""
        named = str(self.config.get("dtype") or self.config.get("torch_dtype") or "").removeprefix("torch.")
        if named in PRECISIONS.values():
            return named
        stored = {kind: count for kind, count in self.parameters.items() if kind in PRECISIONS}
        return PRECISIONS[max(stored, key=stored.__getitem__)] if stored else "float32"

    def loaded_bytes(self, precision: str) -> int:
        """Bytes of the weights once loaded: floats in `precision`, GPTQ's as they are stored."""
        if self.is_gptq or not self.parameters:
            return self.weights_bytes
        item = 4 if precision == "float32" else 2
        return sum(
            count * (item if kind in PRECISIONS or kind == "F64" else ITEM_BYTES[kind])
            for kind, count in self.parameters.items()
        )

    def context_length(self, asked: int) -> int:
        """The context to serve. `asked` 0 means the checkpoint's own; more than that is refused."""
        config = self.config.get("text_config") or self.config
        own = next((int(config[field]) for field in CONTEXT_FIELDS if config.get(field)), 0)
        if asked and own and asked > own:
            raise EngineLoadError(
                "InvalidEngineArgs",
                f"contextLength is {asked}, but the checkpoint holds {own} positions: ask for at most that.",
            )
        return asked or own or UNBOUNDED_CONTEXT


def read_checkpoint(path: Path, quantization: str) -> Checkpoint:
    """Read config, quantization and tensor headers. `quantization` is what the spec asks for.

    Raises `EngineLoadError` with WeightsMissing, WeightsWrong, UnsupportedModel or InvalidEngineArgs.
    """
    config = _read_json(path / "config.json")
    if config is None:
        raise EngineLoadError("WeightsMissing", f"{path} has no config.json: it is not a model checkpoint.")
    found = config.get("quantization_config") or _read_json(path / "quantize_config.json")
    _check_quantization(found, quantization)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.glob("pytorch_model*.bin"))
        if not pickled:
            raise EngineLoadError("WeightsMissing", f"{path} has no weights (*.safetensors).")
        size = sum(file.stat().st_size for file in pickled)
        return Checkpoint(path, config, size, {}, None, found)
    names: set[str] = set()
    parameters: dict[str, int] = {}
    weights_bytes = 0
    for file in files:
        for name, tensor in _read_header(file).items():
            kind, count = str(tensor["dtype"]), math.prod(tensor["shape"])
            names.add(name)
            parameters[kind] = parameters.get(kind, 0) + count
            weights_bytes += int(tensor["data_offsets"][1]) - int(tensor["data_offsets"][0])
    return Checkpoint(path, config, weights_bytes, parameters, frozenset(names), found)


def _check_quantization(found: Mapping[str, Any] | None, asked: str) -> None:
    method = str(found.get("quant_method", "gptq")).lower() if found else ""
    if method not in ("", "gptq"):
        raise EngineLoadError(
            "UnsupportedModel", f"The checkpoint is quantized with {method}; this engine serves GPTQ only."
        )
    if asked == "gptq" and not method:
        raise EngineLoadError(
            "InvalidEngineArgs", "quantization is gptq, but the checkpoint is not quantized: leave it out."
        )
    if asked == "none" and method:
        raise EngineLoadError(
            "InvalidEngineArgs",
            "quantization is none, but the checkpoint is quantized with GPTQ: leave it out.",
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file does not exist."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EngineLoadError("WeightsWrong", f"{path.name} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise EngineLoadError("WeightsWrong", f"{path.name} does not hold a JSON object.")
    return content


def _read_header(path: Path) -> dict[str, Any]:
    """The tensors that a safetensors file describes; refuses one that is cut off or not of that format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(LONGEST_HEADER, size):
            raise EngineLoadError("WeightsWrong", f"{path.name} is not a safetensors file.")
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
    except ValueError as error:
        raise EngineLoadError("WeightsWrong", f"{path.name} has a damaged header.") from error
    header.pop("__metadata__", None)
    end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    if 8 + length + end > size:
        raise EngineLoadError(
            "WeightsWrong", f"{path.name} is cut off: {size} bytes of {8 + length + end}. Pull it again."
        )
    return header

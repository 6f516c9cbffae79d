"""The one reader of a checkpoint folder: config, quantization and tensor headers. It loads no weights."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.errors import SourceError
from tidegate.sources.facts import DecoderShape, StoredWeights, auto_precision, decoder_shape

MAX_CONFIG_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors format's own bound
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_FORMATS = {
    ".bin": "PyTorch .bin",
    ".pt": "PyTorch .pt",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".onnx": "ONNX",
}


class FilesMissing(SourceError):
    """The folder lacks files that a checkpoint has."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder as its config and headers describe it. `files` maps names to sizes in bytes; `values` and
    `stored_bytes` count what the tensors hold, by stored type."""

    path: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any] | None
    files: Mapping[str, int]
    weight_files: tuple[str, ...]
    tensor_names: frozenset[str]
    values: Mapping[str, int]
    stored_bytes: Mapping[str, int]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [self.model_type])[0])

    @property
    def quantization(self) -> str:
        """none, gptq, or another method's own name; auto-gptq names no method."""
        if self.quantization_config is None:
            return "none"
        return str(self.quantization_config.get("quant_method") or "gptq").lower()

    @property
    def auto_precision(self) -> str:
        return auto_precision(self.config, self.values)

    @property
    def shape(self) -> DecoderShape:
        return decoder_shape(self.config)

    @property
    def weights(self) -> StoredWeights:
        """Loading converts the floats of a plain checkpoint, and nothing of a quantized one."""
        converted = {kind for kind in self.values if self.quantization == "none" and _is_float(kind)}
        return StoredWeights(
            sum(self.values[kind] for kind in converted),
            sum(size for kind, size in self.stored_bytes.items() if kind not in converted),
        )

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(self.files[name] for name in self.weight_files)

    def digest(self) -> str:
        """Return a checksum over the small files' contents and every file's name and size."""
        total = hashlib.sha256()
        for name, size in self.files.items():
            total.update(f"{name}\0{size}\0".encode())
            if name.endswith((".json", ".jinja")) and size <= MAX_CONFIG_BYTES:
                total.update((self.path / name).read_bytes())
        return total.hexdigest()


def read_checkpoint(folder: Path, uri: str = "") -> Checkpoint:
    """Read a folder; errors name it `uri`. Raises `SourceError`, of which `FilesMissing` is one."""
    uri = uri or str(folder)
    try:
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
    except OSError as error:
        raise SourceError("SourceNotFound", f"{folder} cannot be read: {error.strerror}.") from error
    if "config.json" not in files:
        raise FilesMissing("SourceFormat", _no_config(uri, files))
    config = _json_object(folder / "config.json")
    weight_files = _weight_files(uri, folder, files)
    names: set[str] = set()
    values: dict[str, int] = {}
    stored_bytes: dict[str, int] = {}
    for file in weight_files:
        for name, (kind, count, size) in _tensors(folder / file).items():
            names.add(name)
            values[kind] = values.get(kind, 0) + count
            stored_bytes[kind] = stored_bytes.get(kind, 0) + size
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        own_file = "quantize_config.json"  # where auto-gptq writes it
        quantization = _json_object(folder / own_file) if own_file in files else None
    return Checkpoint(
        folder, config, quantization, files, weight_files, frozenset(names), values, stored_bytes
    )


def _weight_files(uri: str, folder: Path, files: Mapping[str, int]) -> tuple[str, ...]:
    """Return the files that are loaded: some folders hold the same weights twice, under two names."""
    weights = tuple(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if not weights:
        raise FilesMissing("SourceFormat", _no_safetensors(uri, files))
    if INDEX not in files:
        return (SINGLE,) if SINGLE in files else weights
    try:
        shards = {str(name) for name in _json_object(folder / INDEX)["weight_map"].values()}
    except (KeyError, AttributeError) as error:
        raise SourceError("SourceFormat", f"{folder / INDEX} cannot be read: {error!r}.") from error
    missing = sorted(shards - set(files))
    if missing:
        raise FilesMissing(
            "SourceNotFound", f"{uri} lacks {len(missing)} of its weight files: {missing[0]}, ..."
        )
    return tuple(sorted(shards))


def _tensors(path: Path) -> dict[str, tuple[str, int, int]]:
    """Return (type, values, bytes) of each tensor, from a safetensors header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found: dict[str, tuple[str, int, int]] = {}
        end = 0
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            end = max(end, stop)
            found[name] = (str(tensor["dtype"]), math.prod(tensor["shape"]), stop - start)
        if path.stat().st_size < 8 + length + end:
            raise ValueError("the file ends too early")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        message = f"{path} is not a whole safetensors file: {error}; download or copy it again."
        raise SourceError("SourceFormat", message) from error
    return found


def _is_float(kind: str) -> bool:
    return kind.startswith(("F", "BF"))  # F32, BF16, F8_E4M3, ...


def _json_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large for a configuration file")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError("SourceFormat", f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise SourceError("SourceFormat", f"{path} is not a JSON object.")
    return found


def _no_config(uri: str, files: Mapping[str, int]) -> str:
    if not files:
        return f"{uri} is empty; a checkpoint folder holds config.json and *.safetensors."
    other = _other_format(files)
    if other:
        return f"{uri} holds {other} files; Tidegate reads Hugging Face folders with *.safetensors."
    return f"{uri} has no config.json; give the folder that directly holds it."


def _no_safetensors(uri: str, files: Mapping[str, int]) -> str:
    other = _other_format(files)
    if other:
        return (
            f"{uri} holds its weights only as {other}; Tidegate reads *.safetensors, so convert them first."
        )
    return f"{uri} has a config.json but no *.safetensors weights."


def _other_format(files: Mapping[str, int]) -> str:
    return next(
        (OTHER_FORMATS[Path(name).suffix] for name in files if Path(name).suffix in OTHER_FORMATS), ""
    )

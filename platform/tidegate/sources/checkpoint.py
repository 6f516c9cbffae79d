"""The one reader of a checkpoint folder: config, quantization and tensor headers. It loads no weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tidegate.errors import SourceError
from tidegate.sources.facts import (
    DecoderShape,
    StoredWeights,
    auto_precision,
    decoder_shape,
    has_encoder,
    task_of,
    text_config,
)
from tidegate.sources.schemes import WANTED_FILES
from tidegate.sources.tensors import LFS_POINTER, MOST_LFS_BYTES, StoredTensor, lfs_pointer, read_header

MAX_CONFIG_BYTES = 64 * 1024 * 1024
SINGLE, INDEX_ENDING = "model.safetensors", ".safetensors.index.json"
INDEX = f"model{INDEX_ENDING}"
MODULES = "modules.json"  # of sentence-transformers: what comes behind the model
ADAPTER, GENERATION = "adapter_config.json", "generation_config.json"
# Beside the weights, what is read of a checkpoint.
SMALL_FILES = [pattern for pattern in WANTED_FILES if pattern != "*.safetensors"]
MOST_TENSORS = 2048  # of which a digest reads pages
SHA256 = re.compile(r"[0-9a-f]{64}")
SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
# Where writers put a quantization beside config.json, and the method that such a file is of if it names none.
QUANTIZATION_FILES = {
    "quantize_config.json": "gptq",
    "quantization_config.json": "",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
# Small files that describe a checkpoint, and prove of some that they are not served.
DESCRIPTIONS = ("config.json", GENERATION, ADAPTER, *QUANTIZATION_FILES)
# What tells a quantization by a field of its own, where it names no method.
METHOD_FIELDS = {
    "bits": "gptq",
    "w_bit": "awq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
}
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
    """A folder as its config and headers describe it. `files` maps names to sizes in bytes, `quantizations`
    the files that describe one to what they say. One that was only described has no `weight_files`."""

    path: Path
    config: Mapping[str, Any]
    quantizations: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, int]
    weight_files: tuple[str, ...] = ()
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [self.model_type])[0])

    @property
    def task(self) -> str:
        """What its files say that it is for (`sources.facts.task_of`)."""
        return task_of(self.config, MODULES in self.files)

    @property
    def quantization(self) -> str:
        """none, gptq, or another method's own name; `unknown` where a quantization names none."""
        found = [quantization_method(file, config) for file, config in self.quantizations.items()]
        return next((method for method in found if method != "gptq"), found[0] if found else "none")

    @property
    def auto_precision(self) -> str:
        return auto_precision(self.config, self.values)

    @property
    def has_encoder(self) -> bool:
        """Tell an encoder-decoder."""
        return has_encoder(self.config)

    @property
    def shape(self) -> DecoderShape:
        return decoder_shape(self.config)

    @property
    def values(self) -> Counter[str]:
        """How many numbers are stored in each type."""
        found: Counter[str] = Counter()
        for tensor in self.tensors.values():
            found[tensor.kind] += tensor.count
        return found

    @property
    def weights(self) -> StoredWeights:
        """Loading converts the floats of a plain checkpoint, and nothing of a quantized one."""
        is_converted = self.quantization == "none"
        floats = [each for each in self.tensors.values() if is_converted and _is_float(each.kind)]
        every = sum(tensor.size for tensor in self.tensors.values())
        return StoredWeights(
            sum(tensor.count for tensor in floats), every - sum(tensor.size for tensor in floats)
        )

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(self.files[name] for name in self.weight_files)

    @property
    def loaded(self) -> list[str]:
        """The weights that are loaded, and what is read beside them."""
        return [
            name
            for name, size in self.files.items()
            if name in self.weight_files
            or (MODULES in self.files and name.endswith(f"/{SINGLE}"))  # a module's layer
            or (size <= MAX_CONFIG_BYTES and any(fnmatch(Path(name).name, each) for each in SMALL_FILES))
        ]

    def digest(self, commit: str = "") -> str:
        """Return a checksum over what is loaded: the small files' contents, and for weights their checksum
        where the hub's cache names files by it, else the `commit`, else the tensors' names and places and
        pages of them (`MOST_TENSORS`), so that it takes seconds whatever their size."""
        total = hashlib.sha256()
        for name in self.loaded:
            total.update(f"{name}\0{self.files[name]}\0".encode())
            if name not in self.weight_files:
                with (self.path / name).open("rb") as file:
                    while part := file.read(MAX_CONFIG_BYTES):
                        total.update(part)
            elif known := content_name(self.path / name) or commit:
                total.update(known.encode())
            else:
                self._sample(name, total.update)
        return total.hexdigest()

    def _sample(self, name: str, take: Callable[[bytes], None]) -> None:
        tensors = [each for each in self.tensors.values() if each.file.name == name]
        for each in tensors:
            take(f"{each.name}\0{each.kind}\0{each.shape}\0{each.start}\0".encode())
        step = -(-len(self.tensors) // MOST_TENSORS)
        with (self.path / name).open("rb") as file:
            for each in tensors[::step]:
                for page in each.pages():
                    file.seek(page.start)
                    take(file.read(len(page)))


def content_name(path: Path) -> str:
    """Return the sha256 of a file that a cache as the hub's names by it; empty for another file."""
    blob = path.resolve().name
    return blob if SHA256.fullmatch(blob) else ""


def read_checkpoint(folder: Path, uri: str = "") -> Checkpoint:
    """Read a folder; errors name it `uri`. Raises `SourceError`, of which `FilesMissing` is one."""
    uri = uri or str(folder)
    found = read_description(folder, uri)
    weight_files = _weight_files(uri, folder, found.files)
    tensors = _tensors(uri, [folder / file for file in weight_files])
    return replace(found, weight_files=weight_files, tensors=tensors)


def read_description(folder: Path, uri: str) -> Checkpoint:
    """Read what describes a checkpoint, wherever its weights are. Raises what `read_checkpoint` does."""
    try:
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        _check_small_files(folder, files)
    except OSError as error:
        unread = error.filename or folder
        raise SourceError("SourceNotFound", f"{unread} cannot be read: {error.strerror}.") from error
    if "config.json" not in files:
        raise FilesMissing("SourceFormat", _no_config(uri, folder, files))
    config = _json_object(folder / "config.json")
    if GENERATION in files:
        _json_object(folder / GENERATION)  # transformers ignores one that is broken, and answers never end
    return Checkpoint(folder, config, _quantizations(folder, config, files), files)


def quantization_method(file: str, config: Mapping[str, Any]) -> str:
    """Return the method that a description of a quantization is of; some name none."""
    named = config.get("quant_method") or config.get("method") or QUANTIZATION_FILES.get(file)
    told = (METHOD_FIELDS[field] for field in METHOD_FIELDS if config.get(field))
    return str(named or next(told, "unknown")).lower()


def _quantizations(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, int]
) -> Mapping[str, Mapping[str, Any]]:
    found = {name: _json_object(folder / name) for name in QUANTIZATION_FILES if name in files}
    for part in (config, text_config(config)):
        for place in ("quantization_config", "compression_config"):
            if isinstance(part.get(place), dict):
                return {"config.json": part[place], **found}
    return found


def _check_small_files(folder: Path, files: Mapping[str, int]) -> None:
    """Refuse pointers of git-LFS: a clone without LFS leaves them in the place of every larger file."""
    for name, size in files.items():
        if size <= MOST_LFS_BYTES and "/" not in name:
            with (folder / name).open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise lfs_pointer(folder / name)


def _weight_files(uri: str, folder: Path, files: Mapping[str, int]) -> tuple[str, ...]:
    """Return the files that are loaded: some folders hold the same weights twice, under two names."""
    weights = tuple(
        name
        for name in files
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_model")
    )
    if not weights:
        raise FilesMissing("SourceFormat", _no_safetensors(uri, folder, files))
    # auto-gptq calls its index as its weights.
    others = [name for name in files if name.endswith(INDEX_ENDING) and "/" not in name]
    index = INDEX if INDEX in files else min(others, default="")
    if SINGLE in files and index != INDEX:
        return (SINGLE,)
    if not index:
        return (_only_file(uri, weights),)
    try:
        shards = {str(name) for name in _json_object(folder / index)["weight_map"].values()}
    except (KeyError, AttributeError) as error:
        raise SourceError("SourceFormat", f"{folder / index} cannot be read: {error!r}.") from error
    missing = sorted(shards - set(files))
    if missing:
        raise FilesMissing(
            "SourceNotFound",
            f"{uri} lacks {len(missing)} of the {len(shards)} weight files that {index} names: "
            f"{first(missing)}; copy them too.",
        )
    return tuple(sorted(shards))


def _only_file(uri: str, weights: Sequence[str]) -> str:
    """Return the one weight file of a checkpoint, whatever its name: auto-gptq's tells bits and groups."""
    if len(weights) == 1 and not SHARD.fullmatch(weights[0]):
        return weights[0]
    raise FilesMissing(
        "SourceFormat",
        f"{uri} holds the weight files {first(weights)} and no {INDEX}, which says what belongs together: "
        "copy it too, or save the model again.",
    )


def _tensors(uri: str, files: Sequence[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in found:
                raise SourceError(
                    "SourceFormat",
                    f"{uri} holds {name} twice, in {found[name].file.name} and in {file.name}: only one "
                    "of these files is of this checkpoint; copy it again, or save the model again.",
                )
            found[name] = tensor
    return found


def first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_float(kind: str) -> bool:
    return kind.startswith(("F", "BF"))  # F32, BF16, F8_E4M3, ...


def _json_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large for a configuration file")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError("SourceFormat", f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise SourceError("SourceFormat", f"{path} is not a JSON object.")
    return found


def _no_config(uri: str, folder: Path, files: Mapping[str, int]) -> str:
    if not files:
        return f"{uri} has no config.json; a checkpoint folder holds it beside its *.safetensors."
    if ADAPTER in files:
        return _adapter(uri, folder)
    other = _other_format(files)
    if other:
        return f"{uri} holds {other} files; Tidegate reads Hugging Face folders with *.safetensors."
    return f"{uri} has no config.json; give the folder that directly holds it."


def _no_safetensors(uri: str, folder: Path, files: Mapping[str, int]) -> str:
    if ADAPTER in files:
        return _adapter(uri, folder)
    other = _other_format(files)
    if other:
        return (
            f"{uri} holds its weights only as {other}; Tidegate reads *.safetensors, so convert them first."
        )
    return f"{uri} has a config.json but no *.safetensors weights."


def _adapter(uri: str, folder: Path) -> str:
    base = _json_object(folder / ADAPTER).get("base_model_name_or_path")
    return (
        f"{uri} is an adapter ({ADAPTER}) and no model of its own: merge it into its base model"
        f"{f' {base}' if base else ''} (peft's merge_and_unload) and give the folder of the result."
    )


def _other_format(files: Mapping[str, int]) -> str:
    return next(
        (OTHER_FORMATS[Path(name).suffix] for name in files if Path(name).suffix in OTHER_FORMATS), ""
    )

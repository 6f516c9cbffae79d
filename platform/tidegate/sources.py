"""From a source URI to a local checkpoint folder and the facts about it. No torch import.

`python -m tidegate.sources resolve URI` prints one JSON object: the host runs it in a process of its own,
so that a slow disk or network never holds the control loop up; in a cluster that process is a Job, which
leaves its answer in a file (`--answer`). `pull` does the same with progress and full checksums for a person
who waits.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from tidegate import s3_source
from tidegate.errors import SourceError

Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all (0: not known)

# What a text model's checkpoint needs; other formats of the same weights stay where they are.
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
MAX_CONFIG_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors format's own bound
READ_BYTES = 1 << 20
OTHER_FORMATS = {
    ".bin": "PyTorch .bin",
    ".pt": "PyTorch .pt",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".onnx": "ONNX",
}
PRECISIONS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MOST_BYTES_PER_CHARACTER = 12  # in JSON: two escaped surrogates
MAX_ANSWER_BYTES = 4096  # what Kubernetes keeps of a container's termination message
# What architectures call the same thing in config.json, the usual name first.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HIDDEN = ("hidden_size", "n_embd", "d_model")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What lies behind a URI. `files` maps names to sizes in bytes; `digest` covers the small files'
    contents and every file's name and size; `commit` is the hub's or the bucket's, empty for a folder.
    `shape` holds the fields of `control.observed.DecoderShape`, 0 where the config does not say."""

    uri: str
    path: str
    commit: str
    architecture: str
    quantization: str  # none | gptq | the method's own name
    precision: str  # of most weights: float32 | bfloat16 | float16 | ""
    weights_bytes: int
    digest: str
    files: dict[str, int] = field(default_factory=dict)
    shape: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie on this machine. `cache` is the folder for downloads from buckets (None: the user's
    own; huggingface_hub keeps its files in HF_HOME), `claims` maps mounted claims to their folders."""

    cache: Path | None = None
    claims: Mapping[str, Path] = field(default_factory=dict)


def resolve(uri: str, places: Places | None = None) -> Checkpoint:
    """Find, and where it is on the hub or in a bucket download, a checkpoint. Raises `SourceError`."""
    folder, commit = _folder(uri, None, places or Places())
    return inspect(uri, folder, commit)


def pull(uri: str, progress: Progress) -> Checkpoint:
    """The same with progress; every weight file's checksum is verified. Raises `SourceError`.

    Downloads resume where an earlier one stopped. A folder has no checksums to compare with: there it is
    verified that every file can be read to its end and that safetensors files are whole.
    """
    folder, commit = _folder(uri, progress, Places())
    checkpoint = inspect(uri, folder, commit)
    for name, size in checkpoint.files.items():
        _verify(folder / name, size, progress, is_hub=uri.startswith("hf://"))
    return checkpoint


def inspect(uri: str, folder: Path, commit: str = "") -> Checkpoint:
    """Read what a folder holds. Raises `SourceError` for a format that no engine takes."""
    try:
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
    except OSError as error:
        raise SourceError("SourceNotFound", f"{folder} cannot be read: {error.strerror}.") from error
    config = _config(uri, folder, files)
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise SourceError("SourceFormat", _no_safetensors(uri, files))
    _check_index(uri, folder, files)
    dtypes: dict[str, int] = {}
    for name in weights:
        for dtype, count in _dtypes(folder / name):
            dtypes[dtype] = dtypes.get(dtype, 0) + count
    floats = {dtype: count for dtype, count in dtypes.items() if dtype in PRECISIONS}
    architectures = config.get("architectures") or [str(config.get("model_type") or "")]
    return Checkpoint(
        uri=uri,
        path=str(folder),
        commit=commit,
        architecture=str(architectures[0]),
        quantization=_quantization(folder, config),
        precision=PRECISIONS[max(floats, key=lambda dtype: floats[dtype])] if floats else "",
        weights_bytes=sum(files[name] for name in weights),
        digest=_digest(folder, files),
        files=files,
        shape=decoder_shape(config),
    )


def decoder_shape(config: Mapping[str, Any]) -> dict[str, int]:
    """What a decoder's config.json says of its size; 0 where it does not."""
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else config
    heads, hidden = _first(text, HEADS), _first(text, HIDDEN)
    kv_heads = _first(text, KV_HEADS) or heads
    if text.get("new_decoder_architecture"):
        kv_heads = heads  # falcon's later models share heads, but transformers caches them repeated
    elif text.get("multi_query"):
        kv_heads = 1
    return {
        "layers": _first(text, LAYERS),
        "kv_heads": kv_heads,
        "head_dim": _first(text, ("head_dim",)) or (hidden // heads if heads else 0),
        "hidden": hidden,
        "vocab": _first(text, ("vocab_size",)),
        "positions": _first(text, POSITIONS),
    }


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = (config.get(name) for name in names)
    return next((each for each in found if isinstance(each, int) and each > 0), 0)


def _folder(uri: str, progress: Progress | None, places: Places) -> tuple[Path, str]:
    if uri.startswith("hf://"):
        return _hub_folder(uri, progress)
    if uri.startswith("s3://"):
        cache = places.cache or platformdirs.user_cache_path("tidegate", appauthor=False)
        return s3_source.fetch(uri, cache, WANTED_FILES, progress)
    if uri.startswith("pvc://"):
        return _claimed_folder(uri, places.claims), ""
    folder = Path(uri.removeprefix("file://")).expanduser()
    if not folder.exists():
        raise SourceError("SourceNotFound", f"There is no folder at {folder}; check spec.source.uri.")
    if not folder.is_dir():
        raise SourceError(
            "SourceFormat",
            f"{folder} is a file; give the folder that holds config.json and the safetensors files.",
        )
    return folder.resolve(), ""


def _claimed_folder(uri: str, claims: Mapping[str, Path]) -> Path:
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    if claim not in claims:
        raise SourceError(
            "SourceNotFound", f"{uri}: the claim {claim!r} is not mounted here; pvc:// is for Kubernetes."
        )
    root = claims[claim].resolve()
    folder = (root / path).resolve()
    if not folder.is_relative_to(root):
        raise SourceError("SourceNotFound", f"{uri} leads out of the claim; check spec.source.uri.")
    if not folder.is_dir():
        raise SourceError("SourceNotFound", f"The claim {claim!r} holds no folder {path or '/'}.")
    return folder


def _hub_folder(uri: str, progress: Progress | None) -> tuple[Path, str]:
    """Download what is missing, with huggingface_hub's cache, token and offline conventions."""
    from huggingface_hub import constants, errors, snapshot_download

    name, _, revision = uri.removeprefix("hf://").partition("@")
    try:
        if constants.HF_HUB_OFFLINE:
            found = snapshot_download(
                name, revision=revision or None, allow_patterns=WANTED_FILES, local_files_only=True
            )
        else:
            found = snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=WANTED_FILES,
                etag_timeout=10,
                tqdm_class=_progress_class(progress),
            )
    except errors.GatedRepoError as error:
        raise SourceError(
            "Unauthorized", f"{uri} is gated: accept its licence on the hub and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError("SourceNotFound", f"{name} has no revision {revision!r} on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            "SourceNotFound", f"{name} is not on the hub, or it is private and HF_TOKEN is not set."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise SourceError(
                "Offline",
                f"{uri} is not in the local cache and HF_HUB_OFFLINE is set; unset it or pull first.",
            ) from error
        raise SourceError(
            "Offline", f"{uri} is not in the local cache and the hub cannot be reached."
        ) from error
    except OSError as error:
        raise _disk_or_network(uri, error) from error
    except ValueError as error:
        raise SourceError("SourceFormat", f"{uri}: {error}") from error
    return Path(found), Path(found).name


def _disk_or_network(uri: str, error: OSError) -> SourceError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceError("NoSpace", f"The disk has no room for {uri}; free some, or move it with HF_HOME.")
    return SourceError("Offline", f"{uri} could not be downloaded: {error}")


def _progress_class(progress: Progress | None) -> Any:
    """A tqdm that reports bytes to `progress` instead of drawing; silent without one."""
    from huggingface_hub.utils.tqdm import tqdm

    base: Any = tqdm

    class Reporter(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *_: Any, **__: Any) -> None:
            if progress is not None and self.unit == "B":
                progress(str(self.desc or "download"), int(self.n), int(self.total or 0))

    return Reporter


def _config(uri: str, folder: Path, files: dict[str, int]) -> dict[str, Any]:
    if "config.json" not in files:
        raise SourceError("SourceFormat", _no_config(uri, files))
    try:
        found = json.loads(_small_file(folder / "config.json"))
    except (OSError, ValueError) as error:
        raise SourceError("SourceFormat", f"{folder / 'config.json'} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise SourceError("SourceFormat", f"{folder / 'config.json'} is not a JSON object.")
    return found


def _no_config(uri: str, files: dict[str, int]) -> str:
    if not files:
        return f"{uri} is empty; a checkpoint folder holds config.json and *.safetensors."
    other = _other_format(files)
    if other:
        return f"{uri} holds {other} files; Tidegate reads Hugging Face folders with *.safetensors."
    return f"{uri} has no config.json; give the folder that directly holds it."


def _no_safetensors(uri: str, files: dict[str, int]) -> str:
    other = _other_format(files)
    if other:
        return (
            f"{uri} holds its weights only as {other}; Tidegate reads *.safetensors, so convert them first."
        )
    return f"{uri} has a config.json but no *.safetensors weights."


def _other_format(files: dict[str, int]) -> str:
    return next(
        (OTHER_FORMATS[Path(name).suffix] for name in files if Path(name).suffix in OTHER_FORMATS), ""
    )


def _check_index(uri: str, folder: Path, files: dict[str, int]) -> None:
    """A sharded checkpoint's index names its files; all must be there."""
    name = "model.safetensors.index.json"
    if name not in files:
        return
    try:
        shards = set(json.loads(_small_file(folder / name))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SourceError("SourceFormat", f"{folder / name} cannot be read: {error!r}.") from error
    missing = sorted(shards - set(files))
    if missing:
        raise SourceError(
            "SourceNotFound", f"{uri} lacks {len(missing)} of its weight files: {missing[0]}, ..."
        )


def _dtypes(path: Path) -> Iterator[tuple[str, int]]:
    """(dtype, number of values) per tensor, from a safetensors header. Raises `SourceError` if it is cut."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length))
        end = 0
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            count = 1
            for side in tensor["shape"]:
                count *= side
            end = max(end, tensor["data_offsets"][1])
            yield tensor["dtype"], count
        if path.stat().st_size < 8 + length + end:
            raise ValueError("the file ends too early")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        message = f"{path} is not a whole safetensors file: {error}; download or copy it again."
        raise SourceError("SourceFormat", message) from error


def _quantization(folder: Path, config: dict[str, Any]) -> str:
    """auto-gptq wrote `quantize_config.json`; newer writers put it into config.json."""
    settings = config.get("quantization_config")
    if isinstance(settings, dict):
        return str(settings.get("quant_method") or "gptq").lower()
    return "gptq" if (folder / "quantize_config.json").exists() else "none"


def _digest(folder: Path, files: dict[str, int]) -> str:
    total = hashlib.sha256()
    for name, size in files.items():
        total.update(f"{name}\0{size}\0".encode())
        if name.endswith((".json", ".jinja")) and size <= MAX_CONFIG_BYTES:
            total.update((folder / name).read_bytes())
    return total.hexdigest()


def _small_file(path: Path) -> bytes:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError("it is too large for a configuration file")
    return path.read_bytes()


def _verify(path: Path, size: int, progress: Progress, *, is_hub: bool) -> None:
    """Read a file to its end. The hub's cache names each large file by its sha256."""
    blob = path.resolve().name
    expected = blob if is_hub and len(blob) == 64 else ""
    found, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                found.update(chunk)
                done += len(chunk)
                progress(f"verify {path.name}", done, size)
    except OSError as error:
        raise SourceError("SourceNotFound", f"{path} cannot be read: {error.strerror}.") from error
    if expected and found.hexdigest() != expected:
        raise SourceError(
            "ChecksumMismatch",
            f"{path.name} is damaged (its sha256 differs); delete {path.resolve()} and pull again.",
        )


def main(arguments: list[str]) -> int:
    """`resolve URI`: a JSON object on stdout, {"error": {...}} and status 1 where it fails."""
    parser = argparse.ArgumentParser(prog="python -m tidegate.sources")
    parser.add_argument("command", choices=["resolve"])
    parser.add_argument("uri", metavar="URI")
    parser.add_argument("--cache", type=Path, help="folder for downloads from buckets")
    parser.add_argument(
        "--claim", action="append", default=[], type=_claim, metavar="NAME=FOLDER", help="a mounted claim"
    )
    parser.add_argument("--answer", type=Path, help="file for an answer that fits a termination message")
    given = parser.parse_args(arguments)
    try:
        found: dict[str, Any] = asdict(resolve(given.uri, Places(given.cache, dict(given.claim))))
        status = 0
    except SourceError as error:
        found, status = {"error": {"reason": error.source_reason, "message": error.message}}, 1
    sys.stdout.write(json.dumps(found) + "\n")
    if given.answer is not None:
        given.answer.write_bytes(short_answer(found))
    return status


def short_answer(found: Mapping[str, Any]) -> bytes:
    """The answer without the list of files, and with so much of an error's message that it fits."""
    if "error" not in found:
        short = {name: value for name, value in found.items() if name not in ("files", "uri")}
        return json.dumps(short).encode()
    reason, message = found["error"]["reason"], str(found["error"]["message"])
    while (
        len(body := json.dumps({"error": {"reason": reason, "message": message}}).encode()) > MAX_ANSWER_BYTES
    ):
        message = message[: len(message) - max(1, (len(body) - MAX_ANSWER_BYTES) // MOST_BYTES_PER_CHARACTER)]
    return body


def _claim(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        raise argparse.ArgumentTypeError("write NAME=FOLDER")
    return name, Path(folder)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

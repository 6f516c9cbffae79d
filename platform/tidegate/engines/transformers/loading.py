"""Loads a checkpoint's model and tokenizer, and refuses what would answer garbage.

GPTQ goes through GPTQModel and never through `from_pretrained`, which leaves a falcon's quantized layers
out without an error. Code that a checkpoint brings along is never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.memory import check_weights_fit, free_host_bytes, torch_share, within_cap
from tidegate.engines.transformers.tokenizer import load_tokenizer
from tidegate.errors import SourceError
from tidegate.replica_args import EngineSpec
from tidegate.sources.checkpoint import Checkpoint, FilesMissing, read_checkpoint
from tidegate.sources.facts import PRECISION_BYTES, DecoderShape

QUANTIZED_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
NAMED_IN_MESSAGE = 5
UNBOUNDED_CONTEXT = 2048  # for configs that name no length (ALiBi)


@dataclass(frozen=True, slots=True)
class Loaded:
    model: Any
    tokenizer: Any
    device: str
    precision: str
    weights_bytes: int
    notes: list[str]


def load(checkpoint: Checkpoint, spec: EngineSpec) -> Loaded:
    """Load model and tokenizer onto the device that `spec` asks for. Raises `EngineLoadError`."""
    check_architecture(checkpoint)
    device = choose_device(spec.device)
    precision = checkpoint.auto_precision if spec.precision == "auto" else spec.precision
    if precision not in PRECISION_BYTES:
        raise EngineLoadError(
            "InvalidEngineArgs", f"precision {spec.precision!r}: use auto, float32, bfloat16 or float16."
        )
    weights_bytes = checkpoint.weights.loaded_bytes(precision)
    limit_memory(device, spec.memory_cap_bytes)
    check_weights_fit(weights_bytes, within_cap(free_bytes(device), spec.memory_cap_bytes, 0, device), device)
    transformers_logging.disable_progress_bar()  # bars belong on a terminal, a replica writes a log
    tokenizer = load_tokenizer(checkpoint.path)
    check_padding(checkpoint.config)
    if checkpoint.quantization == "gptq":
        model, notes = load_gptq(checkpoint, precision, device)
    else:
        model, notes = load_plain(checkpoint, precision, device)
    model.eval()
    return Loaded(model, tokenizer, device, precision, weights_bytes, notes)


def open_checkpoint(path: Path, quantization: str) -> Checkpoint:
    """Read a folder before anything heavy is loaded. `quantization` is what the spec asks for.

    Raises `EngineLoadError` with WeightsMissing, WeightsWrong, UnsupportedModel or InvalidEngineArgs.
    """
    try:
        checkpoint = read_checkpoint(path)
    except FilesMissing as error:
        raise EngineLoadError("WeightsMissing", error.message) from error
    except SourceError as error:
        raise EngineLoadError("WeightsWrong", error.message) from error
    found = checkpoint.quantization
    if found not in ("none", "gptq"):
        raise EngineLoadError(
            "UnsupportedModel", f"The checkpoint is quantized with {found}; this engine serves GPTQ only."
        )
    if quantization not in ("auto", found):
        what = "is quantized with GPTQ" if found == "gptq" else "is not quantized"
        raise EngineLoadError(
            "InvalidEngineArgs",
            f"quantization is {quantization}, but the checkpoint {what}: leave it out.",
        )
    return checkpoint


def context_length(shape: DecoderShape, asked: int) -> int:
    """Return the context to serve. `asked` 0 means the checkpoint's own; more than that is refused."""
    if asked and shape.positions and asked > shape.positions:
        raise EngineLoadError(
            "InvalidEngineArgs",
            f"contextLength is {asked}, but the checkpoint holds {shape.positions} positions: ask for at "
            "most that.",
        )
    return asked or shape.positions or UNBOUNDED_CONTEXT


def choose_device(asked: str) -> str:
    if asked not in ("auto", "cpu", "cuda"):
        raise EngineLoadError("InvalidEngineArgs", f"device {asked!r}: use auto, cpu or cuda.")
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise EngineLoadError(
            "InvalidEngineArgs", "device is cuda, but this machine has no usable CUDA device."
        )
    return "cuda" if has_cuda and asked != "cpu" else "cpu"


def free_bytes(device: str) -> int:
    if device == "cpu":
        return free_host_bytes()
    return int(torch.cuda.mem_get_info()[0])


def limit_memory(device: str, cap_bytes: int) -> None:
    """Keep this process within its share of a GPU: what it takes too much is its own error and not its
    neighbour's."""
    if device == "cuda" and cap_bytes:
        total = int(torch.cuda.mem_get_info()[1])
        torch.cuda.set_per_process_memory_fraction(torch_share(cap_bytes, total))


def check_architecture(checkpoint: Checkpoint) -> None:
    """Refuse what is not a decoder that transformers itself knows. Raises UnsupportedModel."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = checkpoint.model_type
    named = [str(name) for name in checkpoint.config.get("architectures") or []]
    what = f"{named[0]} ({kind})" if named else repr(kind)
    if kind not in CONFIG_MAPPING_NAMES:
        own_code = (
            " It brings code of its own, which is never run." if checkpoint.config.get("auto_map") else ""
        )
        raise EngineLoadError(
            "UnsupportedModel", f"The installed transformers has no architecture {kind!r}.{own_code}"
        )
    if checkpoint.config.get("is_encoder_decoder"):
        raise EngineLoadError(
            "UnsupportedModel", f"{what} is an encoder-decoder; this engine serves decoders only."
        )
    decoders = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ())
    allowed = {decoders} if isinstance(decoders, str) else set(decoders)
    if not allowed or (named and not allowed.intersection(named)):
        raise EngineLoadError(
            "UnsupportedModel", f"{what} is not a causal language model; this engine serves only those."
        )


def check_padding(config: Mapping[str, Any]) -> None:
    """Refuse what no embedding can be made of. Raises WeightsWrong."""
    pad, known = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(known, int) and pad >= known:
        raise EngineLoadError(
            "WeightsWrong",
            f"config.json: pad_token_id is {pad}, but vocab_size is {known}: name a token that the model "
            "has, or leave it out.",
        )


def load_plain(checkpoint: Checkpoint, precision: str, device: str) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=getattr(torch, precision),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise EngineLoadError(
            "OutOfMemory", f"The weights do not fit on {device}: {first_line(error)}"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        raise EngineLoadError("WeightsWrong", f"Loading failed: {first_line(error)}") from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        raise missing_weights(missing)
    if info["mismatched_keys"]:
        names = [str(item[0] if isinstance(item, tuple) else item) for item in info["mismatched_keys"]]
        raise EngineLoadError("WeightsWrong", f"Weights of another shape than the config's: {some(names)}.")
    return model, unexpected_note(info["unexpected_keys"])


def load_gptq(checkpoint: Checkpoint, precision: str, device: str) -> tuple[Any, list[str]]:
    notes = check_gptq_names(checkpoint)
    try:
        from gptqmodel import BACKEND, GPTQModel
    except ImportError as error:
        raise EngineLoadError(
            "UnsupportedModel", 'GPTQ checkpoints need the extra "gptq": pip install "tidegate[gptq]".'
        ) from error
    # On CPU: PyTorch's own int4 kernel, which compiles nothing when it loads.
    backend = BACKEND.GPTQ_TORCH_ATEN if device == "cpu" else BACKEND.AUTO
    try:
        wrapped = GPTQModel.load(
            str(checkpoint.path),
            device=device,
            backend=backend,
            dtype=getattr(torch, precision),
            trust_remote_code=False,
        )
    except torch.OutOfMemoryError as error:
        raise EngineLoadError(
            "OutOfMemory", f"The weights do not fit on {device}: {first_line(error)}"
        ) from error
    except Exception as error:  # GPTQModel raises whatever its kernels and readers do
        raise EngineLoadError("WeightsWrong", f"GPTQModel cannot load it: {first_line(error)}") from error
    return wrapped.model, notes


def check_gptq_names(checkpoint: Checkpoint) -> list[str]:
    """Compare the stored tensors with what the architecture needs, each linear layer's weight plain or
    quantized. Raises WeightsMissing; returns a note about unexpected ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
    if config.tie_word_embeddings and skeleton.get_output_embeddings() is not None:
        head = skeleton.get_output_embeddings()
        tied |= {f"{name}.weight" for name, module in skeleton.named_modules() if module is head}
    buffers = {name for name, _ in skeleton.named_buffers()}
    expected = set(skeleton.state_dict())
    missing = sorted(
        name
        for name in expected - tied - buffers
        if name not in checkpoint.tensor_names
        and f"{name.removesuffix('weight')}qweight" not in checkpoint.tensor_names
    )
    if missing:
        raise missing_weights(missing)
    layers = {name.rpartition(".")[0] for name in expected}
    return unexpected_note(
        name
        for name in checkpoint.tensor_names - expected
        if name.rpartition(".")[0] not in layers or name.rpartition(".")[2] not in QUANTIZED_PARTS
    )


def missing_weights(names: list[str]) -> EngineLoadError:
    return EngineLoadError(
        "WeightsMissing", f"The checkpoint lacks {len(names)} weights that the model needs: {some(names)}."
    )


def unexpected_note(names: Iterable[str]) -> list[str]:
    found = sorted(names)
    return [f"{len(found)} weights of the checkpoint are not used: {some(found)}."] if found else []


def some(names: list[str]) -> str:
    """Show the first few names."""
    more = len(names) - NAMED_IN_MESSAGE
    return ", ".join(names[:NAMED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

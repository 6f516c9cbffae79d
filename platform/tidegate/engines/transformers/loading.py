"""Loads a checkpoint's model and tokenizer, and refuses what would answer garbage.

GPTQ never goes through `from_pretrained` as it is stored: that leaves a falcon's quantized layers out without
an error. Code that a checkpoint brings along is never run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tidegate.engines.base import EngineLoadError, is_out_of_memory
from tidegate.engines.transformers.decoder_step import of_same_inputs
from tidegate.engines.transformers.gptq import (
    Stored,
    hold_packed,
    load_packed,
    packable,
    read,
    unpacked_weights,
    with_int4_layers,
)
from tidegate.engines.transformers.memory import (
    check_weights_fit,
    free_host_bytes,
    gib,
    torch_share,
    within_cap,
)
from tidegate.engines.transformers.packed import FbgemmLinear, pack_linears
from tidegate.engines.transformers.tokenizer import load_tokenizer
from tidegate.errors import SourceError, shortened
from tidegate.replica_args import EngineSpec
from tidegate.sources.checkpoint import Checkpoint, FilesMissing, read_checkpoint
from tidegate.sources.facts import PRECISION_BYTES, contradiction
from tidegate.sources.gptq import (
    PARTS,
    Layer,
    Settings,
    loaded_weights,
    read_layers,
    read_settings,
    why_unpacked,
)
from tidegate.sources.servable import UNSUPPORTED, check_servable, not_causal, unknown_type

NAMED_IN_MESSAGE = 5
CAUSAL, TEXT_TO_TEXT, BARE = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"
UNBOUNDED_CONTEXT = 2048  # for configs that name no length (ALiBi)
MOST_TOLD = 300  # characters of a library's error


@dataclass(frozen=True, slots=True)
class Loaded:
    model: Any
    tokenizer: Any
    device: str
    precision: str
    weights_bytes: int
    notes: list[str]


def load(
    checkpoint: Checkpoint, spec: EngineSpec, *, auto: str = CAUSAL, unpacks_gptq: bool = False
) -> Loaded:
    """Load model and tokenizer onto the device that `spec` asks for, as transformers' class `auto` does.
    `unpacks_gptq` is the engine's argument. Raises `EngineLoadError`."""
    check_architecture(checkpoint, auto)
    # Before the tokenizer, which reads the config too and would be blamed for it.
    skeleton = load_skeleton(checkpoint, auto)
    device = choose_device(spec.device)
    precision = choose_precision(checkpoint, spec)
    weights_bytes = loaded_weights(checkpoint).loaded_bytes(precision)
    limit_memory(device, spec.memory_cap_bytes)
    room = within_cap(free_bytes(device), spec.memory_cap_bytes, 0, device)
    check_weights_fit(weights_bytes, room, device)
    transformers_logging.disable_progress_bar()  # bars belong on a terminal, a replica writes a log
    tokenizer = load_tokenizer(checkpoint.path, spec.chat_template)
    if checkpoint.quantization == "gptq":
        model, notes = load_gptq(checkpoint, skeleton, precision, device, room, unpacks=unpacks_gptq)
    else:
        model, notes = from_pretrained(checkpoint, precision, device, auto=auto)
    model.eval()
    check_finite(model, checkpoint, precision)
    held = max(weights_bytes, sum(weight.nbytes for weight in model.parameters()))
    if device == "cpu" and auto == CAUSAL:
        pack_linears(model, of_same_inputs(model))
    elif device == "cpu" and auto != TEXT_TO_TEXT:  # whose layers ask for their weights' type at every call
        pack_linears(model, allowed=(FbgemmLinear,))
    return Loaded(model, tokenizer, device, precision, held, notes)


def open_checkpoint(spec: EngineSpec) -> Checkpoint:
    """Read a folder before anything heavy is loaded, and compare it with what the spec asks of it.

    Raises `EngineLoadError` with WeightsMissing, WeightsWrong, UnsupportedModel or InvalidEngineArgs.
    """
    try:
        checkpoint = read_checkpoint(Path(spec.path))
        check_servable(checkpoint)
    except FilesMissing as error:
        raise EngineLoadError("WeightsMissing", error.message) from error
    except SourceError as error:
        reason = UNSUPPORTED if error.source_reason == UNSUPPORTED else "WeightsWrong"
        raise EngineLoadError(reason, error.message) from error
    amiss = contradiction(
        checkpoint.shape,
        checkpoint.quantization,
        asked_context=spec.context_length,
        asked_quantization=spec.quantization,
        task=checkpoint.task,
        asked_task=spec.task,
    )
    if amiss:
        raise EngineLoadError("InvalidEngineArgs", amiss)
    return checkpoint


def choose_precision(checkpoint: Checkpoint, spec: EngineSpec) -> str:
    precision = checkpoint.auto_precision if spec.precision == "auto" else spec.precision
    if precision not in PRECISION_BYTES:
        raise EngineLoadError(
            "InvalidEngineArgs", f"precision {spec.precision!r}: use auto, float32, bfloat16 or float16."
        )
    return precision


def vocabulary_size(model: Any) -> int:
    """Return how many token ids there are, both to read and to choose. Raises `EngineLoadError`
    (UnsupportedModel) where an encoder and a decoder have different ones."""
    reads = int(model.get_input_embeddings().weight.shape[0])
    head = model.get_output_embeddings()
    # Not by its weight where it says so itself: what asks for a packed one makes it plain (`packed`).
    outputs = reads if head is None else getattr(head, "out_features", None) or head.weight.shape[0]
    says = int(outputs)
    if says != reads and model.config.is_encoder_decoder:
        raise EngineLoadError(
            "UnsupportedModel",
            f"Its encoder reads {reads} tokens and its decoder says {says}: two vocabularies are not served. "
            "Take a checkpoint that shares one (share_encoder_decoder_embeddings true).",
        )
    return min(reads, says)


def choose_context(checkpoint: Checkpoint, spec: EngineSpec) -> int:
    """Return the tokens of the longest request: what was asked for, or as many as the checkpoint covers."""
    return spec.context_length or checkpoint.shape.positions or UNBOUNDED_CONTEXT


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


def check_architecture(checkpoint: Checkpoint, auto: str) -> None:
    """Refuse what transformers itself does not know, and what generates nothing where that is loaded. Raises
    UnsupportedModel."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    if checkpoint.model_type not in CONFIG_MAPPING_NAMES:
        raise EngineLoadError(UNSUPPORTED, unknown_type(checkpoint).message)
    generating = {
        CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        TEXT_TO_TEXT: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    if (known := generating.get(auto)) is None:
        return
    heads = [str(name) for name in checkpoint.config.get("architectures") or []]
    classes = known.get(checkpoint.model_type, ())
    allowed = {classes} if isinstance(classes, str) else set(classes)
    if not allowed or (heads and not allowed.intersection(heads)):
        raise EngineLoadError(UNSUPPORTED, not_causal(checkpoint).message)


def load_skeleton(checkpoint: Checkpoint, auto: str = CAUSAL) -> Any:
    """Return the architecture that the config describes, without weights."""
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            return getattr(transformers, auto).from_config(config)
    except Exception as error:  # each architecture checks its own fields, and raises what it likes
        raise EngineLoadError(
            "WeightsWrong",
            f"{checkpoint.path / 'config.json'} does not describe a {checkpoint.model_type}: "
            f"{told(error)}{fields_of(error, checkpoint.config)}; correct it, or copy it again.",
        ) from error


def fields_of(error: Exception, config: Mapping[str, Any]) -> str:
    """Name the fields that hold what a bare KeyError says."""
    parts = [config, *(each for each in config.values() if isinstance(each, Mapping))]
    names = [name for part in parts for name, value in part.items() if error.args and value == error.args[0]]
    return f" ({some(names)})" if isinstance(error, KeyError) and names else ""


def from_pretrained(
    checkpoint: Checkpoint,
    precision: str,
    device: str,
    *,
    weights: Mapping[str, Any] | None = None,
    architecture: Any = None,
    config: Any = None,
    auto: str = CAUSAL,
) -> tuple[Any, list[str]]:
    """Load by transformers, which renames and fuses what its architecture holds otherwise.

    `weights` stand for the files' where these do not hold them as they are computed with; `architecture` is
    then the class, and `config` its own.
    """
    import transformers
    from transformers import GenerationConfig

    how = {
        "dtype": getattr(torch, precision),
        "device_map": {"": device},  # each tensor is read to where it stays, several at a time
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    try:
        with reported() as report:
            if weights is None:
                model, info = getattr(transformers, auto).from_pretrained(
                    checkpoint.path, local_files_only=True, trust_remote_code=False, **how
                )
            else:
                model, info = architecture.from_pretrained(
                    None, config=config, state_dict=dict(weights), **how
                )
                if "generation_config.json" in checkpoint.files:
                    model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        for line in report:
            if is_out_of_memory(RuntimeError(line)):
                raise MemoryError(line) from error
        raise EngineLoadError("WeightsWrong", f"Loading {checkpoint.path} failed: {told(error)}") from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(info["missing_keys"]) - tied)
    if auto == BARE:  # a model that was saved under another head has no pooler, which no vector is made with
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise missing_weights(missing)
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise wrong_shape(checkpoint, name, list(found), list(expected))
    return model, unexpected_note(info["unexpected_keys"])


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()


@contextmanager
def reported() -> Iterator[list[str]]:
    """Collect the lines that transformers reports of a load: why it could not put weights together, as an
    architecture's experts, is there alone, and not in what it raises."""
    reports, handler = logging.getLogger("transformers.modeling_utils"), _Lines()
    reports.addHandler(handler)
    try:
        yield handler.lines
    finally:
        reports.removeHandler(handler)


def load_gptq(
    checkpoint: Checkpoint, skeleton: Any, precision: str, device: str, room: int, *, unpacks: bool
) -> tuple[Any, list[str]]:
    """Load packed weights where a kernel computes with them, and unpack them into `room` bytes elsewhere, or
    where somebody asks for that."""
    if unpacks and device != "cpu":
        raise EngineLoadError("InvalidEngineArgs", "unpacks_gptq is for device cpu: leave it out.")
    settings = read_settings(checkpoint)
    layers = read_layers(checkpoint, settings)
    asked = "unpacks_gptq asks for it" if unpacks else ""
    reason = asked or why_unpacked(settings, layers, precision, device)
    if not reason:
        try:
            if device == "cpu" and packable(skeleton, layers):
                return load_int4(checkpoint, settings, layers, skeleton, precision)
            model, unused = load_packed(checkpoint, settings, layers, precision, device)
            return model, unexpected_note(unused)
        except ImportError as error:
            raise EngineLoadError(
                UNSUPPORTED, 'GPTQ checkpoints need the extra "gptq": pip install "tidegate[gptq]".'
            ) from error
        except Exception as error:  # kernels and GPTQModel's readers raise what they like
            if is_out_of_memory(error):
                raise
            reason = told(error).removeprefix("ValueError: ")
    size = loaded_weights(checkpoint).unpacked_bytes(precision)
    check_weights_fit(size, room, device)
    weights = unpacked_weights(checkpoint, settings, layers, skeleton)
    model, notes = from_pretrained(
        checkpoint, precision, device, weights=weights, architecture=type(skeleton), config=skeleton.config
    )
    return model, [*notes, f"The weights are unpacked to {precision} and take {gib(size)}: {reason}."]


def load_int4(
    checkpoint: Checkpoint, settings: Settings, layers: Mapping[str, Layer], skeleton: Any, precision: str
) -> tuple[Any, list[str]]:
    """Load onto the CPU by transformers, with an `Int4Linear` for each quantized layer. Raises ValueError
    where one of them computes otherwise than the method says."""
    parts = {f"{name}.{part}" for name in layers for part in PARTS}
    model, notes = from_pretrained(
        checkpoint,
        precision,
        "cpu",
        weights={name: Stored(tensor) for name, tensor in checkpoint.tensors.items() if name not in parts},
        architecture=with_int4_layers(type(skeleton), layers),
        config=skeleton.config,
    )
    hold_packed(model, settings, layers)
    return model, notes


def check_finite(model: Any, checkpoint: Checkpoint, precision: str) -> None:
    """Refuse weights that are no numbers. Raises `EngineLoadError` (WeightsWrong) with tensor and file."""
    scales = (tensor for name, tensor in model.named_buffers() if name.endswith("scales"))
    if all(is_finite(weight) for weight in (*model.parameters(), *scales)):
        return
    for name, tensor in checkpoint.tensors.items():
        if not is_finite(read(tensor)):
            raise EngineLoadError(
                "WeightsWrong",
                f"{name} in {tensor.file} holds NaN or infinite values: the file is damaged or was written "
                "wrong; copy it again, or export the model again.",
            )
    raise EngineLoadError(
        "WeightsWrong", f"Some weights are too large for {precision}: set precision to bfloat16 or float32."
    )


def is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def wrong_shape(checkpoint: Checkpoint, name: str, found: list[int], expected: list[int]) -> EngineLoadError:
    """`name` is the model's: transformers fuses some tensors, and then no one file holds it."""
    stored = checkpoint.tensors.get(name)
    where = f" in {stored.file}" if stored else ""
    return EngineLoadError(
        "WeightsWrong",
        f"{name}{where} has shape {found}, but {checkpoint.path / 'config.json'} makes it {expected}: "
        "copy the one that belongs to the other.",
    )


def missing_weights(names: list[str]) -> EngineLoadError:
    return EngineLoadError(
        "WeightsMissing",
        f"The checkpoint lacks {len(names)} weights that the model needs: {some(names)}. Copy it again, with "
        "the config.json that belongs to it.",
    )


def unexpected_note(names: Iterable[str]) -> list[str]:
    found = sorted(names)
    return [f"{len(found)} weights of the checkpoint are not used: {some(found)}."] if found else []


def some(names: list[str]) -> str:
    """Show the first few names."""
    more = len(names) - NAMED_IN_MESSAGE
    return ", ".join(names[:NAMED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def closed_on_failure(close: Callable[[], None]) -> Iterator[None]:
    """Close what a load that fails has opened; memory that ran out becomes an `EngineLoadError`."""
    try:
        yield
    except BaseException as error:
        close()
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise


def out_of_memory(error: BaseException) -> EngineLoadError:
    return EngineLoadError(
        "OutOfMemory",
        f"Memory ran out while the model was loaded and checked ({told(error)}): give it more, "
        "or serve a smaller or quantized checkpoint.",
    )


def told(error: BaseException) -> str:
    """Say a library's error, which may be a bare key or many lines, within bounds."""
    words = " ".join(str(error).split()).removesuffix(".")
    return shortened(f"{type(error).__name__}: {words}", MOST_TOLD)

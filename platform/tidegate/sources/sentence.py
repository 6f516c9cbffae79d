"""What sentence-transformers' files say comes before and behind a model: prompts, pooling, dense layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec

from tidegate.errors import SourceError
from tidegate.sources.checkpoint import MAX_CONFIG_BYTES, MODULES, Checkpoint

# In the order in which several stand one behind the other, and what each is in files of versions before 5.7.
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
DENSE_FIELD = "sentence_embedding"
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
LENGTH_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlnet_config.json")
CONFIG = "config_sentence_transformers.json"
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer behind the pooling: `weights` is its file in the checkpoint's folder."""

    weights: str
    activation: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """How one vector comes of a text. `max_tokens` 0: the model's own. `prompts` are texts by their names, of
    which the `default_prompt` comes before each text, and `lowers` both. Several `modes` stand one behind the
    other."""

    modes: tuple[str, ...]
    dense: tuple[Dense, ...] = ()
    normalises: bool = True
    max_tokens: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    lowers: bool = False


class Asked(msgspec.Struct):
    """What `CONFIG` says."""

    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None


class Length(msgspec.Struct):
    """What one of `LENGTH_FILES` says."""

    max_seq_length: Annotated[int, msgspec.Meta(ge=0)] | None = None
    do_lower_case: bool | None = None


class Module(msgspec.Struct):
    type: str = ""
    path: str | None = None


class Pooling(msgspec.Struct):
    pooling_mode: str | list[str] | None = None
    include_prompt: bool = True
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class DenseLayer(msgspec.Struct):
    activation_function: str | None = None
    use_residual: bool = False
    module_input_name: str | None = None
    module_output_name: str | None = None


def read_sentence(checkpoint: Checkpoint, plain_mode: str) -> Sentence:
    """Read a checkpoint's modules; one without them is pooled by `plain_mode` and normalised.

    Raises `SourceError`: `UnsupportedModel` for a module that is not served, `SourceFormat` for a file that
    sentence-transformers would not have written.
    """
    asked = _read(checkpoint, CONFIG, Asked)
    prompts, default = asked.prompts or {}, asked.default_prompt_name or ""
    if default and default not in prompts:
        raise SourceError("SourceFormat", f"{checkpoint.path / CONFIG} lacks its default prompt {default!r}.")
    length = _read(checkpoint, next((name for name in LENGTH_FILES if name in checkpoint.files), ""), Length)
    common: dict[str, Any] = {
        "max_tokens": length.max_seq_length or 0,
        "prompts": prompts,
        "default_prompt": default,
        "lowers": bool(length.do_lower_case),
    }
    if MODULES not in checkpoint.files:
        return Sentence((plain_mode,), **common)
    modes: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalises = False
    for module in _read(checkpoint, MODULES, list[Module]):
        kind, path = module.type.rpartition(".")[2], module.path or ""
        if kind == "Pooling" and not modes and not dense and not normalises:
            pooling = _read(checkpoint, f"{path}/config.json", Pooling)
            modes = _modes(checkpoint, path, pooling)
            if not pooling.include_prompt and any(prompts.values()):
                raise _unserved(checkpoint, f"{path}/config.json says include_prompt: false")
        elif kind == "Dense" and modes and not normalises:
            dense.append(_dense(checkpoint, path))
        elif kind == "Normalize" and modes:
            normalises = True
        elif kind not in ("Transformer", "Dropout") or (kind == "Transformer" and path):
            raise _unserved(checkpoint, f"{MODULES} has {kind or 'a module without type'} at {path!r}")
    if not modes:
        raise _unserved(checkpoint, f"{MODULES} has no Pooling")
    return Sentence(modes, tuple(dense), normalises, **common)


def _modes(checkpoint: Checkpoint, path: str, pooling: Pooling) -> tuple[str, ...]:
    named = pooling.pooling_mode
    if named is None:
        found = tuple(mode for mode, flag in FLAGS.items() if getattr(pooling, flag))
    else:
        found = (named,) if isinstance(named, str) else tuple(named)
    if not found or not set(found) <= set(FLAGS):
        raise _unserved(checkpoint, f"{path}/config.json pools by {', '.join(found) or 'nothing'}")
    return found


def _dense(checkpoint: Checkpoint, path: str) -> Dense:
    layer = _read(checkpoint, f"{path}/config.json", DenseLayer)
    activation = (layer.activation_function or "Tanh").rpartition(".")[2]
    places = {layer.module_input_name, layer.module_output_name}
    if activation not in ACTIVATIONS or layer.use_residual or not places <= {DENSE_FIELD, None}:
        raise _unserved(checkpoint, f"{path}/config.json describes a layer of {activation}")
    weights = f"{path}/model.safetensors"
    if weights not in checkpoint.files:
        raise SourceError("SourceFormat", f"{checkpoint.path / weights} is missing: save the model again.")
    return Dense(weights, activation)


def _read(checkpoint: Checkpoint, name: str, kind: type[Found]) -> Found:
    """Return what a file says; where there is none, what is said by nothing."""
    path = checkpoint.path / name
    try:
        if checkpoint.files.get(name, 0) > MAX_CONFIG_BYTES:
            raise ValueError("it is too large for a configuration file")
        return msgspec.convert(json.loads(path.read_bytes()) if name in checkpoint.files else {}, kind)
    except msgspec.ValidationError as error:
        raise SourceError("SourceFormat", f"{path}: {error}; correct it, or copy it again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError("SourceFormat", f"{path} cannot be read: {error}.") from error


def _unserved(checkpoint: Checkpoint, what: str) -> SourceError:
    return SourceError(
        "UnsupportedModel",
        f"{what}, which is not served: of sentence-transformers' modules Transformer, Pooling, Dense and "
        f"Normalize are ({checkpoint.path}).",
    )

"""What sentence-transformers' files say comes before and behind a model: prompts, pooling, dense layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
DENSE_FIELDS = {"sentence_embedding", None}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
LENGTH_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlnet_config.json")
CONFIG = "config_sentence_transformers.json"


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


def read_sentence(checkpoint: Checkpoint, plain_mode: str) -> Sentence:
    """Read a checkpoint's modules; one without them is pooled by `plain_mode` and normalised.

    Raises `SourceError`: `UnsupportedModel` for a module that is not served.
    """
    asked = _object(checkpoint, CONFIG)
    prompts = {str(name): str(text) for name, text in (asked.get("prompts") or {}).items()}
    default = str(asked.get("default_prompt_name") or "")
    length = next((_object(checkpoint, name) for name in LENGTH_FILES if name in checkpoint.files), {})
    common: dict[str, Any] = {
        "max_tokens": int(length.get("max_seq_length") or 0),
        "prompts": prompts,
        "default_prompt": default,
        "lowers": bool(length.get("do_lower_case")),
    }
    if MODULES not in checkpoint.files:
        return Sentence((plain_mode,), **common)
    modes: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalises = False
    for module in _modules(checkpoint):
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path") or "")
        config = _object(checkpoint, f"{path}/config.json")
        if kind == "Pooling" and not modes and not dense and not normalises:
            modes = _modes(checkpoint, path, config)
            if config.get("include_prompt") is False and any(prompts.values()):
                raise _unserved(checkpoint, f"{path}/config.json says include_prompt: false")
        elif kind == "Dense" and modes and not normalises:
            dense.append(_dense(checkpoint, path, config))
        elif kind == "Normalize" and modes:
            normalises = True
        elif kind not in ("Transformer", "Dropout") or (kind == "Transformer" and path):
            raise _unserved(checkpoint, f"{MODULES} has {kind or 'a module without type'} at {path!r}")
    if not modes:
        raise _unserved(checkpoint, f"{MODULES} has no Pooling")
    return Sentence(modes, tuple(dense), normalises, **common)


def _modules(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    found = _read(checkpoint, MODULES)
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise SourceError("SourceFormat", f"{checkpoint.path / MODULES} is not a list of modules.")
    return found


def _modes(checkpoint: Checkpoint, path: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if named is None:
        found = tuple(mode for mode, flag in FLAGS.items() if config.get(flag))
    else:
        found = (named,) if isinstance(named, str) else tuple(map(str, named))
    if not found or not set(found) <= set(FLAGS):
        raise _unserved(checkpoint, f"{path}/config.json pools by {', '.join(found) or 'nothing'}")
    return found


def _dense(checkpoint: Checkpoint, path: str, config: Mapping[str, Any]) -> Dense:
    activation = str(config.get("activation_function") or "Tanh").rpartition(".")[2]
    places = {config.get("module_input_name"), config.get("module_output_name")}
    if activation not in ACTIVATIONS or config.get("use_residual") or not places <= DENSE_FIELDS:
        raise _unserved(checkpoint, f"{path}/config.json describes a layer of {activation}")
    weights = f"{path}/model.safetensors"
    if weights not in checkpoint.files:
        raise SourceError("SourceFormat", f"{checkpoint.path / weights} is missing: save the model again.")
    return Dense(weights, activation)


def _object(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """Return what a file says; nothing where there is none."""
    found = _read(checkpoint, name) if name in checkpoint.files else {}
    if not isinstance(found, Mapping):
        raise SourceError("SourceFormat", f"{checkpoint.path / name} is not a JSON object.")
    return found


def _read(checkpoint: Checkpoint, name: str) -> Any:
    path = checkpoint.path / name
    try:
        if checkpoint.files[name] > MAX_CONFIG_BYTES:
            raise ValueError("it is too large for a configuration file")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError("SourceFormat", f"{path} cannot be read: {error}.") from error


def _unserved(checkpoint: Checkpoint, what: str) -> SourceError:
    return SourceError(
        "UnsupportedModel",
        f"{what}, which is not served: of sentence-transformers' modules Transformer, Pooling, Dense and "
        f"Normalize are ({checkpoint.path}).",
    )

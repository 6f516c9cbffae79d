"""From a model's hidden states to one vector a text (sentence-transformers' Pooling, Dense and Normalize)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidegate.engines.base import EngineLoadError
from tidegate.sources.sentence import Sentence


class Pooler:
    """Makes vectors as `sentence` says. Computes in float32 whatever the model computes in."""

    def __init__(self, sentence: Sentence, folder: Path, device: str) -> None:
        """Load the dense layers. Raises `EngineLoadError` (WeightsWrong)."""
        self._modes = sentence.modes
        self._normalises = sentence.normalises
        self._dense = [dense_layer(folder / dense.weights, dense.activation) for dense in sentence.dense]
        for layer in self._dense:
            layer.to(device).eval()

    def __call__(self, states: Tensor, lengths: Tensor) -> Tensor:
        """`states` [rows, columns, width], of which each row has `lengths` [rows] from the left. Returns
        [rows, dimensions]."""
        mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        states = states.float()
        vectors = torch.cat([pooled(mode, states, mask, lengths) for mode in self._modes], dim=-1)
        for layer in self._dense:
            vectors = layer(vectors)
        return normalised(vectors) if self._normalises else vectors


def pooled(mode: str, states: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    if mode == "cls":
        return states[:, 0]
    if mode == "lasttoken":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    if mode == "max":
        return states.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)
    weights = mask.float()
    if mode == "weightedmean":  # of position, from 1 (SGPT, arXiv 2202.08904, section 3.1.1)
        weights = weights * torch.arange(1, states.shape[1] + 1, device=states.device)
    total = torch.bmm(weights[:, None], states)[:, 0]
    over = weights.sum(dim=1, keepdim=True)
    return total / (over.sqrt() if mode == "mean_sqrt_len_tokens" else over)


def normalised(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def dense_layer(file: Path, activation: str) -> torch.nn.Sequential:
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        weight = tensors["linear.weight"].float()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias="linear.bias" in tensors)
        layer.load_state_dict(
            {name.removeprefix("linear."): tensor.float() for name, tensor in tensors.items()}
        )
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise EngineLoadError("WeightsWrong", f"{file} holds no linear layer: {error!r}.") from error
    return torch.nn.Sequential(layer, getattr(torch.nn, activation)())


def judge_of(config: Any, task: str) -> torch.nn.Module:
    """Return what turns a head's logits [rows, labels] into scores or shares, as sentence-transformers'
    CrossEncoder and transformers' pipelines do: for `score` what the checkpoint names, else the sigmoid; for
    `classify` the softmax, or a sigmoid a label where several may hold at once or there is one.

    Raises `EngineLoadError` (UnsupportedModel)."""
    if task == "score":
        named = str(
            (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
            or getattr(config, "sbert_ce_default_activation_function", None)
            or "torch.nn.modules.activation.Sigmoid"
        ).rpartition(".")[2]
        if named not in ("Identity", "Sigmoid", "Tanh"):
            raise EngineLoadError(
                "UnsupportedModel", f"config.json names the activation {named}, which is not served."
            )
        found: torch.nn.Module = getattr(torch.nn, named)()
        return found
    has_many = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    return torch.nn.Sigmoid() if has_many else torch.nn.Softmax(dim=-1)


def label_names(config: Any) -> Sequence[str]:
    return [str(config.id2label[place]) for place in range(config.num_labels)]

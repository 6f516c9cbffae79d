"""Says what is not served, as far as a checkpoint's files prove it.

Resolving refuses it before a replica starts; the engine, which asks again and knows its library, refuses it
with the same sentences.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tidegate.errors import SourceError
from tidegate.sources.checkpoint import INDEX_ENDING, SINGLE, Checkpoint, FilesMissing
from tidegate.sources.gptq import check_gptq

UNSUPPORTED = "UnsupportedModel"
# Ends of the names of classes whose task is not served.
OTHER_HEADS = (
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "RewardModel",
)
TEXT_TO_TEXT = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"  # as transformers names its list
# Types of encoder-decoders whose halves are of other architectures.
TWO_MODELS = ("encoder-decoder",)
# Tensors of float8 and integer weights that mean nothing without them.
SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "absmax", "SCB")


def check_servable(checkpoint: Checkpoint) -> None:
    """Raise `SourceError` for what cannot be served: `UnsupportedModel`, or what is wrong in the files."""
    check_described(checkpoint)
    if checkpoint.quantization == "none":
        _check_plain(checkpoint)
    else:
        check_gptq(checkpoint)


def check_described(checkpoint: Checkpoint) -> None:
    """Raise `SourceError` for what the description of a checkpoint alone proves not to be served."""
    _check_method(checkpoint)
    known = registered_types()
    if known and (not checkpoint.model_type or f'"{checkpoint.model_type}"' not in known):
        raise unknown_type(checkpoint)
    if checkpoint.has_encoder:
        _check_encoder_decoder(checkpoint)
    heads = [str(name) for name in checkpoint.config.get("architectures") or []]
    if heads and all(head.endswith(OTHER_HEADS) for head in heads):
        raise not_served(checkpoint)
    _check_padding(checkpoint)


def unknown_type(checkpoint: Checkpoint) -> SourceError:
    own_code = " It brings code of its own, which is never run." if checkpoint.config.get("auto_map") else ""
    return SourceError(
        UNSUPPORTED,
        f"The installed transformers has no architecture {checkpoint.model_type!r} (model_type in "
        f"config.json).{own_code}",
    )


def not_served(checkpoint: Checkpoint) -> SourceError:
    return SourceError(
        UNSUPPORTED,
        f"{named(checkpoint)} neither generates text nor makes vectors of it, nor classifies whole texts; "
        "only that is served.",
    )


def not_causal(checkpoint: Checkpoint) -> SourceError:
    return SourceError(
        UNSUPPORTED,
        f"{named(checkpoint)} is not a causal language model, and no encoder-decoder from text to text; this "
        "engine serves only those.",
    )


def named(checkpoint: Checkpoint) -> str:
    kind = checkpoint.model_type
    return f"{checkpoint.architecture} ({kind})" if checkpoint.config.get("architectures") else repr(kind)


@cache
def registered_types() -> str:
    """Return the text of transformers' lists of architectures; empty where it is not installed.

    Importing them costs seconds, and what looks at sources carries no model library.
    """
    return _auto_text("configuration_auto.py") + _auto_text("auto_mappings.py")


@cache
def text_to_text_types() -> str:
    """Return the text of transformers' list of encoder-decoders from text to text; empty as above."""
    found = re.search(rf"^{TEXT_TO_TEXT} = .*?^\)", _auto_text("modeling_auto.py"), re.MULTILINE | re.DOTALL)
    return found.group() if found else ""


def _auto_text(name: str) -> str:
    library = find_spec("transformers")
    if library is None or library.origin is None:
        return ""
    file = Path(library.origin).parent / "models" / "auto" / name
    return file.read_text() if file.is_file() else ""


def _check_encoder_decoder(checkpoint: Checkpoint) -> None:
    if checkpoint.task != "generate":
        raise SourceError(
            UNSUPPORTED, f"{named(checkpoint)} is an encoder-decoder, which is served to generate text alone."
        )
    known = text_to_text_types()
    if known and f'"{checkpoint.model_type}"' not in known:
        raise not_causal(checkpoint)
    if checkpoint.model_type in TWO_MODELS:
        raise SourceError(
            UNSUPPORTED,
            f"{named(checkpoint)} joins two models of other architectures; this engine serves "
            "encoder-decoders that are one architecture.",
        )
    if checkpoint.quantization == "gptq":
        raise SourceError(
            UNSUPPORTED,
            f"{named(checkpoint)} is an encoder-decoder, which no GPTQ kernel computes: take the checkpoint "
            "that is not quantized.",
        )


def _check_padding(checkpoint: Checkpoint) -> None:
    """Refuse a token that no embedding can be made with."""
    pad, known = checkpoint.config.get("pad_token_id"), checkpoint.config.get("vocab_size")
    if isinstance(pad, int) and isinstance(known, int) and pad >= known:
        raise SourceError(
            "SourceFormat",
            f"{checkpoint.path / 'config.json'}: pad_token_id is {pad}, but vocab_size is {known}: name a "
            "token that the model has, or leave it out.",
        )


def _check_method(checkpoint: Checkpoint) -> None:
    method = checkpoint.quantization
    if method not in ("none", "gptq"):
        where = ", ".join(checkpoint.quantizations)
        raise SourceError(
            UNSUPPORTED,
            f"The checkpoint is quantized with {method} ({where}); this engine serves GPTQ only: take the "
            "model's GPTQ version or the one that is not quantized.",
        )


def _check_plain(checkpoint: Checkpoint) -> None:
    file = checkpoint.weight_files[0]
    if file != SINGLE and not any(name.endswith(INDEX_ENDING) for name in checkpoint.files):
        raise FilesMissing(
            "SourceFormat", f"{checkpoint.path} holds its weights as {file}: rename it to {SINGLE}."
        )
    for name, tensor in checkpoint.tensors.items():
        is_code = name.endswith(".weight") and tensor.kind.startswith(("I", "U"))
        if is_code or name.endswith((".qweight", *SCALES)):
            raise SourceError(
                "SourceFormat",
                f"{tensor.file} holds {name} ({tensor.kind}), so its weights are quantized, but neither "
                "config.json (quantization_config) nor a quantize_config.json says how: copy that too.",
            )

"""Facts about a checkpoint, and what it takes of memory once loaded. Pure: sizing and engine share them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from tidegate.sources.states import recurrent_layers

PRECISIONS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # by the type's name in safetensors
PRECISION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED_PRECISIONS = ("float16", "bfloat16")  # that kernels compute in with packed weights
WEIGHTS_OVERHEAD = 1.05  # buffers and fragments that loading leaves beside the tensors
# Beside weights and KV cache on a GPU: the CUDA context, its libraries, and the activations of one step.
CUDA_RUNTIME_BYTES = 1 << 30
CONTEXT_SLACK = 64  # columns of the KV cache beside a request's own tokens
PREFIX_SHARE = 8  # what prompts begin with is kept in one part for so many of the requests that run
# What architectures call the same thing in config.json, the usual name first.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
# The decoder's of an encoder-decoder, whose usual names are the encoder's.
DECODER_LAYERS, DECODER_HEADS = ("decoder_layers", "num_decoder_layers"), ("decoder_attention_heads",)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
# Of latent attention, whose keys and values are computed anew from these, and of the index of a sparse one.
LATENT = ("kv_lora_rank", "qk_rope_head_dim", "index_head_dim")
HEAD_DIM = ("attention_head_dim", "head_dim", "d_kv")
HIDDEN = ("hidden_size", "n_embd", "d_model")
# The rotary scalings that stretch the positions trained by a factor, and where they name these.
SCALINGS, TRAINED, MOST_FACTOR = ("linear", "dynamic", "yarn"), "original_max_position_embeddings", 1 << 16
# The parts of composites that hold their decoder, as transformers finds it.
DECODERS = ("text_config", "thinker_config", "decoder", "generator")
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "max_decoder_position_embeddings",
)
# Positions that are distances (T5): any length has them, whatever was trained.
DISTANCES, ANY_LENGTH = "relative_attention_num_buckets", 1 << 20

# Classes without a head to choose tokens with, by their heads' names, and those without any head: what is
# below makes vectors.
BARE_HEADS, BARE = ("ForMaskedLM", "ForPreTraining"), re.compile("(?!.*For[A-Z]).*Model")
LANGUAGE_HEADS = ("LMHeadModel", "DoubleHeadsModel", "MTModel")
JUDGING_HEAD = "ForSequenceClassification"


class DecoderShape(msgspec.Struct, frozen=True):
    """A decoder's size as its config gives it. 0: not said. JSON in the records of the host."""

    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    vocab: int = 0
    positions: int = 0  # the longest context that the checkpoint was trained for
    longest: int = 0  # the longest that its positions cover, where that is more
    has_encoder: bool = False  # that reads the prompt: its tokens are cached beside the answer's
    without_kv: int = 0  # of its layers: those without keys and values, which recurrent ones are
    state: int = 0  # numbers that its recurrent layers keep of a request, however long it is
    latent: int = 0  # numbers that a layer keeps of a token, where it keeps no keys and values of heads

    @property
    def is_known(self) -> bool:
        """Tell whether the KV cache can be computed."""
        numbers = self.latent or self.kv_heads * self.head_dim
        return self.kv_layers == 0 < self.layers or self.kv_layers > 0 < numbers

    @property
    def kv_layers(self) -> int:
        return self.layers - self.without_kv


class StoredWeights(msgspec.Struct, frozen=True):
    """The tensors of a checkpoint: `float_values` numbers are loaded in the precision that is computed in,
    `fixed_bytes` stay as they are stored. Where these are packed, they are `packed_values` numbers, and no
    kernel computes with them in float32. JSON in the records of the host."""

    float_values: int = 0
    fixed_bytes: int = 0
    packed_values: int = 0

    @property
    def is_known(self) -> bool:
        return self.float_values > 0 or self.fixed_bytes > 0

    def loaded_bytes(self, precision: str) -> int:
        if self.packed_values and precision not in PACKED_PRECISIONS:
            return self.unpacked_bytes(precision)
        return self.float_values * PRECISION_BYTES[precision] + self.fixed_bytes

    def unpacked_bytes(self, precision: str) -> int:
        return (self.float_values + self.packed_values) * PRECISION_BYTES[precision]


class Resolved(msgspec.Struct, frozen=True):
    """The answer about a source. `files` maps names to sizes in bytes, `weights_bytes` are those of the
    weight files, `digest` names what is loaded (`Checkpoint.digest`). `commit` is the hub's or the bucket's,
    empty for a folder. `precision` is what `precision: auto` computes in."""

    path: str
    quantization: str  # none | gptq | the method's own name
    precision: str
    weights_bytes: int
    uri: str = ""
    commit: str = ""
    architecture: str = ""
    digest: str = ""
    files: dict[str, int] = {}
    shape: DecoderShape = DecoderShape()
    weights: StoredWeights = StoredWeights()
    task: str = "generate"


def task_of(config: Mapping[str, Any], has_modules: bool) -> str:
    """Return what a checkpoint is for, by its architectures and by whether it has sentence-transformers'
    modules: generate, embed, score (a number for a text or a pair of them) or classify (a share for each of
    its labels). One that names no architecture generates."""
    heads = [str(name) for name in config.get("architectures") or []]
    if any(head.endswith(JUDGING_HEAD) for head in heads):
        return "score" if label_count(config) == 1 else "classify"
    is_bare = bool(heads) and all(
        head.endswith(BARE_HEADS) or (BARE.fullmatch(head) and not head.endswith(LANGUAGE_HEADS))
        for head in heads
    )
    return "embed" if has_modules or is_bare else "generate"


def label_count(config: Mapping[str, Any]) -> int:
    """Return how many labels a classifying head has; transformers' own number is two."""
    labels, count = config.get("id2label"), config.get("num_labels")
    return len(labels) if isinstance(labels, Mapping) else count if isinstance(count, int) else 2


def auto_precision(config: Mapping[str, Any], values: Mapping[str, int]) -> str:
    """Return the precision that `precision: auto` computes in: the config's dtype, or else the float type
    that most values are stored in. `values` counts them by stored type.

    The engine hands the result to the library that loads, which converts every float to it. transformers' own
    "auto" asks the config first as well, but then takes the type of whichever tensor comes first.
    """
    for part in (config, text_config(config)):
        named = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if named in PRECISION_BYTES:
            return named
    stored = {PRECISIONS[kind]: count for kind, count in values.items() if kind in PRECISIONS}
    return max(stored, key=stored.__getitem__) if stored else "float32"


def decoder_shape(config: Mapping[str, Any]) -> DecoderShape:
    text = text_config(config)
    heads, hidden = _first(text, (*DECODER_HEADS, *HEADS)), _first(text, HIDDEN)
    kv_heads = _first(text, KV_HEADS) or heads
    if text.get("new_decoder_architecture"):
        kv_heads = heads  # falcon's later models share heads, but transformers caches them repeated
    elif text.get("multi_query"):
        kv_heads = 1
    layers, without_kv, state = recurrent_layers(text, _first(text, (*DECODER_LAYERS, *LAYERS)))
    return DecoderShape(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=_first(text, HEAD_DIM) or (hidden // heads if heads else 0),
        hidden=hidden,
        vocab=_first(text, ("vocab_size",)),
        positions=_first(text, POSITIONS),
        longest=ANY_LENGTH if text.get(DISTANCES) else _scaled_positions(text),
        has_encoder=has_encoder(config),
        without_kv=without_kv,
        state=state,
        latent=sum(_first(text, (name,)) for name in LATENT) if _first(text, LATENT[:1]) else 0,
    )


def contradiction(
    shape: DecoderShape,
    quantization: str,
    *,
    asked_context: int,
    asked_quantization: str,
    task: str = "",
    asked_task: str = "",
) -> str:
    """Say what a spec asks of a checkpoint that it cannot give; empty where it can. `quantization` and `task`
    are the checkpoint's, and "" where nobody knows it; `asked_task` is "" or auto where none is asked for."""
    longest = max(shape.positions, shape.longest)
    if longest and asked_context > longest:
        found = f"the checkpoint holds {longest} positions"
        return f"contextLength is {asked_context}, but {found}: ask for at most that."
    if asked_quantization not in ("auto", quantization or asked_quantization):
        what = "is not quantized" if quantization == "none" else "is quantized with GPTQ"
        return f"quantization is {asked_quantization}, but the checkpoint {what}: leave it out."
    # Vectors can be made with any model, and a head of one label is also one of labels.
    fits = ("", "auto", "embed", task, *(("classify",) if task == "score" else ()))
    if task and asked_task not in fits:
        return f"task is {asked_task}, but the checkpoint is made to {task}: leave it out."
    return ""


def kv_bytes_per_token(shape: DecoderShape, precision: str) -> int:
    """Return what one token's keys and values take: 2 x its layers x KV heads x head size numbers, or what is
    kept in their place. An encoder-decoder takes as much for a token of the prompt as for one of the answer,
    and its context is as long on each side: so twice that for a token of context."""
    sides = 2 if shape.has_encoder else 1
    numbers = shape.latent or 2 * shape.kv_heads * shape.head_dim
    return sides * shape.kv_layers * numbers * PRECISION_BYTES[precision]


def state_bytes(shape: DecoderShape) -> int:
    """Return what recurrent layers keep of one request at most: some sum in float32 in any precision."""
    return shape.state * PRECISION_BYTES["float32"]


def has_encoder(config: Mapping[str, Any]) -> bool:
    """Tell an encoder-decoder, by what its config says."""
    return bool(config.get("is_encoder_decoder"))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the decoder, where a model has others beside it. It may lie
    in a part of a part."""
    inner = next((config[name] for name in DECODERS if isinstance(config.get(name), Mapping)), None)
    return config if inner is None else text_config(inner)


def _scaled_positions(config: Mapping[str, Any]) -> int:
    """Return what the rotary scaling makes of the positions that were trained; 0: no more than these."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, Mapping) or (scaling.get("rope_type") or scaling.get("type")) not in SCALINGS:
        return 0
    factor, trained = (
        scaling.get("factor"),
        _first(scaling, (TRAINED,)) or _first(config, (TRAINED, *POSITIONS)),
    )
    return int(factor * trained) if isinstance(factor, (int, float)) and 1 < factor <= MOST_FACTOR else 0


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = (config.get(name) for name in names)
    return next((each for each in found if isinstance(each, int) and each > 0), 0)

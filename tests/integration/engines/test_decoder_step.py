"""The short form of a decoding step: which models have it, and that it is their own step; packed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import HEADS, HIDDEN, LLAMA, save_model
from tidegate.engines.transformers import decoder_step, packed, probe, selfcheck
from tidegate.engines.transformers.batch import ArenaBatch
from tidegate.engines.transformers.decoder_parts import PlainProducts, Rotary, rotary
from tidegate.engines.transformers.decoder_step import (
    FEWEST_PRODUCTS,
    DecoderStep,
    of_same_inputs,
    read_decoder,
)
from tidegate.engines.transformers.head import InParts
from tidegate.engines.transformers.int4 import Int4Linear
from tidegate.engines.transformers.int4_tiles import TiledInt4Linear, has_tiles
from tidegate.engines.transformers.kv_size import measure_kv
from tidegate.engines.transformers.packed import (
    FbgemmLinear,
    OneDnnLinear,
    PackedLinear,
    PackedPart,
    Together,
    WidenedLinear,
    has_product,
    joint,
    pack_linears,
)

QWEN3 = {**LLAMA, "head_dim": HIDDEN // HEADS}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
READ: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "biased": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", QWEN3),
    "experts": ("qwen3_moe", {**QWEN3, **EXPERTS}),
}


def model_of(folder: Path, kind: str, size: Mapping[str, Any], dtype: torch.dtype) -> Any:
    save_model(folder, kind, size)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def batches(model: Any) -> tuple[ArenaBatch, ArenaBatch]:
    """The same arena twice: with the step, and with the model's own forward pass."""
    step = read_decoder(model)
    assert step is not None
    layers = measure_kv(model).layers
    return tuple(  # type: ignore[return-value]
        ArenaBatch(model, layers=layers, max_rows=64, max_length=256, pad_id=0, makes_masks=True, step=each)
        for each in (step, None)
    )


def with_products(batch: ArenaBatch, has_products: bool) -> None:
    """Attend by batched products, whatever the processor is best at."""
    assert isinstance(batch._step, decoder_step.DecoderStep)
    batch._step._has_products, batch._step._is_native = has_products, False


def hold_in_4_bits(model: Any, kind: type[Int4Linear] = Int4Linear) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, module in [*model.model.layers.named_modules()]:
        if type(module) is torch.nn.Linear:
            groups = torch.arange(module.in_features) // 32
            codes = torch.randint(16, module.weight.T.shape, generator=generator, dtype=torch.uint8)
            scales = torch.rand(len(groups) // 32, module.out_features, generator=generator) / 50
            layer = kind(module)
            zeros = torch.randint(7, 10, scales.shape, generator=generator, dtype=torch.uint8)
            layer.hold(codes, zeros, scales, groups.flip(0))
            model.model.layers.set_submodule(name, layer)


def logits_of(batch: ArenaBatch, rows: int, length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    prompts = torch.randint(3, 500, (rows, length)).tolist()
    found = [batch.join([prompt[index % 3 :] for index, prompt in enumerate(prompts)])]
    for _ in range(4):
        found.append(batch.decode(torch.randint(3, 500, (rows,))))
    batch.leave(0)
    if rows > 1:
        found.append(batch.decode(torch.randint(3, 500, (rows - 1,))))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_rows_of_other_lengths_are_attended_to_apart(
    dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_step, "MOST_UNUSED", 40)
    monkeypatch.setattr(decoder_step, "FEWEST_PRODUCTS", 30_000)  # both forms of attention
    short, own = batches(model_of(tmp_path, "llama", LLAMA, dtype))
    with_products(short, dtype == torch.bfloat16)
    prompts = [[5 + at] * length for at, length in enumerate((9, 12, 150, 40, 200, 7, 8))]
    runs = []
    for batch in (short, own):
        found = [batch.join([prompt]) for prompt in prompts]
        found += [batch.decode(torch.arange(7)) for _ in range(3)]
        batch.leave(2)
        runs.append([*found, batch.decode(torch.arange(6))])
    assert len(short._arena.windows(40)) == 4
    for one, other in zip(*runs, strict=True):
        for found_row, expected in zip(one, other, strict=True):
            assert probe.relative_error(found_row, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_short_prompts_and_parts_take_the_step(
    dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_step, "MOST_OF_A_STEP", 60)
    monkeypatch.setattr(decoder_step, "FEWEST_PRODUCTS", 30_000)  # both forms of attention
    short, own = batches(model_of(tmp_path, "llama", LLAMA, dtype))
    with_products(short, dtype == torch.bfloat16)
    taken = prefilled(monkeypatch)
    parts = [3, 61, 1, 56]
    prompt = [3 + 7 * at % 500 for at in range(sum(parts))]
    runs = []
    for batch in (short, own):
        found, staged = [batch.join([[5] * 9, [7] * 40])], batch.begin(prompt)
        for part in parts:
            logits = batch.advance(staged, part)
            found.append(batch.decode(torch.tensor([8, 9, 10][: batch.count])))
        assert logits is not None
        found += [logits, batch.join([[5] * 9, [6] * 20, [7] * 3]), batch.join([[4] * 61])]
        found += [batch.decode(torch.arange(7)) for _ in range(2)]
        runs.append(found)
    assert taken == [(1, 3), (1, 1), (1, 56), (3, 20)]
    for one, other in zip(*runs, strict=True):
        for found_row, expected in zip(one, other, strict=True):
            assert probe.relative_error(found_row, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_a_part_is_computed_with_the_rows_that_decode(
    dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one pass, where the step takes it; the rest by one for each."""
    monkeypatch.setattr(decoder_step, "MOST_OF_A_STEP", 60)
    monkeypatch.setattr(decoder_step, "FEWEST_PRODUCTS", 30_000)  # both forms of attention
    short, own = batches(model_of(tmp_path, "llama", LLAMA, dtype))
    with_products(short, dtype == torch.bfloat16)
    passes = blocks_of(monkeypatch)
    parts = [3, 57, 58, 1, 40, 1]
    prompt = [3 + 7 * at % 500 for at in range(sum(parts))]
    runs = []
    for batch in (short, own):
        found, staged = [batch.join([[5] * 9, [7] * 40]), batch.join([[4] * 150])], batch.begin(prompt)
        for part in parts:
            found.append(batch.decode_beside(torch.tensor([8, 9, 10]), staged, part))
            logits = batch.advance(staged, part)
            assert (logits is not None) == (staged.held == len(prompt))
        assert logits is not None
        runs.append([*found, logits, *(batch.decode(torch.arange(4)) for _ in range(2))])
    beside = [[(3, 1), (1, 3)], [(3, 1), (1, 57)], [(3, 1)], [(1, 58)], [(3, 1), (1, 1)], [(3, 1), (1, 40)]]
    assert passes == [*beside, [(3, 1), (1, 1)], [(4, 1)], [(4, 1)]]
    for one, other in zip(*runs, strict=True):
        for found_row, expected in zip(one, other, strict=True):
            assert probe.relative_error(found_row, expected) < tolerance


def blocks_of(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Rows and tokens of each of all blocks that a pass computes, from now on."""
    passes: list[list[tuple[int, int]]] = []
    compute = DecoderStep.compute

    def noted(self: DecoderStep, *given: Any) -> torch.Tensor:
        passes.append([(block.last - block.first, block.width) for block in given[-1]])
        return compute(self, *given)

    monkeypatch.setattr(DecoderStep, "compute", noted)
    return passes


def test_what_a_step_cannot_tell_or_hold_is_prefilled_by_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of a prompt; scores that are too many; the first tokens of all, which make the arena."""
    (batch, _) = batches(model_of(tmp_path, "llama", LLAMA, torch.float32))
    taken = prefilled(monkeypatch)
    prompt = [3 + at for at in range(40)]

    def ends(**more: Any) -> torch.Tensor:
        staged = batch.begin(prompt, **more)
        assert batch.advance(staged, 30) is None
        logits = batch.advance(staged, 10)
        assert logits is not None
        batch.leave(0)
        return logits

    first = ends()
    assert taken == [(1, 10)]
    every: list[torch.Tensor] = []
    all_of_them = ends(every=InParts(16, every.append))
    assert (taken, len(torch.cat(every))) == ([(1, 10)], 40)
    again = ends()
    assert taken[1:] == [(1, 30), (1, 10)]
    monkeypatch.setattr(decoder_step, "MOST_SCORES", HEADS * 10 * 40 - 1)
    within = ends()
    assert len(taken) == 3
    for logits in (all_of_them, again, within):
        torch.testing.assert_close(logits[-1:], first, atol=1e-4, rtol=1e-4)


def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of all that the step prefills, from now on."""
    taken: list[tuple[int, ...]] = []
    prefill = DecoderStep.prefill

    def noted(self: DecoderStep, tokens: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        taken.append(tuple(tokens.shape))
        return prefill(self, tokens, *given, **more)

    monkeypatch.setattr(DecoderStep, "prefill", noted)
    return taken


@pytest.mark.parametrize("name", sorted(READ))
def test_a_step_gives_the_models_own_logits(name: str, tmp_path: Path) -> None:
    short, own = batches(model_of(tmp_path, *READ[name], torch.float32))
    for found, expected in zip(logits_of(short, 5, 9), logits_of(own, 5, 9), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "length"), [(1, 9), (16, 40)])
def test_attention_by_batched_products_is_as_near_as_the_models_own(
    rows: int, length: int, tmp_path: Path
) -> None:
    """Both round in bfloat16; what they round is the model's in float32."""
    assert (rows * 8 * 64 * length >= FEWEST_PRODUCTS) == (rows > 1)  # one case for each kind of attention
    kind, size = READ["llama"]
    wide = {**size, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    exact = logits_of(batches(model_of(tmp_path, kind, wide, torch.float32))[1], rows, length)
    short, own = batches(model_of(tmp_path, kind, wide, torch.bfloat16))
    with_products(short, True)
    errors = [
        [
            probe.relative_error(found, true)
            for found, true in zip(logits_of(batch, rows, length), exact, strict=True)
        ]
        for batch in (short, own)
    ]
    assert max(errors[0]) < 1.5 * max(errors[1])


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        # The same modules, and a factor beside them.
        ("granite", {**LLAMA, "residual_multiplier": 0.5, "attention_multiplier": 0.1}),
        ("gemma", {**LLAMA, "head_dim": HIDDEN // HEADS}),
    ],
)
def test_a_model_with_more_than_its_modules_say_runs_its_own_step(
    kind: str, size: Mapping[str, Any], tmp_path: Path
) -> None:
    model = model_of(tmp_path, kind, size, torch.float32)
    assert read_decoder(model) is not None
    assert proved_batch(model)._step is None


@pytest.mark.parametrize("name", sorted(READ))
def test_the_self_check_takes_the_step(name: str, tmp_path: Path) -> None:
    assert proved_batch(model_of(tmp_path, *READ[name], torch.float32))._step is not None


def proved_batch(model: Any) -> ArenaBatch:
    rows = [
        [3 + (7 * row + token) % 400 for token in range(length)] for row, length in enumerate((9, 30, 14, 21))
    ]
    layers = measure_kv(model).layers
    for makes_masks, has_step in selfcheck.ways_of_batching(model, has_states=False):
        step = read_decoder(model) if has_step else None
        batch = ArenaBatch(
            model, layers=layers, max_rows=4, max_length=256, pad_id=0, makes_masks=makes_masks, step=step
        )
        if probe.check(probe.Plain(model, rows), batch, "float32").is_right:
            return batch
    raise AssertionError("no way of batching is right")


SCALED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}


@pytest.mark.parametrize(
    ("kind", "size", "is_read"),
    [
        ("olmo", LLAMA, True),
        ("olmo", {**LLAMA, "clip_qkv": 8.0}, False),
        ("olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, False),
        ("ministral3", {**LLAMA, "head_dim": HIDDEN // HEADS, "rope_parameters": SCALED}, False),
    ],
)
def test_what_no_prompt_of_a_check_may_meet_is_left_to_the_model(
    kind: str, size: Mapping[str, Any], is_read: bool, tmp_path: Path
) -> None:
    """Caps on numbers, factors of far positions; and norms over all heads together."""
    assert (read_decoder(model_of(tmp_path, kind, size, torch.float32)) is not None) == is_read


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3"])
def test_other_modules_are_left_to_the_model(kind: str, tmp_path: Path) -> None:
    from tests.checkpoints import DECODERS

    assert read_decoder(model_of(tmp_path, *DECODERS[kind], torch.float32)) is None


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_packed_layers_compute_the_same_and_a_tied_head_stays(
    is_tied: bool, is_together: bool, has_biases: bool, tmp_path: Path
) -> None:
    size = {"tie_word_embeddings": is_tied, "attention_bias": has_biases, "mlp_bias": has_biases}
    model = model_of(tmp_path, "llama", {**LLAMA, **size}, torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    with torch.inference_mode():
        before = model(ids).logits
        count = pack_linears(model, of_same_inputs(model) if is_together else ())
        after = model(ids).logits
    is_widened = is_tied and not has_product(torch.bfloat16)
    assert count == 2 * 7 + (not is_tied or is_widened)
    assert isinstance(model.lm_head, PackedLinear) != is_tied
    assert isinstance(model.lm_head, WidenedLinear) == is_widened
    assert isinstance(model.model.layers[0].self_attn.k_proj, PackedPart) == is_together
    # What is next to nothing beside the others, float16 holds less exactly.
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, weight, atol=2**-24, rtol=0.0)
    assert probe.relative_error(after, before) < 0.01


def test_layers_packed_together_answer_for_the_inputs_they_get() -> None:
    """Whatever comes between: other inputs, one layer twice, one never asked."""
    torch.manual_seed(0)
    plain = [torch.nn.Linear(16, size, dtype=torch.bfloat16) for size in (8, 24, 8)]
    model = torch.nn.ModuleList(copy.deepcopy(plain))
    alone = copy.deepcopy(model)
    pack_linears(model, [[*model]])
    pack_linears(alone)
    first, second = torch.randn(2, 3, 16).bfloat16()
    with torch.inference_mode():
        for index, inputs in [
            *((0, first), (1, first), (2, first)),
            *((0, first), (0, first), (1, second), (1, first), (2, second), (2, first)),
            *((2, second), (0, second)),
        ]:
            assert torch.equal(model[index](inputs), alone[index](inputs))
        for index in (1, 0, 2):
            model[index](first)
    first_part = model[0]
    assert isinstance(first_part, PackedPart)
    assert first_part.together._inputs is None, "inputs are let go with the last part"
    assert joint(*model) is first_part.whole
    assert joint(*[model[index] for index in (1, 0, 2)]) is None
    assert joint(model[0], model[1]) is None
    model[1].register_forward_hook(lambda *_: None)
    assert joint(*model) is None, "a hook has to see its layer"


@pytest.mark.parametrize("name", ["llama", "biased", "qwen3"])
def test_the_step_computes_joint_layers_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path, *READ[name], torch.bfloat16)
    pack_linears(model, of_same_inputs(model))
    short, own = batches(model)
    for found, expected in zip(logits_of(short, 5, 9), logits_of(own, 5, 9), strict=True):
        assert probe.relative_error(found, expected) < 0.02
    asked: list[int] = []
    part = Together.part

    def noted(self: Together, index: int, inputs: torch.Tensor) -> torch.Tensor:
        asked.append(index)
        return part(self, index, inputs)

    monkeypatch.setattr(Together, "part", noted)
    short.decode(torch.full((4,), 5))
    assert asked == []


def test_layers_in_float32_stay_as_they_are(tmp_path: Path) -> None:
    assert pack_linears(model_of(tmp_path, "llama", LLAMA, torch.float32)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_processor_without_the_type_multiplies_in_float32(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "has_product", lambda _: False)
    torch.manual_seed(0)
    model: Any = torch.nn.ModuleDict({"all": torch.nn.Linear(96, 40, dtype=dtype)})
    exact = copy.deepcopy(model["all"]).float()
    weight = model["all"].weight.detach().clone()
    shared: Any = torch.nn.ModuleDict(
        {"read": copy.deepcopy(model["all"]), "written": torch.nn.Embedding(40, 96)}
    )
    shared["written"].weight = shared["read"].weight
    monkeypatch.setattr(packed.widened_product, "__defaults__", (96 * 16, 3))  # blocks of 16 outputs
    monkeypatch.setattr(packed, "PART", 96 * 24)  # outputs that are packed as one
    inputs = torch.randn(2, rows, 96).to(dtype)
    with torch.inference_mode():
        assert pack_linears(model) == pack_linears(shared) == 1
        assert isinstance(model["all"], FbgemmLinear)
        assert isinstance(shared["read"], WidenedLinear)
        assert shared["read"].weight is shared["written"].weight
        for layer in (model["all"], shared["read"]):
            found = layer(inputs)
            assert found.dtype == dtype
            assert probe.relative_error(found, exact(inputs.float())) < torch.finfo(dtype).eps
        # Who asks for a weight gets it, and the same memory ever after; what was packed is gone.
        kept = model["all"].weight
        torch.testing.assert_close(kept, weight, atol=2**-24, rtol=0.0)
        assert model["all"].weight is kept
        assert not hasattr(model["all"], "packed")
        found = model["all"](inputs)
        assert probe.relative_error(found, exact(inputs.float())) < torch.finfo(dtype).eps


@pytest.mark.parametrize("largest", [1e5, 2**-15, float("nan")])
def test_weights_that_float16_cannot_hold_stay(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "has_product", lambda _: False)
    model: Any = torch.nn.Sequential(torch.nn.Linear(16, 8, dtype=torch.bfloat16))
    torch.nn.init.constant_(model[0].weight, 0.5)
    with torch.no_grad():
        model[0].weight[3] = 0.0  # holds well
        model[0].weight[5, 1:], model[0].weight[5, 0] = 0.0, largest
    assert pack_linears(model) == 0
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize("has_products", [False, True, None])
@pytest.mark.parametrize("layers", ["fbgemm", "onednn", "int4", "tiles"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", ["llama", "biased", "qwen2", "qwen3"])
def test_a_compiled_step_gives_the_same_bits(
    name: str,
    width: int,
    layers: str,
    has_products: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With layers and attention of every kind: oneDNN computes in float32 on every processor. Without a word
    on products attention is the operator's, where the processor has what it takes."""
    monkeypatch.setattr(decoder_step, "MOST_UNUSED", 8)
    monkeypatch.setattr(decoder_step, "FEWEST_PRODUCTS", 1)
    is_one_dnn = layers == "onednn"
    monkeypatch.setattr(packed, "has_product", lambda _: is_one_dnn)
    monkeypatch.setattr(OneDnnLinear, "takes", staticmethod(lambda _: is_one_dnn))
    monkeypatch.setattr(packed, "_is_alike", lambda *_: True)
    kind, size = READ[name]
    size = {**size, "tie_word_embeddings": name == "qwen2"}
    model = model_of(tmp_path, kind, size, torch.float32 if is_one_dnn else torch.bfloat16)
    if layers == "int4":
        hold_in_4_bits(model)
    if layers == "tiles":
        if not has_tiles():
            pytest.skip("the processor has no tiles for bfloat16")
        hold_in_4_bits(model, TiledInt4Linear)
    assert pack_linears(model, of_same_inputs(model))
    runs = []
    for is_compiled in (True, False):
        short, _ = batches(model)
        step = short._step
        assert isinstance(step, decoder_step.DecoderStep)
        assert step.compiled is not None
        if has_products is not None:
            with_products(short, has_products)
        if not is_compiled:
            step.__dict__["compiled"] = None
        found = [short.join([[5 + at] * length for at, length in enumerate((9, 12, 30))])]
        for _ in range(3):
            found.append(short.decode(torch.arange(5, 8)))
            found.append(short.run([[5 + at] * width for at in range(3)], [width, 1, width], last=width))
        runs.append(found)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_a_step_that_does_not_compile_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise RuntimeError("no TorchScript in this version")

    monkeypatch.setattr(torch.jit, "script", gone)
    model = model_of(tmp_path, *READ["llama"], torch.float32)
    batch = proved_batch(model)
    assert isinstance(batch._step, decoder_step.DecoderStep)
    assert batch._step.compiled is None


@pytest.mark.parametrize("name", ["llama", "llama-gptq"])
def test_a_loaded_model_decodes_by_the_compiled_step(name: str, load: Callable[..., Any]) -> None:
    """Whatever looks at a model on the way: who asks for a packed weight makes it plain, which no step is
    compiled of."""
    step = load(name, precision="bfloat16")._batch._step
    assert isinstance(step, DecoderStep)
    assert step.compiled is not None
    assert not isinstance(step._body.head, PlainProducts)


@pytest.mark.parametrize(
    ("rope", "is_static"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, True),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, True),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, True),
        ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, False),
    ],
)
def test_positions_that_depend_on_what_runs_are_left_to_the_model(
    rope: Mapping[str, Any], is_static: bool, tmp_path: Path
) -> None:
    short, own = batches(model_of(tmp_path, "llama", {**LLAMA, "rope_parameters": rope}, torch.float32))
    assert isinstance(short._step, decoder_step.DecoderStep)
    assert (short._step.compiled is not None) == is_static
    for found, expected in zip(logits_of(short, 5, 9), logits_of(own, 5, 9), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "is_alike"), [(torch.float32, True), (torch.bfloat16, False)])
def test_positions_in_another_precision_are_the_models_own(
    dtype: torch.dtype, is_alike: bool, tmp_path: Path
) -> None:
    """OLMo turns in float32, whatever its weights are."""
    model = model_of(tmp_path, "olmo", LLAMA, dtype)
    assert isinstance(rotary(model.model.rotary_emb, dtype), Rotary) == is_alike
    short, own = batches(model)
    for found, expected in zip(logits_of(short, 3, 9), logits_of(own, 3, 9), strict=True):
        assert probe.relative_error(found, expected) < 2e-2

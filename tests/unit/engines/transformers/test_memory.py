from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.memory import (
    CPU_MOST_BYTES,
    GIB,
    Budget,
    check_weights_fit,
    free_host_bytes,
    gib,
    kv_budget,
    runtime_bytes,
    torch_share,
    usable_cores,
    within_cap,
)
from tidegate.sources.facts import PREFIX_SHARE

sizes = st.integers(1, 1 << 40)


@given(sizes, sizes, st.integers(0, 1 << 34), st.integers(0, 256), st.sampled_from(["cpu", "cuda"]))
def test_the_cache_stays_within_its_budget(
    free: int, row: int, asked: int, max_slots: int, device: str
) -> None:
    try:
        budget = kv_budget(
            free_bytes=free,
            device=device,
            kv_cache_bytes=asked,
            share=0,
            bytes_per_row=row,
            least_bytes=(row + 7) // 8,
            max_slots=max_slots,
        )
    except EngineLoadError as error:
        assert error.reason == "OutOfMemory"
        assert row > min(asked or free, free) * 0.25 or row > CPU_MOST_BYTES
        return
    assert 1 <= budget.slots <= (max_slots or 256)
    assert row <= budget.bytes <= free
    assert budget.slots * ((row + 7) // 8) <= budget.bytes <= (max_slots or 256) * row
    if asked:
        assert budget.bytes <= asked
    elif device == "cpu":
        assert budget.bytes <= CPU_MOST_BYTES


@given(
    sizes,
    st.integers(1, 1 << 30),
    st.integers(0, 256),
    st.sampled_from(["cpu", "cuda"]),
    st.integers(0, 1 << 30),
)
def test_what_prompts_begin_with_is_kept_within_the_budget(
    free: int, row: int, max_slots: int, device: str, asked: int
) -> None:
    def budget(*, keeps_prefixes: bool) -> Budget:
        return kv_budget(
            free_bytes=free,
            device=device,
            kv_cache_bytes=0,
            share=0.5,
            bytes_per_row=row,
            least_bytes=row,
            max_slots=max_slots,
            keeps_prefixes=keeps_prefixes,
            prefix_bytes=asked,
        )

    try:
        whole, kept = budget(keeps_prefixes=False), budget(keeps_prefixes=True)
    except EngineLoadError as error:
        assert row + asked > free // 2
        assert ("prefix_cache_bytes" in error.message) == bool(asked) or row > free // 2
        return
    assert whole.prefix_bytes == 0
    assert kept.bytes + kept.prefix_bytes <= free // 2
    assert kept.prefix_bytes == asked if asked else kept.prefix_bytes <= free // 18
    if not asked:
        assert kept.slots >= whole.slots - whole.slots // 9 - 1


@given(st.integers(1, 1 << 40), st.integers(1, 256))
def test_slots_that_memory_was_sized_for_are_there(row: int, slots: int) -> None:
    sized = slots * (row + -(-row // PREFIX_SHARE))  # as `control.sizing` does
    found = kv_budget(
        free_bytes=sized,
        device="cuda",
        kv_cache_bytes=0,
        share=1.0,
        bytes_per_row=row,
        least_bytes=row,
        max_slots=slots,
        keeps_prefixes=True,
    )
    assert (found.slots, found.bytes) == (slots, slots * row)
    assert sized // 10 <= found.prefix_bytes <= sized - slots * row


def test_a_row_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(EngineLoadError, match=r"needs 4\.00 GiB, but the cache may take 1\.00 GiB on cpu"):
        kv_budget(
            free_bytes=8 * GIB,
            device="cpu",
            kv_cache_bytes=GIB,
            share=0,
            bytes_per_row=4 * GIB,
            least_bytes=GIB,
            max_slots=0,
        )


def test_a_long_context_does_not_make_slots_few() -> None:
    found = kv_budget(
        free_bytes=96 * GIB,
        device="cuda",
        kv_cache_bytes=0,
        share=1.0,
        bytes_per_row=16 * GIB,  # 128k tokens of an 8B model
        least_bytes=GIB // 25,
        max_slots=0,
        keeps_prefixes=True,
    )
    assert found.slots == 256
    assert found.bytes + found.prefix_bytes == 96 * GIB


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    check_weights_fit(GIB, 2 * GIB, "cpu")
    with pytest.raises(EngineLoadError, match=r"need 10\.50 GiB of memory on cuda, but 8\.00 GiB") as caught:
        check_weights_fit(10 * GIB, 8 * GIB, "cuda")
    assert caught.value.reason == "OutOfMemory"


@given(sizes, st.integers(0, 1 << 40), sizes, st.sampled_from(["cpu", "cuda"]))
def test_a_cap_holds_for_weights_and_cache_together(free: int, cap: int, weights: int, device: str) -> None:
    left = within_cap(free, cap, weights, device)
    assert 0 <= left <= free
    if not cap:
        assert left == free
    elif left:
        assert left + weights + runtime_bytes(device) <= cap


@given(st.integers(0, 1 << 40), sizes)
def test_torch_gets_a_part_of_the_gpu_that_leaves_room_for_its_context(cap: int, total: int) -> None:
    share = torch_share(cap, total)
    assert 0 <= share <= 1
    if 0 < share < 1:
        assert share * total < cap


def test_this_machine_has_memory_and_cores() -> None:
    assert free_host_bytes() > 1 << 20
    assert usable_cores() >= 1


def test_sizes_for_people() -> None:
    assert (gib(3 * GIB), gib(1 << 20)) == ("3.00 GiB", "1.0 MiB")

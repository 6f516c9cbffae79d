"""Probes: asked through a real engine and its thread, before a replica takes requests."""

from __future__ import annotations

import asyncio
from typing import Any

from tidegate.engines.base import EngineLoadError
from tidegate.engines.simulated import SimulatedEngine
from tidegate.replica_args import EngineSpec, Probe
from tidegate.serving.engine_thread import Crash, Delivery, EngineThread
from tidegate.serving.probing import Probing


async def asked(*probes: Probe, timeout_seconds: float = 20.0, **args: Any) -> str:
    """Why the engine's answers are not good enough; empty: they are."""
    spec = EngineSpec("simulated", args={"words": ["yes"], "step_ms": 0.0, **args}, max_slots=1)
    engine = SimulatedEngine(spec)
    probings: list[Probing] = []

    def deliver(delivery: Delivery) -> None:
        probings[0].take(delivery.outputs)

    def fail(crash: Crash) -> None:
        raise AssertionError(crash.message)

    thread = EngineThread(engine, deliver, fail)
    await thread.start()
    try:
        probings.append(Probing(engine, thread.hand_over))
        await probings[0].run(probes, timeout_seconds)
    except EngineLoadError as error:
        assert error.reason == "ProbeFailed"
        return error.message
    finally:
        await thread.close(5.0)
    return ""


async def test_what_is_expected_passes() -> None:
    chat = [{"role": "user", "content": "Well?"}]
    assert not await asked(
        Probe(prompt="Well?", expect="yes"),
        Probe(messages=chat, pattern="^(yes ?){2}$", max_tokens=2),
        Probe(prompt="Again?", expect="yes"),
    )


async def test_the_first_other_answer_fails_with_both() -> None:
    said = await asked(Probe(prompt="Well?", expect="yes"), Probe(prompt="Sure?", expect="no", max_tokens=1))
    assert said == "Probe 2 ('Sure?') expected the text 'no' and got 'yes'."
    said = await asked(Probe(prompt="Well?", pattern="^no", max_tokens=1))
    assert said == "Probe 1 ('Well?') expected the pattern '^no' and got 'yes'."


async def test_a_long_answer_is_cut() -> None:
    said = await asked(Probe(prompt="q" * 500, expect="no", max_tokens=500))
    assert len(said) < 600
    assert "..." in said


async def test_an_error_is_an_answer_that_fails() -> None:
    said = await asked(Probe(prompt="break", expect="yes"), test_fault={"marker": "break", "kind": "error"})
    assert said.startswith("Probe 1 ('break') failed: ")


async def test_a_prompt_that_cannot_run_fails() -> None:
    said = await asked(Probe(prompt="word " * 20_000, expect="yes"))
    assert "failed: ContextLengthExceeded" in said


async def test_no_answer_in_time_fails() -> None:
    said = await asked(Probe(prompt="Well?", expect="yes"), timeout_seconds=0.0)
    assert said == "The probes were not answered within 0 seconds."


async def test_what_is_not_a_probes_is_left_alone() -> None:
    probing = Probing(SimulatedEngine(EngineSpec("simulated")), lambda *_: 0)
    probing.take([])
    await asyncio.wait_for(probing.run([], 1.0), 5.0)

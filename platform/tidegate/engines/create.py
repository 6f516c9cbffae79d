"""Makes the engine that a spec names. Imports an engine's libraries only when it is asked for."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import get_args

from tidegate.engines.base import Engine, EngineLoadError
from tidegate.replica_args import EngineName, EngineSpec


def create_engine(spec: EngineSpec, record: Path | None = None) -> Engine:
    """Make an engine, not loaded yet; in the file `record` it may remember what its self-check finds. Raises
    `EngineLoadError` (InvalidEngineArgs) for an unknown name."""
    if spec.name == "simulated":
        from tidegate.engines.simulated import SimulatedEngine

        return SimulatedEngine(spec)
    if spec.name == "transformers":
        sleep_while_waiting()
        if (task := spec.task or "generate") != "generate":
            from tidegate.engines.transformers.encoder import EncoderEngine

            return EncoderEngine(spec, task)
        from tidegate.engines.transformers.engine import TransformersEngine

        return TransformersEngine(spec, record)
    if spec.name == "vllm":
        sleep_while_waiting()
        from tidegate.engines.vllm.engine import VllmEngine

        return VllmEngine(spec)
    raise EngineLoadError(
        "InvalidEngineArgs", f"no engine {spec.name!r}; known: {', '.join(get_args(EngineName))}."
    )


def begin_ahead() -> None:
    """Do what the engines of this process will need, before one is asked for. No device is touched."""
    sleep_while_waiting()
    with suppress(ImportError):  # an extra that is not installed
        from tidegate.engines.transformers import encoder, engine  # noqa: F401
        from tidegate.engines.transformers.prompt_pool import start_ahead

        start_ahead()


def sleep_while_waiting() -> None:
    """Let OpenMP's idle threads sleep soon. Read once, when torch is first imported.

    Without a bound a team spins for a thread that has no core: beside two busy processes on 2 cores a step of
    7 ms took 506. Without any spin it is woken for each operation, which costs more than it gains (ADR 3).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # a quarter of a millisecond

"""Makes the engine that a spec names. Imports an engine's libraries only when it is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

from tidegate.engines.base import Engine, EngineLoadError
from tidegate.errors import SourceError
from tidegate.replica_args import EngineName, EngineSpec
from tidegate.sources.checkpoint import read_description


def create_engine(spec: EngineSpec) -> Engine:
    """Make an engine, not loaded yet. Raises `EngineLoadError` (InvalidEngineArgs) for an unknown name."""
    if spec.name == "simulated":
        from tidegate.engines.simulated import SimulatedEngine

        return SimulatedEngine(spec)
    if spec.name == "transformers":
        sleep_while_waiting()
        if (task := spec.task or checkpoint_task(spec.path)) != "generate":
            from tidegate.engines.transformers.encoder import EncoderEngine

            return EncoderEngine(spec, task)
        from tidegate.engines.transformers.engine import TransformersEngine

        return TransformersEngine(spec)
    raise EngineLoadError(
        "InvalidEngineArgs", f"no engine {spec.name!r}; known: {', '.join(get_args(EngineName))}."
    )


def checkpoint_task(path: str) -> str:
    """Return what a checkpoint is for; of one that cannot be read the engine says why."""
    try:
        return read_description(Path(path), path).task
    except SourceError:
        return "generate"


def sleep_while_waiting() -> None:
    """Let OpenMP's idle threads sleep instead of spin. Read once, when torch is first imported.

    Beside other busy processes a spinning team waits for a thread that has no core: measured on 2 busy
    cores, a step of a small model took 115 ms with spinning and 3 ms without.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

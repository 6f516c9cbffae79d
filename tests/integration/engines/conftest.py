"""Tiny checkpoints, each made once per session, and engines on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import as_auto_gptq, quantized, tiny
from tests.prompt_processes import forked_beginners
from tidegate.engines.base import Engine
from tidegate.engines.create import create_engine
from tidegate.engines.transformers import prompt_pool
from tidegate.replica_args import EngineSpec

Checkpoints = Callable[[str], Path]

HERE = Path(__file__).parent
# Those whose children have so many seconds to answer: not where they get only what others leave.
WAITING = {"test_vllm", "test_prompts", "test_grammars", "test_threads"}


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path.stem not in WAITING:
            item.add_marker(pytest.mark.computing)


@pytest.fixture(scope="session", autouse=True)
def prompt_processes_are_forked() -> Iterator[None]:
    with forked_beginners() as forked, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_pool, "Beginner", forked)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The folder of `arch`, `arch-gptq` (4-bit) or `arch-auto-gptq` (the same in auto-gptq's form)."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / name
            arch, _, form = name.partition("-")
            if form == "gptq":
                made[name] = quantized(folder, make(arch))
            elif form == "auto-gptq":
                made[name] = as_auto_gptq(folder, make(f"{arch}-gptq"))
            else:
                made[name] = tiny(folder, arch)
        return made[name]

    return make


@pytest.fixture
def load(checkpoints: Checkpoints) -> Iterator[Callable[..., Engine]]:
    """Load an engine on a named checkpoint or a folder; closed after the test."""
    engines: list[Engine] = []

    def make(checkpoint: str | Path, **spec: Any) -> Engine:
        path = checkpoints(checkpoint) if isinstance(checkpoint, str) else checkpoint
        args = {"threads": 1, **spec.pop("args", {})}
        wanted = {"precision": "float32", "device": "cpu", **spec}
        engine = create_engine(EngineSpec("transformers", path=str(path), args=args, **wanted))
        engines.append(engine)
        engine.load()
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def llama(checkpoints: Checkpoints) -> Iterator[Engine]:
    """One float32 llama for the tests that leave it empty again."""
    spec = EngineSpec(
        "transformers",
        path=str(checkpoints("llama")),
        precision="float32",
        device="cpu",
        args={"threads": 1},
    )
    engine = create_engine(spec)
    engine.load()
    yield engine
    engine.close()

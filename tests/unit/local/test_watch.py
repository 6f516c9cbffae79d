"""Followed files: what is valid is taken in, what is not leaves what ran."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.waiting import await_until
from tidegate.control.resource_files import ResourceFile, read_files
from tidegate.errors import ConfigError
from tidegate.local import watch
from tidegate.local.watch import ResourceFiles

MODEL = """\
apiVersion: tidegate.dev/v1alpha1
kind: Model
metadata: {{name: {name}}}
spec: {{engine: {{name: simulated}}, precision: {precision}}}
"""


def put(folder: Path, name: str, precision: str = "auto") -> Path:
    """As editors save: a reader never sees half of it."""
    path = folder / f"{name}.yaml"
    half = path.with_suffix(".half")
    half.write_text(MODEL.format(name=name, precision=precision), encoding="utf-8")
    return half.replace(path)


def precisions(files: ResourceFiles) -> list[str]:
    return [model.spec.precision for model in files.resources.models]


def names(files: ResourceFiles) -> list[str]:
    return [model.name for model in files.resources.models]


@asynccontextmanager
async def followed(*paths: Path) -> AsyncIterator[ResourceFiles]:
    stop = asyncio.Event()
    files = ResourceFiles(paths, lambda: None)
    files.load()
    task = asyncio.create_task(files.follow(stop))
    yield files
    stop.set()
    await task


async def test_adding_changing_and_removing(tmp_path: Path) -> None:
    put(tmp_path, "a")
    async with followed(tmp_path) as files:
        # The watch may not stand yet: the write is repeated until it is seen.
        await await_until(lambda: put(tmp_path, "b").exists() and names(files) == ["a", "b"])
        put(tmp_path, "b", "float32")
        await await_until(lambda: precisions(files) == ["auto", "float32"])
        (tmp_path / "a.yaml").unlink()
        await await_until(lambda: names(files) == ["b"])
        assert files.problems == ()


async def test_an_invalid_file_is_refused_and_what_ran_goes_on(tmp_path: Path) -> None:
    put(tmp_path, "a")
    async with followed(tmp_path) as files:
        await await_until(lambda: put(tmp_path, "a", "fp16").exists() and bool(files.problems))
        assert names(files) == ["a"]
        assert precisions(files) == ["auto"]
        assert "spec.precision: 'fp16': use 'auto'" in str(files.problems[0])
        put(tmp_path, "a", "bfloat16")
        await await_until(lambda: not files.problems)
        assert precisions(files) == ["bfloat16"]


@pytest.mark.parametrize("is_removed", [False, True], ids=["emptied", "removed"])
async def test_a_file_caught_while_it_is_written_takes_no_model_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    path = put(tmp_path, "a")
    seen: list[list[str]] = []
    files = ResourceFiles([tmp_path], lambda: seen.append(names(files)))
    files.load()
    halves: list[Path] = []

    def read_then_write(paths: Sequence[Path]) -> Sequence[ResourceFile]:
        found = read_files(paths)
        if not path.exists() or not path.read_bytes():
            halves.append(put(tmp_path, "a", "float32"))
        return found

    def written() -> bool:
        if not halves:  # the watch may not stand yet
            path.write_bytes(b"")
            if is_removed:
                path.unlink()
        return precisions(files) == ["float32"]

    monkeypatch.setattr(watch, "read_files", read_then_write)
    stop = asyncio.Event()
    following = asyncio.create_task(files.follow(stop))
    await await_until(written)
    stop.set()
    await following
    assert halves
    assert set(map(tuple, seen)) == {("a",)}


async def test_an_invalid_file_hides_no_other(tmp_path: Path) -> None:
    put(tmp_path, "a")
    async with followed(tmp_path) as files:
        await await_until(lambda: put(tmp_path, "bad", "fp16").exists() and bool(files.problems))
        put(tmp_path, "c")
        await await_until(lambda: names(files) == ["a", "c"])
        assert len(files.problems) == 1


async def test_a_single_file_that_is_replaced_and_removed(tmp_path: Path) -> None:
    path = put(tmp_path, "a")
    async with followed(path) as files:
        fresh = tmp_path / "fresh"

        def replaced() -> bool:
            fresh.write_text(MODEL.format(name="b", precision="auto"), encoding="utf-8")
            fresh.replace(path)  # as editors save
            return names(files) == ["b"]

        await await_until(replaced)
        path.unlink()
        await await_until(lambda: names(files) == [])
        assert "no such file" in str(files.problems[0])


def test_the_first_reading_stops_the_start(tmp_path: Path) -> None:
    put(tmp_path, "a", "fp16")
    with pytest.raises(ConfigError, match=r"spec\.precision"):
        ResourceFiles([tmp_path], lambda: None).load()

"""The resource files of a host: read at start, followed from then on.

A file that becomes invalid is refused whole: what it defined before stays, and its problems are told until
it is right again. A file that is gone takes its models with it. Many programs empty or remove a file before
they write it, so a model is believed gone only when a second look finds the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import watchfiles

from tidegate.control.resource_files import (
    SUFFIXES,
    ResourceFile,
    ResourceSet,
    combine,
    config_error,
    read_files,
)
from tidegate.control.resources import DEFAULT_POOL, PoolSpec
from tidegate.errors import FieldProblem

log = logging.getLogger(__name__)

DEBOUNCE_MS = 100
RETRY_SECONDS = 1.0
SETTLE_SECONDS = 0.3  # between the two looks where a model is gone


class ResourceFiles:
    """`changed` is called after each change that was taken in or refused."""

    def __init__(self, paths: Sequence[Path], changed: Callable[[], None]) -> None:
        self._paths = [path.resolve() for path in paths]
        self._changed = changed
        self._valid: dict[Path, ResourceFile] = {}
        self.resources = ResourceSet()
        self.problems: tuple[FieldProblem, ...] = ()

    def load(self) -> None:
        """The first reading. Raises `ConfigError` with every problem."""
        self._take(read_files(self._paths))
        if self.problems:
            raise config_error(self.problems)

    @property
    def pool(self) -> PoolSpec:
        """The bounds of this machine's one pool."""
        pools = {pool.name: pool.spec for pool in self.resources.pools}
        return pools.get(DEFAULT_POOL, PoolSpec())

    async def follow(self, stop: asyncio.Event) -> None:
        """Until `stop`: read again whenever something happens in the folders of the paths. Nothing that lies
        there ends it: what is unforeseen is logged, and the watch begins anew."""
        while not stop.is_set():
            try:
                await self._follow(stop)
            except Exception:
                log.exception("files: the watch begins anew")
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), RETRY_SECONDS)

    async def _follow(self, stop: asyncio.Event) -> None:
        folders = _folders(self._paths)
        async for _ in watchfiles.awatch(
            *folders,
            watch_filter=lambda _change, path: Path(path).suffix in SUFFIXES,
            debounce=DEBOUNCE_MS,
            step=50,
            stop_event=stop,
            recursive=False,
        ):
            before = (self.resources, self.problems)
            self._take(await self._settled())
            if (self.resources, self.problems) != before:
                self._changed()

    async def _settled(self) -> Sequence[ResourceFile]:
        files = await asyncio.to_thread(read_files, self._paths)
        while self._loses_models(files):
            await asyncio.sleep(SETTLE_SECONDS)
            again = await asyncio.to_thread(read_files, self._paths)
            if again == files:
                break
            files = again
        return files

    def _loses_models(self, files: Sequence[ResourceFile]) -> bool:
        held = [self._valid.get(file.path, file) if file.problems else file for file in files]
        names = {model.name for file in held if _exists(file.path) for model in file.models}
        return any(model.name not in names for model in self.resources.models)

    def _take(self, files: Sequence[ResourceFile]) -> None:
        standing: list[ResourceFile] = []
        problems: list[FieldProblem] = []
        for file in files:
            if not file.problems:
                standing.append(file)
                continue
            problems += file.problems
            kept = self._valid.get(file.path)
            if kept is not None and _exists(file.path):
                standing.append(kept)
        self._valid = {file.path: file for file in standing}
        self.resources, duplicates = combine(standing)
        if (found := (*problems, *duplicates)) != self.problems:
            for problem in found:
                log.error("refused: %s", problem)
        self.problems = found


# Unlike pathlib's, os.path's questions have an answer also where a folder above is locked.
def _folders(paths: Sequence[Path]) -> set[Path]:
    return {path if os.path.isdir(path) else path.parent for path in paths}  # noqa: PTH112


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110

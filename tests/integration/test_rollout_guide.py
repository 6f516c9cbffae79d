"""The guide on rollouts, followed on a laptop's platform of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.rollout_guide import GuideSteps, Host, Traffic, file_of_guide
from tidegate.local.ray_cluster import free_port

pytestmark = [pytest.mark.serial, pytest.mark.timeout(600)]


@dataclass(frozen=True, kw_only=True)
class Laptop(Host):
    file: Path

    def apply(self, text: str) -> None:
        self.file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    folder = tmp_path_factory.mktemp("guide")
    environment = {"TIDEGATE_HOME": str(folder / "home"), "TIDEGATE_PORT": str(free_port())}
    laptop = Laptop(environment=environment, file=folder / "writer.yaml")
    laptop.apply(file_of_guide())
    laptop.run("up", "-f", str(laptop.file))
    yield laptop
    laptop.run("clean", "--yes")


@pytest.fixture(scope="module")
def traffic(host: Laptop) -> Iterator[Traffic]:
    key = host.run("keys", "create", "traffic").strip()
    with Traffic(f"http://127.0.0.1:{host.environment['TIDEGATE_PORT']}", key).running() as traffic:
        yield traffic


class TestGuide(GuideSteps):
    pass

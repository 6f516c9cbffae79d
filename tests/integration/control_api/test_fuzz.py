"""Requests made from the control API's OpenAPI document: whatever comes, the answer is one that it names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from tests.contract.hosts.rigs import LaptopRig, rounds
from tests.control_api import ADMIN, FixedUsage, MemoryKeys
from tests.fuzzing import unfit_checks
from tests.in_thread import in_thread
from tidegate.control_api.app import ControlApp, Services
from tidegate.control_api.server import serving
from tidegate.gateway.listen import listen, url
from tidegate.local.audit_file import AuditFile

EXAMPLES = 12  # per operation
ALL = list(HealthCheck)
MODEL = "one"
SERVING_ROUNDS = 12


@asynccontextmanager
async def serving_laptop(folder: Path) -> AsyncIterator[str]:
    """The address of the control API of a laptop with one model."""
    rig = LaptopRig(folder)
    rig.model(MODEL)
    await rounds(rig, SERVING_ROUNDS)
    keys = MemoryKeys()
    services = Services(rig.host, keys, keys, FixedUsage(), AuditFile(folder / "audit.jsonl"))
    sockets = listen("127.0.0.1", 0)
    async with serving(ControlApp(services), sockets):
        yield url(sockets[0])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with in_thread(serving_laptop(tmp_path_factory.mktemp("control"))) as address:
        yield address


def document() -> dict[str, Any]:
    """The document, with the one model that exists in place of any name."""
    found = ControlApp(Services(None, None, None, None, None)).openapi()  # type: ignore[arg-type]
    for operations in found["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "name":
                    parameter["schema"] = {"const": MODEL}
    return found


CASES = [
    (method, path, mode)
    for path, operations in document()["paths"].items()
    for method, operation in operations.items()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # Operations that take no input have nothing to get wrong.
    if mode is GenerationMode.POSITIVE or "requestBody" in operation
]


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")  # schemathesis does
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_answer_is_a_documented_one(address: str, method: str, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_dict(document())[path][method.upper()]
    statuses: list[int] = []

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=ALL
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        response = case.call_and_validate(
            base_url=address,
            headers={"authorization": f"Bearer {ADMIN}"},
            # It repeats the call "without" the key, but with these headers; the unit tests cover keys. And
            # what a spec or a name may say is more than a schema tells.
            excluded_checks=[ignored_auth, positive_data_acceptance, *unfit_checks(case)],
        )
        statuses.append(response.status_code)

    fuzz()
    assert statuses
    assert max(statuses) < 500
    assert httpx.get(f"{address}/healthz").status_code == 200

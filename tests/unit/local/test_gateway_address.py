"""Where the host asks its gateway, by the address that the gateway listens on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.local.gateway import GatewayProcess, check_port
from tidegate.local.home import Home
from tidegate.settings import Settings

HOSTS = {
    "127.0.0.1": "127.0.0.1",
    "localhost": "localhost",
    "0.0.0.0": "127.0.0.1",
    "::": "127.0.0.1",
    "::1": "[::1]",
    "[::1]": "[::1]",
}


@pytest.mark.parametrize(("host", "shown"), HOSTS.items())
def test_the_address_of_a_free_port(tmp_path: Path, host: str, shown: str) -> None:
    gateway = GatewayProcess(Settings(host=host, port=0), Home(tmp_path), "redis://localhost:1")
    before, _, port = gateway.url.rpartition(":")
    assert before == f"http://{shown}"
    check_port(Settings(host=host, port=int(port)))

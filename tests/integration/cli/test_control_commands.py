"""`keys` and `models` against a real control API."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.integration.cli.command import assert_refused, tidegate
from tests.integration.cli.control_api import ControlApi
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys


@pytest.fixture
def environment(api: ControlApi) -> dict[str, str]:
    return api.environment


@pytest.fixture
async def keys(connection: Connection, key_prefix: str) -> Keys:
    return Keys(connection, key_prefix=key_prefix)


async def test_a_secret_is_shown_once_and_opens_the_gateway(environment: dict[str, str], keys: Keys) -> None:
    created = tidegate("keys", "create", "alice", "--tenant", "blue", environment=environment)
    assert created.returncode == 0
    secret = created.stdout.strip()
    await keys.start()
    found = keys.find(secret)
    await keys.close()
    assert found is not None
    assert (found.name, found.tenant) == ("alice", "blue")
    listed = tidegate("keys", "list", environment=environment)
    assert secret not in listed.stdout
    assert "alice" in listed.stdout


async def test_a_revoked_key_no_longer_opens(environment: dict[str, str], keys: Keys) -> None:
    created = json.loads(tidegate("keys", "create", "ci", "-o", "json", environment=environment).stdout)
    revoked = tidegate("keys", "revoke", created["id"], environment=environment)
    assert revoked.returncode == 0
    await keys.start()
    assert keys.find(created["secret"]) is None
    await keys.close()
    (listed,) = json.loads(tidegate("keys", "list", "-o", "json", environment=environment).stdout)
    assert listed["revoked"] is not None


def test_revoking_an_unknown_key_is_refused(environment: dict[str, str]) -> None:
    assert_refused(tidegate("keys", "revoke", "key_none", environment=environment), "key_none")


def test_no_keys_say_so_on_stderr(environment: dict[str, str]) -> None:
    listed = tidegate("keys", "list", environment=environment)
    assert (listed.returncode, listed.stdout) == (0, "")
    assert "keys create" in listed.stderr


def test_models_show_what_the_platform_knows(environment: dict[str, str]) -> None:
    shown = tidegate("models", environment=environment)
    title, line = shown.stdout.splitlines()
    assert (
        title == "NAME   TASK              FORMAT   SIZE      REPLICAS   WAITING   TOKENS/S   READY   REASON"
    )
    assert (
        line == "bold   text-generation   gptq     18.0 MB   1/2        0         52.5       yes     Serving"
    )
    (record,) = json.loads(tidegate("models", "-o", "json", environment=environment).stdout)
    assert (record["replicas"][0]["pid"], record["waiting"], record["tokens_per_second"]) == (4711, 0, 52.5)
    details = tidegate("models", "bold", environment=environment).stdout
    assert "CONDITION" in details
    assert "4711" in details


def test_an_unknown_model_is_refused(environment: dict[str, str]) -> None:
    assert_refused(tidegate("models", "none", environment=environment), "'none'", "there is")


def test_a_wrong_setting_is_named(environment: dict[str, str]) -> None:
    assert_refused(tidegate("models", environment=environment | {"TIDEGATE_PROT": "1"}), "TIDEGATE_PROT")


def test_a_control_api_that_is_away_is_one_sentence() -> None:
    away = {"TIDEGATE_ADMIN_URL": "http://127.0.0.1:1"}
    assert_refused(tidegate("models", environment=away), "127.0.0.1:1", "tidegate status")


def test_an_inference_key_opens_nothing(environment: dict[str, str]) -> None:
    key = tidegate("keys", "create", "client", environment=environment).stdout.strip()
    own = environment | {"TIDEGATE_ADMIN_KEY": key}
    assert_refused(tidegate("models", environment=own), "inference", "--scope read")


def test_a_key_with_the_scope_read_looks_and_changes_nothing(environment: dict[str, str]) -> None:
    key = tidegate("keys", "create", "viewer", "--scope", "read", environment=environment).stdout.strip()
    own = environment | {"TIDEGATE_ADMIN_KEY": key}
    assert "read" in tidegate("keys", "list", environment=own).stdout
    assert_refused(tidegate("keys", "create", "more", environment=own), "--scope admin")


def test_an_address_that_is_no_control_api_says_so() -> None:
    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"object": "list", "data": []}')

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        shown = tidegate("models", environment={"TIDEGATE_ADMIN_URL": url})
        server.shutdown()
        thread.join()
    assert_refused(shown, url, "gateway")


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "ray", "redis", "fastapi", "httpx", "pydantic")
    script = (
        "import sys; from tidegate.cli import main; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

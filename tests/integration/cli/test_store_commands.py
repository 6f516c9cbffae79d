"""`keys` and `models` against a real Redis."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.cli.command import assert_refused, tidegate
from tidegate.messages.registry import Condition, ModelEntry, ReplicaStats
from tidegate.replica_args import Times
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys
from tidegate.store.registry import Registry


@pytest.fixture
def environment(redis_url: str, key_prefix: str) -> dict[str, str]:
    return {"REDIS_URL": redis_url, "TIDEGATE_KEY_PREFIX": key_prefix}


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
    assert_refused(tidegate("keys", "revoke", "key_none", environment=environment), "key_none", "keys list")


def test_no_keys_say_so_on_stderr(environment: dict[str, str]) -> None:
    listed = tidegate("keys", "list", environment=environment)
    assert (listed.returncode, listed.stdout) == (0, "")
    assert "keys create" in listed.stderr


async def test_models_show_what_the_registry_holds(
    environment: dict[str, str], connection: Connection, key_prefix: str
) -> None:
    # The replica stays listed however long the commands take.
    registry = Registry(connection, key_prefix=key_prefix, times=Times(beat_seconds=600))
    await registry.put_model(
        ModelEntry(
            name="bold",
            created=1,
            task="text-generation",
            engine="transformers",
            precision="bfloat16",
            quantization="gptq",
            revisions={"0123456789": 100},
            accepts=True,
            ready=True,
            reason="Serving",
            message="One replica serves.",
            replicas_ready=1,
            replicas_wanted=2,
            weights_bytes=18_000_000,
            conditions=[Condition("Ready", "True", "Serving", "One replica serves.")],
        )
    )
    stats = ReplicaStats("bold#1", "bold", "0123456789", 4711, "node", 0.0, 0.0, 8, 3, 100, 52.5)
    await registry.beat(stats)
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


def test_a_redis_that_is_away_is_one_sentence() -> None:
    assert_refused(tidegate("models", environment={"REDIS_URL": "redis://127.0.0.1:1"}), "127.0.0.1:1")


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "ray", "redis", "fastapi", "httpx", "pydantic")
    script = (
        "import sys; from tidegate.cli import main; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""The control API as it is served: real sockets, real Redis, and the keys that gateways read too."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.contract.hosts.rigs import DEFAULTS, LaptopRig
from tests.redis_server import RedisServer
from tests.waiting import await_until
from tidegate.control_api.app import ControlApp, Services
from tidegate.control_api.server import MAX_HEAD_BYTES, serving
from tidegate.control_api.sign_in import OwnKey
from tidegate.errors import ScopeMissing
from tidegate.gateway.auth import find_key
from tidegate.gateway.listen import listen, url
from tidegate.local.audit_file import AuditFile
from tidegate.local.ray_cluster import free_port
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys
from tidegate.store.usage import UsageReader
from tidegate_operator.control_api import serve_control_api
from tidegate_operator.settings import OperatorSettings

OWN = "own-" + "k" * 40


@dataclass(frozen=True)
class Served:
    rig: LaptopRig
    client: httpx.AsyncClient
    gateway: Keys  # as another process reads them
    address: str


@pytest.fixture
async def served(redis_url: str, key_prefix: str, tmp_path: Path) -> AsyncIterator[Served]:
    rig = LaptopRig(tmp_path)
    async with AsyncExitStack() as stack:
        one, two, connection = [await stack.enter_async_context(Connection(redis_url)) for _ in range(3)]
        keys, gateway = Keys(one, key_prefix=key_prefix), Keys(two, key_prefix=key_prefix)
        for each in (keys, gateway):
            await each.start()
            stack.push_async_callback(each.close)
        services = Services(
            rig.host,
            keys,
            OwnKey(OWN, "host", keys),
            UsageReader(connection, keys, key_prefix=key_prefix),
            AuditFile(tmp_path / "audit.jsonl"),
        )
        sockets = listen("127.0.0.1", 0)
        address = url(sockets[0])
        await stack.enter_async_context(serving(ControlApp(services), sockets))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=address, trust_env=False))
        client.headers["authorization"] = f"Bearer {OWN}"
        yield Served(rig, client, gateway, address)


async def test_keys_open_what_their_scopes_say_and_end_when_they_are_revoked(served: Served) -> None:
    made = {}
    for scope in ("inference", "read", "admin"):
        answer = await served.client.post("/v1/keys", json={"name": scope, "scopes": [scope]})
        assert answer.status_code == 201, answer.text
        made[scope] = answer.json()

    async def status(scope: str) -> int:
        headers = {"authorization": f"Bearer {made[scope]['secret']}"}
        return (await served.client.get("/v1/models", headers=headers)).status_code

    async def opens() -> bool:
        return await status("admin") == 200

    await await_until(opens)
    assert [await status(scope) for scope in made] == [403, 200, 200]
    await await_until(lambda: served.gateway.find(made["admin"]["secret"]))
    assert (
        find_key(f"Bearer {made['inference']['secret']}", served.gateway, no_auth=False).name == "inference"
    )
    for scope in ("read", "admin"):
        with pytest.raises(ScopeMissing):
            find_key(f"Bearer {made[scope]['secret']}", served.gateway, no_auth=False)
    await served.client.delete(f"/v1/keys/{made['admin']['key']['id']}")

    async def is_refused() -> bool:
        return await status("admin") == 401

    await await_until(is_refused)
    noted = (await served.client.get("/v1/audit")).json()["items"]
    assert [entry["what"] for entry in noted] == ["key revoke", *["key create"] * 3]
    assert {entry["who"] for entry in noted} == {"host"}
    assert (await served.client.get("/v1/usage")).json()["tenants"]["default"]["requests"] == 0


async def test_a_scale_reaches_the_control_loop_and_the_audit_log(served: Served) -> None:
    served.rig.model("one")
    answer = await served.client.post("/v1/models/one/scale", json={"max_replicas": 3})
    assert answer.json()["is_overlaid"]
    assert served.rig.changed.is_set()
    assert served.rig.asked.resources.models[0].spec.scaling.max_replicas == 3
    (noted,) = (await served.client.get("/v1/audit")).json()["items"]
    assert (noted["before"], noted["after"]) == (
        {"scaling": {"maxReplicas": 1}},
        {"scaling": {"maxReplicas": 3}},
    )


async def test_the_door_bounds_heads_and_says_how(served: Served) -> None:
    answer = await served.client.get("/v1/models", headers={"x-large": "x" * 2 * MAX_HEAD_BYTES})
    assert answer.status_code == 431
    assert answer.json()["error"]["message"].endswith("bytes. Send less.")


async def test_a_signal_is_still_the_processs_own(served: Served) -> None:
    """uvicorn takes no handler of the process that it is a part of."""
    before = signal.getsignal(signal.SIGTERM)
    assert (await served.client.get("/healthz")).status_code == 200
    assert signal.getsignal(signal.SIGTERM) is before


async def test_the_operator_answers_before_redis_does_and_knows_its_keys_after(
    own_redis: RedisServer, key_prefix: str, tmp_path: Path
) -> None:
    port, key_file = free_port("127.0.0.1"), tmp_path / "key"
    key_file.write_text(OWN)
    settings = OperatorSettings(
        redis_url=own_redis.url,
        key_prefix=key_prefix,
        ray_image=DEFAULTS.image,
        ray_version=DEFAULTS.ray_version,
        control_host="127.0.0.1",
        control_port=port,
        control_key_file=key_file,
        pod_namespace="default",
    )
    async with Connection(own_redis.url) as connection:
        _, secret = await Keys(connection, key_prefix=key_prefix).create("rita", scopes=["read"])
    own_redis.kill()
    redis = Connection(own_redis.url)
    address = f"http://127.0.0.1:{port}"
    async with (
        serve_control_api(settings, key_file, None, redis, None),  # type: ignore[arg-type]
        httpx.AsyncClient(base_url=address, trust_env=False) as client,
    ):
        assert (await client.get("/healthz")).status_code == 200
        own = {"authorization": f"Bearer {OWN}"}
        away = await client.get("/v1/audit", headers=own)
        assert away.status_code == 503
        assert "Redis" in away.json()["error"]["message"]
        own_redis.start()

        async def is_known() -> bool:  # asked too often meanwhile, it also waits for its turn
            headers = {"authorization": f"Bearer {secret}"}
            return (await client.get("/v1/audit", headers=headers)).status_code == 200

        await await_until(is_known, 20.0)
    await redis.close()

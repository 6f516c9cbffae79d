"""The app without a host: who may call what, bounds, keys, the audit log, the document."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from tests.control_api import ADMIN, INFERENCE, READ, Api, control_api
from tidegate.control_api.app import MAX_BODY_BYTES, ControlApp, Services
from tidegate.control_api.sign_in import FREE_FAILURES, OwnKey
from tidegate.control_api.views import ModelView, PlanView, PoolView
from tidegate.errors import Conflict, HostUnavailable
from tidegate.messages.rollouts import Action, RevisionView, RolloutView


class OneModel:
    """A host with one model, whose rollout the test says. `refusal` is the controller's of every action,
    `refuses` is raised by every write of a spec."""

    def __init__(self) -> None:
        self.rollout: RolloutView | None = None
        self.refusal = ""
        self.acted: list[Action] = []
        self.refuses: Exception | None = None
        self.spec: dict[str, Any] = {"scaling": {"minReplicas": 1, "maxReplicas": 1}}

    async def models(self) -> list[ModelView]:
        return [await self.model("one")]

    async def model(self, name: str) -> ModelView:
        return ModelView(name, "", "default", "7", self.spec, rollout=self.rollout)

    async def pools(self) -> list[PoolView]:
        return []

    async def revisions(self, name: str) -> list[RevisionView]:
        return []

    async def put_spec(
        self, name: str, spec: Mapping[str, Any], resource_version: str, author: str
    ) -> ModelView:
        if self.refuses is not None:
            raise self.refuses
        self.spec = dict(spec)
        return await self.model(name)

    async def act(self, name: str, action: Action) -> None:
        self.acted.append(action)

    async def drain(self, name: str, is_on: bool, author: str) -> ModelView:
        return await self.model(name)

    async def plan(
        self, name: str, *, spec: Mapping[str, Any] | None = None, action: Action | None = None
    ) -> PlanView:
        return PlanView(name, [], 1, 1, 0.0, 0.0, refusal=self.refusal)


@pytest.fixture
def host() -> OneModel:
    return OneModel()


@pytest.fixture
async def api(host: OneModel) -> AsyncIterator[Api]:
    async with control_api(host) as api:
        yield api


def rollout(phase: str) -> RolloutView:
    return RolloutView("one", "1", "Canary", phase, "old", "new", 15, 0, [])  # type: ignore[arg-type]


def calls() -> list[tuple[str, str]]:
    """Every route but the open ones."""
    app = ControlApp(Services(None, None, None, None, None))  # type: ignore[arg-type]
    document = app.openapi()
    return [
        (method.upper(), path.replace("{name}", "one").replace("{key_id}", "key_3"))
        for path, operations in document["paths"].items()
        for method in operations
        if path != "/healthz"
    ]


@pytest.mark.parametrize(("method", "path"), calls())
async def test_each_route_asks_for_its_scope(api: Api, method: str, path: str) -> None:
    anonymous = await api.client.request(method, path)
    assert anonymous.status_code == 401
    needed = "read" if method == "GET" else "admin"
    told = await api.refused(method, path, {}, key=INFERENCE, status=403)
    assert f"has the scopes inference and needs {needed}" in told
    headers = {"authorization": f"Bearer {READ}"}
    by_reader = (await api.client.request(method, path, headers=headers)).status_code
    assert by_reader == (200 if method == "GET" else 403)
    headers = {"authorization": f"Bearer {ADMIN}"}
    by_admin = (await api.client.request(method, path, headers=headers)).status_code
    assert by_admin not in (401, 403)


async def test_every_route_says_its_security_and_its_answers(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()
    known = set(document["components"]["schemas"])
    text = json.dumps(document)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= known
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert path == "/healthz" or operation["security"] == [{"bearer": []}]
            assert "422" not in operation["responses"]
    assert (await api.client.get("/healthz")).json() == {"status": "ok"}


async def test_an_address_that_fails_too_often_waits_and_others_do_not(host: OneModel) -> None:
    async with control_api(host) as api:
        for _ in range(FREE_FAILURES):
            await api.refused("GET", "/v1/models", key="tg-guess", status=401)
        answer = await api.client.get("/v1/models", headers={"authorization": f"Bearer {ADMIN}"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        transport = httpx.ASGITransport(app=api.client._transport.app, client=("10.0.0.2", 1))  # type: ignore[attr-defined]
        async with httpx.AsyncClient(transport=transport, base_url="http://control") as other:
            by_other = await other.get("/v1/models", headers={"authorization": f"Bearer {ADMIN}"})
            assert by_other.status_code == 200


async def test_the_hosts_own_key_is_an_admins_and_others_still_count() -> None:
    async with control_api(OneModel()) as api:
        ring = OwnKey("its-own-secret", "host", api.keys)
        own = ring.find("its-own-secret")
        assert own is not None
        assert (own.name, own.scopes) == ("host", ("admin",))
        assert ring.find(ADMIN) is api.keys.by_secret[ADMIN]
        assert ring.find("its-own-secre") is None


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"spec": {}}, "resource_version"),
        ({"spec": [], "resource_version": "1"}, "$.spec"),
        ({"spec": {}, "resource_version": "1", "other": 1}, "other"),
    ],
)
async def test_a_wrong_body_names_its_field(api: Api, body: Any, told: str) -> None:
    assert told in await api.refused("PUT", "/v1/models/one", body, status=400)


async def test_a_body_is_bounded(api: Api) -> None:
    body = {"spec": {"x": "y" * MAX_BODY_BYTES}, "resource_version": "1"}
    told = await api.refused("PUT", "/v1/models/one", body, status=413)
    assert f"more than {MAX_BODY_BYTES} bytes" in told


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "before=yesterday", "limit=1001"])
async def test_a_wrong_query_names_its_parameter(api: Api, query: str) -> None:
    told = await api.refused("GET", f"/v1/audit?{query}", status=400)
    assert told.startswith(query.partition("=")[0])


async def test_unknown_routes_and_methods_are_told(api: Api) -> None:
    assert "GET /openapi.json lists" in await api.refused("GET", "/v2", status=404)
    assert "is allowed" in await api.refused("DELETE", "/v1/models", status=405)


async def test_refusals_of_the_host_leave_no_trace(api: Api, host: OneModel) -> None:
    body = {"spec": {}, "resource_version": "1"}
    for refusal, status in ((Conflict("No."), 409), (HostUnavailable("Away."), 503), (OSError("x"), 500)):
        host.refuses = refusal
        told = await api.refused("PUT", "/v1/models/one", body, status=status)
        assert told == (str(refusal) if status != 500 else "The control API failed on this request.")
    assert api.audit.entries == []


async def test_an_audit_log_that_cannot_be_written_is_in_the_processs_log(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(api.audit, "append", fails)
    await api.call("POST", "/v1/models/one/scale", {"max_replicas": 2})
    line = next(record for record in caplog.records if record.name == "tidegate.audit")
    assert line.getMessage() == "anna: scale one"
    assert line.fields["after"] == {"scaling": {"maxReplicas": 2}}  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", ["pause", "resume", "promote", "abort"])
async def test_a_rollout_that_is_under_way_is_acted_on(api: Api, host: OneModel, verb: str) -> None:
    host.rollout = rollout("Progressing")
    await api.call("POST", "/v1/models/one/rollout", {"verb": verb}, status=202)
    assert host.acted == [Action(verb, "", "anna", 1000.0)]  # type: ignore[arg-type]
    shown = await api.call("GET", "/v1/models/one/rollout", key=READ)
    assert shown["rollout"]["target"] == "new"
    assert api.audit.entries[0].before["phase"] == "Progressing"


async def test_what_the_controller_refuses_is_refused_at_once(api: Api, host: OneModel) -> None:
    host.refusal = "retry was refused: revision new was not given up."
    assert await api.refused("POST", "/v1/models/one/rollout", {"verb": "retry"}, status=409) == host.refusal
    assert (host.acted, api.audit.entries) == ([], [])


async def test_keys_are_made_listed_and_revoked(api: Api) -> None:
    made = await api.call("POST", "/v1/keys", {"name": "ci", "scopes": ["read"]}, status=201)
    assert made["secret"] == "tg-ci"
    listed = (await api.call("GET", "/v1/keys", key=READ))["items"]
    assert made["key"] in listed
    assert "tg-ci" not in json.dumps(listed)
    assert (await api.call("GET", "/v1/models", key="tg-ci"))["items"]
    assert (await api.call("DELETE", f"/v1/keys/{made['key']['id']}"))["revoked"] == 5.0
    await api.refused("GET", "/v1/models", key="tg-ci", status=401)
    assert [entry.what for entry in api.audit.entries] == ["key create", "key revoke"]
    assert "tg-ci" not in json.dumps([entry.after for entry in api.audit.entries])
    assert "no key" in (await api.refused("DELETE", "/v1/keys/key_none", status=404)).lower()
    told = await api.refused("POST", "/v1/keys", {"name": "", "scopes": ["read"]}, status=400)
    assert "must not be empty" in told
    assert "scopes" in await api.refused("POST", "/v1/keys", {"name": "x", "scopes": ["root"]}, status=400)


async def test_the_audit_log_is_paged_newest_first(api: Api) -> None:
    for most in range(2, 7):
        await api.call("POST", "/v1/models/one/scale", {"max_replicas": most})
    seen, before = [], ""
    while True:
        page = await api.call("GET", f"/v1/audit?limit=2&before={before}", key=READ)
        seen += [entry["after"]["scaling"]["maxReplicas"] for entry in page["items"]]
        before = page["next"]
        if not before:
            break
    assert seen == [6, 5, 4, 3, 2]


async def test_usage_is_what_the_queues_hold(api: Api) -> None:
    held = (await api.call("GET", "/v1/usage", key=READ))["tenants"]["acme"]
    assert held == {"requests": 2, "request_bytes": 300, "generated_bytes": 4096}

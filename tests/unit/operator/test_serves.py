"""The token of each Ray cluster: where it is from, and when it is read again."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pytest

from tests.unit.operator.bodies import cluster_body, pod_body
from tidegate.control.observed import ServeState
from tidegate.serve_api import ServeUnauthorized
from tidegate_operator.cluster import ApiError, ApiGone
from tidegate_operator.kinds import Kind
from tidegate_operator.serves import Serves

CLUSTER = cluster_body("a")


def head(secret: str | None = "default-a", **fields: Any) -> dict[str, Any]:
    """As KubeRay makes it with `authOptions`, or an older Tidegate without."""
    reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
    env = [{"name": "RAY_AUTH_TOKEN", "valueFrom": reference}] if secret else [{"name": "RAY_AUTH_MODE"}]
    made = pod_body("h", {"ray.io/node-type": "head"})
    return {**made, "spec": {"containers": [{"name": "ray-head", "env": env}]}, **fields}


class World:
    """A Serve that takes one token, and the Secrets."""

    def __init__(self, taken: str = "one") -> None:
        self.taken = taken
        self.secrets: dict[str, dict[str, str]] = {"default-a": {"auth_token": "one"}}
        self.reads = 0
        self.refusal: ApiError | None = None
        self.open = 0
        self.serves = Serves(lambda service, namespace, cluster: cluster, self, self.connect)

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
        self.reads += 1
        assert kind == "Secret"
        if self.refusal is not None:
            raise self.refusal
        held = self.secrets[body["metadata"]["name"]]
        return {"data": {name: base64.b64encode(text.encode()).decode() for name, text in held.items()}}

    def connect(self, url: str, token: str) -> Serve:
        self.open += 1
        return Serve(self, token)

    async def answers(self, *pods: dict[str, Any]) -> str:
        """Empty where Serve says something."""
        return (await self.serves.view(CLUSTER, pods)).silence


class Serve:
    def __init__(self, world: World, token: str) -> None:
        self._world = world
        self._token = token

    async def get(self) -> ServeState:
        if self._token != self._world.taken:
            raise ServeUnauthorized("401")
        return ServeState()

    async def put(self, config: Mapping[str, Any]) -> None: ...

    async def close(self) -> None:
        self._world.open -= 1


async def test_the_token_is_read_once() -> None:
    world = World()
    assert [await world.answers(head()) for _ in range(3)] == ["", "", ""]
    assert (world.reads, world.open) == (1, 1)
    await world.serves.close()
    assert world.open == 0


async def test_a_head_without_a_token_is_asked_without() -> None:
    world = World(taken="")
    assert await world.answers(head(None)) == ""
    assert await world.answers() == ""
    assert world.reads == 0


async def test_a_head_that_is_away_for_a_moment_keeps_its_token() -> None:
    world = World()
    gone = head(metadata={"name": "h", "deletionTimestamp": "x", "labels": {"ray.io/node-type": "head"}})
    for pods in ([head()], [], [gone], [head()]):
        assert await world.answers(*pods) == ""
    assert world.reads == 1


async def test_another_token_is_read_after_the_first_was_refused() -> None:
    world = World()
    await world.answers(head())
    world.taken = world.secrets["default-a"]["auth_token"] = "two"
    assert await world.answers(head()) == "401"
    assert await world.answers(head()) == ""
    assert (world.reads, world.open) == (2, 1)


async def test_another_secret_is_read_at_once() -> None:
    world = World()
    await world.answers(head())
    world.secrets["mine"] = {"auth_token": "one"}
    assert await world.answers(head("mine")) == ""
    assert (world.reads, world.open) == (2, 1)


@pytest.mark.parametrize("refusal", [ApiGone("no such secret"), ApiError("forbidden")])
async def test_a_token_that_cannot_be_read_is_said(refusal: ApiError) -> None:
    world = World()
    world.refusal = refusal
    assert refusal.message in await world.answers(head())
    world.refusal = None
    world.secrets["default-a"] = {"other": "x"}
    assert "'auth_token'" in await world.answers(head())
    assert world.open == 0

"""The one client of Ray Serve's REST API (the Ray dashboard's `/api/serve/applications/`). No ray import.

A PUT replaces the whole set of applications; one schema error rejects it whole (HTTP 400, nothing changes).
Whoever calls `put` is the only writer of the Serve config and awaits each call before the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from tidegate.control.observed import ApplicationState, ReplicaState, ServeState
from tidegate.errors import TidegateError

PATH = "/api/serve/applications/"
MAX_ERROR_CHARACTERS = 4000


class ServeUnavailable(TidegateError):
    """The Ray dashboard or the Serve controller does not answer; trying again may help."""

    reason = "ServeUnavailable"


class ServeUnauthorized(ServeUnavailable):
    """The Ray dashboard does not take the token; another one may help."""


class ServeRejected(TidegateError):
    """Serve refused the config (HTTP 400). `message` is Serve's own text; nothing has changed."""

    reason = "ServeRejected"


class ServeApi:
    """`async with ServeApi(url) as api`. `token` is sent where Ray runs with RAY_AUTH_MODE=token."""

    def __init__(self, url: str, *, token: str = "", timeout_seconds: float = 30.0) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout_seconds, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self) -> ServeState:
        """Raises `ServeUnavailable`."""
        response = await self._send("GET")
        try:
            return parse_state(response.json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServeUnavailable(f"Ray's answer cannot be read: {error!r}.") from error

    async def put(self, config: Mapping[str, Any]) -> None:
        """Replace the whole config. Raises `ServeRejected` (Serve's text) or `ServeUnavailable`; after the
        latter it is unknown whether the config was taken."""
        await self._send("PUT", json=config)

    async def _send(self, method: str, json: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            response = await self._client.request(method, PATH, json=json)
        except httpx.HTTPError as error:
            raise ServeUnavailable(
                f"Ray Serve's API at {self._client.base_url} does not answer: {error!r}."
            ) from error
        text = response.text[:MAX_ERROR_CHARACTERS]
        if response.status_code == httpx.codes.BAD_REQUEST:
            raise ServeRejected(f"Ray Serve refused the config: {text}")
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ServeUnauthorized(f"Ray Serve's API refuses the token: {response.status_code}: {text}")
        if not response.is_success:
            raise ServeUnavailable(f"Ray Serve's API answered {response.status_code}: {text}")
        return response


def parse_state(body: Mapping[str, Any]) -> ServeState:
    """Read the body of a GET; fields that Tidegate does not use are left alone."""
    applications = {
        name: _application(name, details) for name, details in (body.get("applications") or {}).items()
    }
    return ServeState(str((body.get("controller_info") or {}).get("actor_id") or ""), applications)


def _application(name: str, details: Mapping[str, Any]) -> ApplicationState:
    deployments = (details.get("deployments") or {}).values()
    replicas = tuple(
        ReplicaState(
            replica=str(replica.get("replica_id", "")),
            state=str(replica.get("state", "")),
            pid=replica.get("pid"),
            node=str(replica.get("node_id") or ""),
        )
        for deployment in deployments
        for replica in deployment.get("replicas") or ()
    )
    return ApplicationState(
        name=name,
        status=str(details.get("status", "")),
        message=str(details.get("message") or ""),
        config=details.get("deployed_app_config"),
        wanted_replicas=sum(int(d.get("target_num_replicas") or 0) for d in deployments),
        replicas=replicas,
        deployment_message=" ".join(str(d["message"]) for d in deployments if d.get("message")),
    )


def is_applied(wanted: Mapping[str, Any], reported: Mapping[str, Any] | None) -> bool:
    """True where Serve's reported config of an application holds everything that `wanted` says. Serve may
    report defaults beside it, and numbers in another type."""
    return reported is not None and _covers(reported, wanted)


def _covers(reported: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(reported, Mapping) and all(
            (key in reported and _covers(reported[key], value)) or (key not in reported and value is None)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(reported, list)
            and len(reported) == len(wanted)
            and all(_covers(found, value) for found, value in zip(reported, wanted, strict=True))
        )
    return bool(reported == wanted)

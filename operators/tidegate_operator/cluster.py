"""`Cluster` makes all Kubernetes calls of the operator (the Lease of `leader` aside).

Plain JSON in and out: the client's 700 model classes would double the operator's memory and drop fields that
they do not know. Every write is counted by kind, because "nothing changed, nothing written" is a promise.

One field manager owns what is applied. Objects that others write into as well (finalizers of a Model, worker
groups of a RayCluster) are patched, and a patch names the version that it was decided on, so that two
decisions never mix: the later one is refused and decided anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTResponse

from tidegate.errors import TidegateError
from tidegate_operator.kinds import RESOURCES, Kind

FIELD_MANAGER = "tidegate-operator"
TIMEOUT_SECONDS = 15.0
PAGE = 200  # objects per answer of a listing
WATCH_SECONDS = (300, 600)  # the API server is asked to end a watch after a time between these
# A watch on which nothing comes for so long is dead: bookmarks come every minute, also where nothing changes.
QUIET_SECONDS = 75.0
MAX_ERROR_CHARACTERS = 1000

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
JSON = "application/json"

Object = dict[str, Any]


class ApiError(TidegateError):
    """The API server refused: what was asked is wrong or not allowed. Asking again does not help."""

    reason = "ApiRefused"


class ApiGone(ApiError):
    """The object, or its whole kind, is not there."""

    reason = "ApiNotFound"


class ApiConflict(ApiError):
    """Another wrote first: read again and decide anew."""

    reason = "ApiConflict"


class ApiEnding(ApiError):
    """The namespace is being deleted, so nothing new is made in it."""

    reason = "ApiNamespaceEnding"


class ApiUnavailable(TidegateError):
    """The API server does not answer, or cannot now; whether a write was taken is unknown."""

    reason = "ApiUnavailable"


class ApiExpired(ApiUnavailable):
    """The API server no longer has the version that was to be gone on from: list anew."""

    reason = "ApiExpired"


class Cluster:
    """Use as `async with Cluster(await configuration(), count)`. `count` takes each write (kind, verb)."""

    def __init__(self, settings: Configuration, count: Callable[[str, str], None]) -> None:
        settings.connection_pool_maxsize = 0  # no bound: every watch holds a connection
        self.client = ApiClient(settings)
        self._count = count

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def list(
        self, kind: Kind, namespace: str, selector: str = "", *, field_selector: str = ""
    ) -> tuple[list[Object], int]:
        """Return all objects of a kind in a namespace and the version of that state.
        Raises `ApiGone` where the cluster does not know the kind."""
        items: list[Object] = []
        asked = {"limit": str(PAGE), "labelSelector": selector, "fieldSelector": field_selector}
        query = {name: value for name, value in asked.items() if value}
        while True:
            page = await self._call("GET", RESOURCES[kind].path(namespace), query=query)
            # The items of a listing do not say what they are.
            items += [{"apiVersion": page["apiVersion"], "kind": kind, **item} for item in page["items"]]
            following = page["metadata"].get("continue")
            if not following:
                return items, int(page["metadata"]["resourceVersion"])
            query = {**query, "continue": following}

    async def watch(
        self, kind: Kind, namespace: str, selector: str, version: int
    ) -> AsyncGenerator[tuple[str, Object], None]:
        """Yield the type and object of every event after `version` until the API server ends the watch.
        Use it in `contextlib.aclosing`, which closes the connection. Raises `ApiExpired` where the version is
        too old, `ApiUnavailable` where the watch breaks or nothing comes on it for `QUIET_SECONDS`."""
        asked = {
            "watch": "true",
            "resourceVersion": str(version),
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*WATCH_SECONDS)),  # so that they do not all end at once
            "labelSelector": selector,
        }
        path = RESOURCES[kind].path(namespace)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=QUIET_SECONDS)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                query = {name: value for name, value in asked.items() if value}
                response = await self._send("GET", path, query=query, timeout=timeout)
            try:
                if response.status >= 400:
                    raise _error(response.status, await response.read(), f"watch {path}")
                async for line in response.response.content:
                    event = json.loads(line)
                    change, body = event["type"], event["object"]
                    if change == "ERROR":
                        raise _error(int(body.get("code", 500)), json.dumps(body).encode(), f"watch {path}")
                    yield change, body
            finally:
                response.response.close()
        except (aiohttp.ClientError, OSError, ValueError, LookupError) as error:
            raise ApiUnavailable(f"The watch of {path} broke: {error!r}.") from error

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        """Return the newest version of an object. Raises `ApiGone`."""
        meta = body["metadata"]
        return await self._call("GET", RESOURCES[kind].path(meta["namespace"], meta["name"]))

    async def apply(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        """Create the object, or make the fields that we own what `manifest` says."""
        meta = manifest["metadata"]
        return await self._write(
            "apply",
            "PATCH",
            kind,
            RESOURCES[kind].path(meta["namespace"], meta["name"]),
            manifest,
            APPLY,
            {"fieldManager": FIELD_MANAGER, "force": "true"},
        )

    async def apply_status(self, kind: Kind, body: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        """Make the whole status of exactly this version what `status` says. Raises `ApiConflict` where the
        object has changed: what was decided on may be out of date, or another operator's records newer."""
        meta = body["metadata"]
        manifest = {
            "apiVersion": body["apiVersion"],
            "kind": kind,
            "metadata": {name: meta[name] for name in ("name", "namespace", "resourceVersion")},
            "status": status,
        }
        return await self._write(
            "status",
            "PATCH",
            kind,
            RESOURCES[kind].path(meta["namespace"], meta["name"], "status"),
            manifest,
            APPLY,
            {"fieldManager": FIELD_MANAGER, "force": "true"},
        )

    async def set_finalizers(self, kind: Kind, body: Mapping[str, Any], finalizers: Sequence[str]) -> Object:
        """Replace the finalizers of exactly this version. Raises `ApiConflict` where it has changed."""
        meta = body["metadata"]
        change = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": list(finalizers)}}
        path = RESOURCES[kind].path(meta["namespace"], meta["name"])
        return await self._write("finalizers", "PATCH", kind, path, change, MERGE, _OWNER)

    async def annotate(
        self, kind: Kind, body: Mapping[str, Any], annotations: Mapping[str, str | None], manager: str
    ) -> Object:
        """Set annotations (None: remove) of this very object, whatever its version, in the name of `manager`.
        Raises `ApiConflict` where it is another."""
        meta = body["metadata"]
        change = {"metadata": {"uid": meta["uid"], "annotations": dict(annotations)}}
        path = RESOURCES[kind].path(meta["namespace"], meta["name"])
        query = {"fieldManager": manager}
        return await self._write("annotate", "PATCH", kind, path, change, MERGE, query)

    async def patch(
        self,
        kind: Kind,
        body: Mapping[str, Any],
        operations: Sequence[Mapping[str, Any]],
        manager: str = FIELD_MANAGER,
    ) -> Object:
        """Carry out a JSON patch (RFC 6902). What it relies on it must `test`, beside the object's identity:
        others write into the object all the time. Raises `ApiConflict` where a test fails."""
        meta = body["metadata"]
        same = {"op": "test", "path": "/metadata/uid", "value": meta["uid"]}
        path = RESOURCES[kind].path(meta["namespace"], meta["name"])
        query = {"fieldManager": manager}
        return await self._write("patch", "PATCH", kind, path, [same, *operations], JSON_PATCH, query)

    async def create(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        """Raises `ApiConflict` where one of that name stands."""
        path = RESOURCES[kind].path(manifest["metadata"]["namespace"])
        return await self._write("create", "POST", kind, path, manifest, JSON, _OWNER)

    async def delete(self, kind: Kind, body: Mapping[str, Any]) -> None:
        """Delete this very object (without a uid: the one of that name) with all that it owns; one that is
        gone already is fine."""
        meta = body["metadata"]
        options: dict[str, Any] = {"propagationPolicy": "Background"}
        if "uid" in meta:
            options["preconditions"] = {"uid": meta["uid"]}
        path = RESOURCES[kind].path(meta["namespace"], meta["name"])
        try:
            await self._write("delete", "DELETE", kind, path, options, JSON, {})
        except (ApiGone, ApiConflict):
            return

    async def _write(
        self, verb: str, method: str, kind: Kind, path: str, body: Any, content: str, query: Mapping[str, str]
    ) -> Object:
        answer = await self._call(method, path, body=body, content=content, query=query)
        self._count(kind, verb)
        return answer

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: str = JSON,
        query: Mapping[str, str] | None = None,
    ) -> Object:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                response = await self._send(method, path, body=body, content=content, query=query)
                text = await response.read()
            if response.status >= 400:
                raise _error(response.status, text, f"{method} {path}")
            found: Object = json.loads(text)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiUnavailable(f"The API server does not answer {method} {path}: {error!r}.") from error
        return found

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content: str = JSON,
        query: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout | None = None,
    ) -> RESTResponse:
        target = f"{path}?{urlencode(query)}" if query else path
        headers = {"Content-Type": content, "Accept": JSON}
        request = await self.client.param_serialize(
            method, target, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        return await self.client.call_api(*request, _request_timeout=timeout)


async def configuration(kubeconfig: str | None = None) -> Configuration:
    """Return the pod's service account, or else the kubeconfig of whoever starts the operator by hand."""
    settings = Configuration()
    if kubeconfig is None:
        with contextlib.suppress(config.ConfigException):  # not in a pod
            config.load_incluster_config(client_configuration=settings)
            return settings
    await config.load_kube_config(config_file=kubeconfig, client_configuration=settings)
    return settings


# All that is said of a JSON patch whose `test` fails; a result that is invalid is described.
# How it says that a `test` of a JSON patch failed, and that a merge names another object's uid.
_OTHER_OBJECT = (
    "the server rejected our request due to an error in our request",
    "metadata.uid: Invalid value",
)
_OWNER = {"fieldManager": FIELD_MANAGER}


def _error(status: int, body: bytes, asked: str) -> TidegateError:
    """Return one of this module's errors, with the API server's own sentence."""
    causes: list[Any] = []
    try:
        found = json.loads(body)
        message = str(found["message"])
        causes = (found.get("details") or {}).get("causes") or []
    except (ValueError, KeyError, TypeError, AttributeError):
        message = body.decode(errors="replace")
    sentence = f"{asked}: {status}: {message[:MAX_ERROR_CHARACTERS]}"
    if status == 404:
        return ApiGone(sentence)
    if status == 410:
        return ApiExpired(sentence)
    if status == 409 or (status == 422 and any(each in message for each in _OTHER_OBJECT)):
        return ApiConflict(sentence)
    if any(isinstance(cause, dict) and cause.get("reason") == "NamespaceTerminating" for cause in causes):
        return ApiEnding(sentence)
    if status == 429 or status >= 500:
        return ApiUnavailable(sentence)
    return ApiError(sentence)

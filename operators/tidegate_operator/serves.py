"""The Serve of each Ray cluster: its client with the cluster's token, and the one writer of its config."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tidegate.control.observed import ServeState
from tidegate.control_round import Serve
from tidegate.serve_api import ServeApi, ServeUnauthorized, ServeUnavailable
from tidegate.serve_writer import ServeWriter
from tidegate_operator import ray_state
from tidegate_operator.cache import Body
from tidegate_operator.cluster import ApiError, ApiUnavailable, Object
from tidegate_operator.kinds import Kind
from tidegate_operator.ray_view import ServeView, name_of

TIMEOUT_SECONDS = 15.0

SecretKey = tuple[str, str]


class Reader(Protocol):
    """The part of `Cluster` that is used here."""

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> Object: ...


@dataclass(slots=True)
class _Client:
    """`secret` says where its token is from; None: Ray asks for none. `serve` is None once it was refused."""

    writer: ServeWriter
    secret: SecretKey | None = None
    serve: Serve | None = field(default=None)


class Serves:
    """Opens a client where a cluster is first asked. `url` says where a head's Service (of a namespace and a
    RayCluster) is found."""

    def __init__(
        self,
        url: Callable[[str, str, str], str],
        reader: Reader,
        connect: Callable[[str, str], Serve] = lambda url, token: ServeApi(
            url, token=token, timeout_seconds=TIMEOUT_SECONDS
        ),
    ) -> None:
        self._url = url
        self._reader = reader
        self._connect = connect
        self._open: dict[str, _Client] = {}

    async def view(self, cluster: Body, pods: Sequence[Body]) -> ServeView:
        """Return what Serve says. `pods` are the cluster's: its head knows where the token is."""
        client = self._of(cluster)
        writer = client.writer
        try:
            serve = await self._opened(cluster, client, ray_state.token_secret(pods))
            return ServeView(await serve.get(), "", writer.problem, writer.rejected)
        except ServeUnauthorized as error:
            await _close(client)
            silence = error.message
        except ServeUnavailable as error:
            silence = error.message
        return ServeView(None, silence, writer.problem, writer.rejected)

    async def write(
        self, cluster: Body, configs: Mapping[str, Mapping[str, Any]], standing: ServeState
    ) -> bool:
        """Make the cluster's Serve, which has answered, hold these configs. Returns whether anything was
        sent."""
        client = self._of(cluster)
        assert client.serve is not None
        return await client.writer.write(client.serve, configs, standing)

    async def keep(self, clusters: Sequence[Body]) -> None:
        """Close the clients of all other clusters, which are gone."""
        urls = {self._url_of(cluster) for cluster in clusters}
        for url in [url for url in self._open if url not in urls]:
            await _close(self._open.pop(url))

    async def close(self) -> None:
        await self.keep([])

    def _of(self, cluster: Body) -> _Client:
        url = self._url_of(cluster)
        if url not in self._open:
            self._open[url] = _Client(ServeWriter(f"RayCluster {name_of(cluster)}"))
        return self._open[url]

    async def _opened(self, cluster: Body, client: _Client, secret: SecretKey | None) -> Serve:
        """Raises `ServeUnavailable` where the token cannot be read."""
        if client.serve is None or secret not in (None, client.secret):
            token = await self._token(cluster["metadata"]["namespace"], *secret) if secret is not None else ""
            await _close(client)
            client.serve, client.secret = self._connect(self._url_of(cluster), token), secret
        return client.serve

    async def _token(self, namespace: str, name: str, key: str) -> str:
        try:
            found = await self._reader.read("Secret", {"metadata": {"namespace": namespace, "name": name}})
        except (ApiError, ApiUnavailable) as error:
            raise ServeUnavailable(f"Ray's token cannot be read: {error.message}") from error
        try:
            return base64.b64decode(found["data"][key], validate=True).decode().strip()
        except (KeyError, TypeError, ValueError) as error:
            raise ServeUnavailable(f"The Secret {name} has no token under the key {key!r}.") from error

    def _url_of(self, cluster: Body) -> str:
        meta = cluster["metadata"]
        return self._url(ray_state.head_service(cluster), meta["namespace"], meta["name"])


async def _close(client: _Client) -> None:
    serve, client.serve = client.serve, None
    if serve is not None:
        await serve.close()

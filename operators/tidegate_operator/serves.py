"""The Serve of each Ray cluster: its client, and the one writer of its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tidegate.control.observed import ServeState
from tidegate.control_round import Serve
from tidegate.serve_api import ServeApi, ServeUnavailable
from tidegate.serve_writer import ServeWriter
from tidegate_operator import ray_state
from tidegate_operator.cache import Body
from tidegate_operator.ray_view import ServeView, name_of

TIMEOUT_SECONDS = 15.0


class Serves:
    """Opens a client where a cluster is first asked. `url` says where a head's Service (of a namespace and a
    RayCluster) is found."""

    def __init__(
        self,
        url: Callable[[str, str, str], str],
        connect: Callable[[str], Serve] = lambda url: ServeApi(url, timeout_seconds=TIMEOUT_SECONDS),
    ) -> None:
        self._url = url
        self._connect = connect
        self._open: dict[str, tuple[Serve, ServeWriter]] = {}

    async def view(self, cluster: Body) -> ServeView:
        serve, writer = self._of(cluster)
        try:
            return ServeView(await serve.get(), "", writer.problem, writer.rejected)
        except ServeUnavailable as error:
            return ServeView(None, error.message, writer.problem, writer.rejected)

    async def write(
        self, cluster: Body, configs: Mapping[str, Mapping[str, Any]], standing: ServeState
    ) -> bool:
        """Make the cluster's Serve hold these configs. Returns whether anything was sent."""
        serve, writer = self._of(cluster)
        return await writer.write(serve, configs, standing)

    async def keep(self, clusters: Sequence[Body]) -> None:
        """Close the clients of all other clusters, which are gone."""
        urls = {self._url_of(cluster) for cluster in clusters}
        for url in [url for url in self._open if url not in urls]:
            serve, _ = self._open.pop(url)
            await serve.close()

    async def close(self) -> None:
        await self.keep([])

    def _of(self, cluster: Body) -> tuple[Serve, ServeWriter]:
        url = self._url_of(cluster)
        if url not in self._open:
            self._open[url] = (self._connect(url), ServeWriter(f"RayCluster {name_of(cluster)}"))
        return self._open[url]

    def _url_of(self, cluster: Body) -> str:
        meta = cluster["metadata"]
        return self._url(ray_state.head_service(cluster), meta["namespace"], meta["name"])

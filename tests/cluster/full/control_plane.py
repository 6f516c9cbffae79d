"""What the tests in this folder share: a control plane without nodes, an operator beside it, and its world.

Nobody runs KubeRay here. `ClustersBecomeReady` says of each RayCluster what KubeRay would say of one whose
head is up; Serve is `tests.cluster.simulated_serve`. The garbage collector is the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import yaml

from tests.cluster.cluster import Cluster as ControlPlane
from tidegate.errors import TidegateError
from tidegate_operator.cluster import ApiGone, Cluster

NAMESPACE = "default"
KEY_PREFIX = "tidegate"
READY_SECONDS = 0.5
# Room for all replicas of a pool, and for those that a change adds.
GROUPS = [{"name": "cpu", "cpus": "16", "memory": "64Gi", "maxWorkers": 8}]
KINDS = ("Model", "Pool", "RayCluster", "Job", "Pod", "Event")


def operator_environment(kubeconfig: Path, redis_url: str, serve_url: str) -> dict[str, str]:
    return {
        "KUBECONFIG": str(kubeconfig),
        "REDIS_URL": redis_url,
        "TIDEGATE_KEY_PREFIX": KEY_PREFIX,
        "TIDEGATE_NAMESPACES": NAMESPACE,
        "TIDEGATE_POD_NAMESPACE": NAMESPACE,
        "TIDEGATE_RAY_IMAGE": "localhost/tidegate/ray:1",
        "TIDEGATE_RAY_VERSION": "2.60.0",
        "TIDEGATE_SERVE_URL_TEMPLATE": serve_url,
        "TIDEGATE_LOG_FORMAT": "console",
    }


def server_of(plane: ControlPlane) -> str:
    kubeconfig = yaml.safe_load(plane.facts.kubeconfig.read_text(encoding="utf-8"))
    return str(kubeconfig["clusters"][0]["cluster"]["server"])


def administrator(plane: ControlPlane) -> ssl.SSLContext:
    keys = plane.facts.kubeconfig.parent / "live" / "pki"
    context = ssl.create_default_context(cafile=keys / "ca.crt")
    context.load_cert_chain(keys / "admin.crt", keys / "admin.key")
    return context


def kubeconfig_for(url: str, file: Path) -> Path:
    """One for a plain HTTP address that asks for no certificate."""
    content: Mapping[str, object] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "proxied",
        "contexts": [{"name": "proxied", "context": {"cluster": "proxied", "user": "nobody"}}],
        "clusters": [{"name": "proxied", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@asynccontextmanager
async def clusters_become_ready(api: Cluster) -> AsyncIterator[None]:
    """While this is entered, every RayCluster has a head that is ready."""
    task = asyncio.create_task(_keep_ready(api), name="clusters become ready")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # it is cancelled because we ask for it
            await task


async def _keep_ready(api: Cluster) -> None:
    while True:
        with contextlib.suppress(TidegateError):  # it went, or changed, in between
            for body in (await api.list("RayCluster", NAMESPACE))[0]:
                if not body.get("status"):
                    head = {"serviceName": f"{body['metadata']['name']}-head-svc"}
                    await api.apply_status("RayCluster", body, {"state": "ready", "head": head})
        await asyncio.sleep(READY_SECONDS)


async def clean(api: Cluster) -> None:
    """Remove everything that a world before may have left."""
    for kind in KINDS:
        with contextlib.suppress(ApiGone):
            for body in (await api.list(kind, NAMESPACE))[0]:  # type: ignore[arg-type]
                if body["metadata"].get("finalizers"):
                    body = await api.set_finalizers(kind, body, [])  # type: ignore[arg-type]
                await api.delete(kind, body)  # type: ignore[arg-type]

"""`python -m tidegate_operator.uninstall`: what happens before the operator goes (pre-delete hook).

Without `--keep-models`, every Model and Pool is deleted; the operator, which still runs, drains them and
takes its finalizers away. With it, the operator is stopped first, or it would put back what is taken away
here; then the Models lose their finalizer, which nobody would be left to take away, and the Ray clusters go.
Its Lease, which no release knows of, goes last, and a running operator would make another.

With `--helm-release`, nothing happens unless Helm's own record of that release says that it is being
uninstalled: a hook whose chart was rendered and applied as plain objects is a Job like any other, and would
take a healthy release down. Helm writes `status: uninstalling` before it creates its first pre-delete hook.

An uninstall must end. What still stands after the time that it was given loses our finalizers, and KubeRay's
where the Redis that it wants to clean is gone; after that only an object that a stranger holds is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tidegate.errors import TidegateError
from tidegate.telemetry import configure_logging, fields
from tidegate_operator.cluster import ApiConflict, ApiGone, ApiUnavailable, Cluster, Object, configuration
from tidegate_operator.kinds import Kind

log = logging.getLogger("tidegate.uninstall")

OUR_FINALIZERS = "tidegate.dev/"
RAY_FINALIZERS = "ray.io/"
RAY_CLUSTERS = "tidegate.dev/pool"
RESOLVE_JOBS = "tidegate.dev/model"
POLL_SECONDS = 1.0
FORCED_SECONDS = 30.0  # what a deletion takes once no finalizer of ours holds it
HELM_RECORDS: tuple[Kind, ...] = ("Secret", "ConfigMap")  # Helm's storage drivers
HELM_REVISIONS = 100  # from the one whose hook this is; a rollback brings back an older one's hooks
MODELS_SHARE = 2 / 3  # of the time; the rest is for the Ray clusters, or to stop the operator


class UninstallFailed(TidegateError):
    """Something does not go, and it is not ours to force it."""

    reason = "UninstallFailed"


class NotUninstalling(TidegateError):
    """Helm does not say that this release is being uninstalled, so nothing was touched."""

    reason = "NotUninstalling"


class Api(Protocol):
    """The part of `Cluster` that is used here."""

    async def read(self, kind: Kind, body: Mapping[str, Any]) -> Object: ...

    async def list(self, kind: Kind, namespace: str, selector: str = "") -> tuple[list[Object], int]: ...

    async def delete(self, kind: Kind, body: Mapping[str, Any]) -> None: ...

    async def set_finalizers(
        self, kind: Kind, body: Mapping[str, Any], finalizers: Sequence[str]
    ) -> Object: ...

    async def patch(
        self, kind: Kind, body: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]
    ) -> Object: ...


@dataclass(frozen=True, slots=True)
class Options:
    namespaces: tuple[str, ...]
    operator_namespace: str
    operator_selector: str
    operator_lease: str
    keep_models: bool
    timeout_seconds: float
    helm_release: str = ""  # empty: whoever started this has decided
    helm_revisions: range = range(0)


class Uninstall:
    def __init__(
        self,
        api: Api,
        options: Options,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._api = api
        self._options = options
        self._clock = clock
        self._sleep = sleep
        self._deadline = clock() + options.timeout_seconds

    async def run(self) -> None:
        """Raises `NotUninstalling`, `UninstallFailed` and `ApiError`."""
        if self._options.helm_release:
            await self._ask_helm()
        if self._options.keep_models:
            await self._stop_operator(self._deadline - self._options.timeout_seconds * MODELS_SHARE)
            await self._release_models()
            await self._clear("Job", RESOLVE_JOBS, OUR_FINALIZERS, self._deadline)
        else:
            share = self._options.timeout_seconds * (1 - MODELS_SHARE)
            await self._clear("Model", "", OUR_FINALIZERS, self._deadline - share)
            await self._clear("Pool", "", OUR_FINALIZERS, self._deadline)
        await self._clear("RayCluster", RAY_CLUSTERS, RAY_FINALIZERS, self._deadline)
        await self._stop_operator(self._clock() + FORCED_SECONDS)
        await self._repeat(self._delete_lease, self._clock() + FORCED_SECONDS)

    async def _ask_helm(self) -> None:
        release, namespace = self._options.helm_release, self._options.operator_namespace
        found: list[Object] = []

        async def look() -> list[Object]:
            for kind in HELM_RECORDS:
                for revision in self._options.helm_revisions:
                    meta = {"namespace": namespace, "name": f"sh.helm.release.v1.{release}.v{revision}"}
                    with contextlib.suppress(ApiGone):
                        body = await self._api.read(kind, {"metadata": meta})
                        if _is_being_uninstalled(body, release):
                            found.append(body)
                            return []
            return []

        await self._repeat(look, self._clock() + FORCED_SECONDS)
        if not found:
            raise NotUninstalling(
                f"Helm has no record in the namespace {namespace} that says that the release {release} is "
                "being uninstalled: nothing was stopped or deleted. To take it down without Helm, run this "
                "Job from a chart rendered with uninstall.onlyWithHelm=false."
            )

    async def _stop_operator(self, until: float) -> None:
        async def stop() -> list[Object]:
            where = (self._options.operator_namespace, self._options.operator_selector)
            for body in await self._found("Deployment", *where):
                if body["spec"].get("replicas", 1) != 0:
                    log.info("stopping the operator", extra=fields(deployment=_name(body)))
                    await self._api.patch(
                        "Deployment", body, [{"op": "replace", "path": "/spec/replicas", "value": 0}]
                    )
            return await self._found("Pod", *where)

        # A pod that has not ended by then is on a node that is away and has lost its Lease long ago.
        await self._repeat(stop, until)

    async def _delete_lease(self) -> list[Object]:
        meta = {"namespace": self._options.operator_namespace, "name": self._options.operator_lease}
        await self._api.delete("Lease", {"metadata": meta})
        return []

    async def _release_models(self) -> None:
        async def release() -> list[Object]:
            held = [
                body
                for namespace in self._options.namespaces
                for body in await self._found("Model", namespace)
                if _held(body, OUR_FINALIZERS)
            ]
            for body in held:
                await self._take_finalizers("Model", body, OUR_FINALIZERS)
            return held

        left = await self._repeat(release, self._deadline + FORCED_SECONDS)
        if left:
            raise UninstallFailed(f"{_names(left)} still have a finalizer of Tidegate's.")

    async def _clear(self, kind: Kind, selector: str, forced: str, deadline: float) -> None:
        """Delete all objects of a kind and wait until they are gone; from `deadline` on without waiting for
        whom finalizers that begin with `forced` belong to."""

        async def delete() -> list[Object]:
            found = [
                body
                for namespace in self._options.namespaces
                for body in await self._found(kind, namespace, selector)
            ]
            for body in found:
                if "deletionTimestamp" not in body["metadata"]:
                    log.info("deleting", extra=fields(kind=kind, object=_name(body)))
                    await self._api.delete(kind, body)
                elif self._clock() >= deadline and _held(body, forced):
                    log.warning("out of time: not waiting any longer", extra=fields(object=_name(body)))
                    await self._take_finalizers(kind, body, forced)
            return found

        left = await self._repeat(delete, deadline + FORCED_SECONDS)
        if left:
            holders = sorted({name for body in left for name in body["metadata"].get("finalizers", [])})
            held = f"; held by {', '.join(holders)}" if holders else ""
            raise UninstallFailed(f"{kind} {_names(left)} cannot be deleted{held}.")

    async def _repeat(self, step: Callable[[], Awaitable[list[Object]]], until: float) -> list[Object]:
        """Take a step that may be taken again until it leaves nothing, or time is up; what it left then."""
        while True:
            try:
                left = await step()
                problem = None
            except (ApiConflict, ApiUnavailable) as error:
                left, problem = [], error
            if not left and problem is None:
                return []
            if self._clock() >= until:
                if problem is not None:
                    raise problem
                return left
            await self._sleep(POLL_SECONDS)

    async def _take_finalizers(self, kind: Kind, body: Object, prefix: str) -> None:
        kept = [name for name in body["metadata"]["finalizers"] if not name.startswith(prefix)]
        try:
            await self._api.set_finalizers(kind, body, kept)
        except ApiGone:
            return

    async def _found(self, kind: Kind, namespace: str, selector: str = "") -> list[Object]:
        """Return the objects; none where the cluster does not know the kind: KubeRay may be gone already."""
        try:
            return (await self._api.list(kind, namespace, selector))[0]
        except ApiGone:
            return []


def _is_being_uninstalled(record: Object, release: str) -> bool:
    labels = record["metadata"].get("labels", {})
    wanted = {"owner": "helm", "name": release, "status": "uninstalling"}
    return all(labels.get(name) == value for name, value in wanted.items())


def _held(body: Object, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in body["metadata"].get("finalizers", []))


def _name(body: Object) -> str:
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


def _names(bodies: Sequence[Object]) -> str:
    return ", ".join(sorted(_name(body) for body in bodies))


def parse(arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tidegate_operator.uninstall")
    parser.add_argument("--namespaces", required=True, help="that the operator watches, with commas")
    parser.add_argument("--operator-namespace", required=True)
    parser.add_argument("--operator-selector", required=True, help="labels of its Deployment and pods")
    parser.add_argument("--operator-lease", required=True, help="the name of its Lease")
    parser.add_argument("--keep-models", action="store_true", help="keep Models and Pools")
    parser.add_argument("--timeout-seconds", type=float, default=240.0)
    parser.add_argument("--helm-release", default="", help="act only while Helm uninstalls this release")
    parser.add_argument("--helm-revision", type=int, default=1, help="the one that this hook belongs to")
    found = parser.parse_args(arguments)
    return Options(
        tuple(filter(None, found.namespaces.split(","))),
        found.operator_namespace,
        found.operator_selector,
        found.operator_lease,
        found.keep_models,
        found.timeout_seconds,
        found.helm_release,
        range(found.helm_revision, found.helm_revision + HELM_REVISIONS) if found.helm_release else range(0),
    )


async def serve(options: Options) -> None:
    async with Cluster(await configuration(), lambda *_: None) as cluster:
        await Uninstall(cluster, options).run()


def main() -> int:
    options = parse()
    configure_logging("auto", "info")
    try:
        asyncio.run(serve(options))
    except NotUninstalling as refusal:
        # No failure: a Job that did right to do nothing must not turn a rollout red.
        log.warning("%s: %s", refusal.reason, refusal.message)
        return 0
    except TidegateError as error:
        log.error("%s: %s", error.reason, error.message)
        return 1
    log.info("Models and Pools are kept" if options.keep_models else "Models and Pools are gone")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What happens to Pools and Models in the tests with faults. Written to the API server itself, not through
the proxy: these are the users, and it is the operator that is tried."""

from __future__ import annotations

import asyncio

from tests.cluster.full.control_plane import GROUPS
from tests.cluster.operator_process import World
from tidegate_operator.kinds import Kind

STEP_SECONDS = 3.0
GONE_SECONDS = 120


async def told(world: World) -> None:
    """From nothing to the last change. Waits only where a person would have to wait as well."""
    world.serve.refused.add("a-refused")
    world.serve.broken.add("b-broken")
    for name in ("a", "b", "d"):
        await world.pool(name, groups=GROUPS)
    await _models(world, "a", "kept", "changed", "more", "refused", "gone")
    await world.model("a-asleep", pool="a", scaling={"minReplicas": 0})
    await _models(world, "b", "kept", "anew", "broken")
    await _models(world, "d", "orphan", "gone")
    await _models(world, "c", "early")  # its pool comes later
    await asyncio.sleep(STEP_SECONDS)

    for length in (64, 128, 256):  # faster than the operator can follow
        await world.model("a-changed", pool="a", contextLength=length)
    await world.model("a-more", pool="a", scaling={"minReplicas": 2, "maxReplicas": 3})
    await asyncio.sleep(STEP_SECONDS)

    await _delete(world, "Model", "a-gone")
    await _delete(world, "Model", "d-gone")
    await world.pool("c", groups=GROUPS)
    await asyncio.sleep(STEP_SECONDS)

    # Somebody deletes the Ray cluster behind the operator's back; the new one's Serve knows nothing.
    for body in (await world.api.list("RayCluster", "default"))[0]:
        if body["metadata"]["name"].startswith("b-"):
            await world.api.delete("RayCluster", body)
            world.serve.lose_state(body["metadata"]["name"])
    await world.pool("a", groups=[{**GROUPS[0], "maxWorkers": 5}])  # changed in place
    await asyncio.sleep(STEP_SECONDS)

    await _delete(world, "Model", "b-anew")
    await world.wait_for("b-anew is gone", lambda: _is_gone(world, "b-anew"), GONE_SECONDS)
    await world.model("b-anew", pool="b", contextLength=512)
    await world.pool("a", groups=[{**GROUPS[0], "maxWorkers": 5}], image="localhost/tidegate/ray:2")
    await asyncio.sleep(STEP_SECONDS)

    # What a Model tells without its Pool depends on whether it has ever served.
    await world.wait_for_condition("d-orphan", "Ready", "True", "Serving", timeout=GONE_SECONDS)
    await _delete(world, "Pool", "d")
    await world.model("a-changed", pool="a", contextLength=320)


async def _models(world: World, pool: str, *names: str) -> None:
    for name in names:
        await world.model(f"{pool}-{name}", pool=pool)


async def _delete(world: World, kind: Kind, name: str) -> None:
    body = await world.get(kind, name)
    assert body is not None, f"{kind} {name}"
    await world.api.delete(kind, body)


async def _is_gone(world: World, name: str) -> bool:
    return await world.get("Model", name) is None

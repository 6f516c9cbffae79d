"""What tenants hold is what bounds are checked against."""

from __future__ import annotations

from tests.contract.queue_rig import Rig, a_request, a_token, accept
from tidegate.messages.administration import Held
from tidegate.messages.codec import encode_request
from tidegate.store.keys import Keys
from tidegate.store.usage import UsageReader


async def test_each_tenant_holds_what_waits_and_runs_of_it(rig: Rig) -> None:
    connection = await rig.connect()
    keys = Keys(connection, key_prefix=rig.key_prefix)
    for tenant in ("acme", "idle"):
        await keys.create(tenant, tenant)
    gateway, _ = await rig.gateway()
    replica = await rig.replica()
    one, two = (a_request(tenant="acme") for _ in range(2))
    await accept(gateway, one)
    await accept(gateway, two)
    usage = UsageReader(connection, keys, key_prefix=rig.key_prefix)
    held = sum(len(encode_request(request)) for request in (one, two))
    assert (await usage.read()).tenants == {"acme": Held(2, held, 0), "idle": Held()}
    for claim in await replica.queue.claim(2):
        await replica.queue.emit([(1, a_token(claim, 0, finish="stop"))])
    assert (await usage.read()).tenants == {"acme": Held(), "idle": Held()}

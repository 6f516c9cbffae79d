"""What hosts do alike in a round, on a real Redis: the parts that a rollout asks for."""

from __future__ import annotations

from tests.contract.queue_rig import MODEL, REVISION, a_request, a_token, accept, open_rig
from tidegate.control.plan import RegistryChanges
from tidegate.control_round import observe_store, publish
from tidegate.messages.outcomes import cohort_of
from tidegate.messages.queue import Label
from tidegate.store.queue import QueueDepths

TARGET = "r2"
ROLLOUT = "65f0"
KEYS = [(MODEL, TARGET), (MODEL, REVISION)]


async def test_a_round_reads_outcomes_empties_a_queue_and_forgets(redis_url: str, key_prefix: str) -> None:
    async with open_rig(redis_url, key_prefix) as rig:
        gateway, _ = await rig.gateway()
        registry, target, stable = (
            await rig.registry(),
            await rig.replica(revision=TARGET),
            await rig.replica(),
        )
        depths = QueueDepths(await rig.connect(), key_prefix=key_prefix)
        label = Label(cohort_of(ROLLOUT, 15))
        failed, waiting = a_request(revision=TARGET), a_request(revision=TARGET)
        await accept(gateway, failed, label=label)
        await target.queue.claim(1)
        await target.queue.emit([(1, a_token(failed, 0, finish="error"))], {failed.id: "error"})
        await accept(gateway, waiting, label=label)

        seen = await observe_store(registry, depths, KEYS, None, KEYS)
        tally = seen.outcomes[MODEL, TARGET][label.cohort]
        assert (tally.ends, sum(tally.waiting_first.values())) == ({"error": 1}, 1)
        assert seen.outcomes[MODEL, REVISION] == {}
        assert (await observe_store(registry, depths, KEYS, None)).outcomes == {}

        moves = RegistryChanges(move=((KEYS[0], KEYS[1], False),), forget_outcomes=((tuple(KEYS), ROLLOUT),))
        for _ in range(2):  # a round that is repeated
            await publish(registry, moves, {})
        assert [claim.request.id for claim in await stable.queue.claim(9)] == [waiting.id]
        seen = await observe_store(registry, depths, KEYS, None, KEYS)
        assert seen.outcomes == {KEYS[0]: {}, KEYS[1]: {}}
        assert seen.depths[MODEL, TARGET].waiting == 0

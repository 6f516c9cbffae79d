"""What a gateway does while a model changes: labels, sessions, shadows, moves, figures per revision."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.integration.gateway.rig import CHAT, MODEL, REVISION, Gateway
from tests.waiting import await_until
from tidegate.gateway.admission import choose_revision, session_of
from tidegate.store.connection import Connection

PATH = "/v1/chat/completions"
TARGET = "fedcba9876"
COHORT = "65f0.50"
HALVES = {TARGET: 50, REVISION: 50}


def a_name(revision: str) -> str:
    """A user whose calls get that revision."""
    users = (f"user {number}" for number in range(1000))
    return next(user for user in users if choose_revision(HALVES, session_of("acme", user)) == revision)


async def label_of(connection: Connection, key_prefix: str, request_id: str) -> list[bytes | None]:
    found: list[bytes | None] = await connection.call(
        "HMGET", f"{key_prefix}:req:{request_id}", "cohort", "session", "pair"
    )
    return found


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"user": a_name(TARGET)}, {}),
        ({}, {"x-tidegate-session": a_name(TARGET)}),
        ({"user": a_name(REVISION)}, {"x-tidegate-session": a_name(TARGET)}),
    ],
)
async def test_a_session_keeps_its_revision_and_labels_its_requests(
    gateway: Gateway, connection: Connection, key_prefix: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    await gateway.put_model(revisions=HALVES, cohort=COHORT)
    replica = await gateway.open_replica(TARGET)
    for _ in range(3):
        call = asyncio.create_task(gateway.post(PATH, CHAT | body, **headers))
        [claim] = await replica.next()
        session = session_of("acme", a_name(TARGET)).encode()
        assert await label_of(connection, key_prefix, claim.request.id) == [COHORT.encode(), session, None]
        await replica.say(claim, "word", "stop")
        assert (await call).json()["system_fingerprint"] == TARGET


async def test_calls_without_a_session_spread_over_both_revisions(gateway: Gateway) -> None:
    await gateway.put_model(revisions=HALVES)
    calls = [asyncio.create_task(gateway.post(PATH, CHAT)) for _ in range(24)]
    replicas = [gateway.replica, await gateway.open_replica(TARGET)]
    answering = [asyncio.create_task(replica.answer_everything()) for replica in replicas]
    answers = await asyncio.gather(*calls)
    for task in answering:
        task.cancel()
    assert {answer.json()["system_fingerprint"] for answer in answers} == {REVISION, TARGET}


async def test_a_shadow_sees_the_first_sequence_and_the_client_its_own_answer(
    gateway: Gateway, connection: Connection, key_prefix: str
) -> None:
    await gateway.put_model(cohort="65f0.0", shadow=TARGET, shadow_share=100)
    target = await gateway.open_replica(TARGET)
    call = asyncio.create_task(gateway.post(PATH, CHAT | {"n": 2}))
    claims = await gateway.replica.next(2)
    [copy] = await target.next()
    assert copy.request.id == claims[0].request.id + ".shadow"
    assert (copy.request.work, copy.request.tenant) == (claims[0].request.work, "")
    running = f'tidegate_num_requests_running{{model="{MODEL}",revision="{TARGET}"}} 1.0'
    assert running in (await gateway.http.get("/metrics")).text
    await target.say(copy, "never seen")
    await target.say(copy, "", "stop")
    for claim in claims:
        await gateway.replica.say(claim, "seen", "stop")
    answer = await call
    assert [choice["message"]["content"] for choice in answer.json()["choices"]] == ["seen", "seen"]
    assert "never" not in answer.text

    async def is_forgotten() -> bool:
        return not await connection.call("EXISTS", f"{key_prefix}:req:{copy.request.id}")

    await await_until(is_forgotten)


async def test_no_shadow_of_what_is_refused_or_of_a_tokenizers_call(gateway: Gateway) -> None:
    await gateway.put_model(shadow=TARGET, shadow_share=100)
    target = await gateway.open_replica(TARGET)
    assert (await gateway.post(PATH, CHAT | {"n": 0})).status_code == 400
    call = asyncio.create_task(gateway.post("/tokenize", {"prompt": "a"}))
    await gateway.replica.answer("")
    assert (await call).status_code == 200
    assert await target.queue.claim(9) == []


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_moved_call_is_answered_by_the_other_revision(gateway: Gateway, is_streamed: bool) -> None:
    await gateway.put_model(revisions={TARGET: 100})
    call = asyncio.create_task(gateway.post(PATH, CHAT | {"stream": is_streamed}))

    async def waits() -> bool:
        return (await gateway.services.queue.depth(MODEL, TARGET)).waiting == 1

    await await_until(waits)
    assert await gateway.registry.move_revision(MODEL, TARGET, REVISION, False) == 0
    await gateway.replica.answer("from", " the other")
    answer = await call
    assert answer.status_code == 200
    assert "the other" in answer.text


async def test_an_answer_that_cannot_go_on_says_so_in_its_stream(gateway: Gateway) -> None:
    await gateway.put_model(revisions={TARGET: 100})
    target = await gateway.open_replica(TARGET)
    call = asyncio.create_task(gateway.post(PATH, CHAT | {"stream": True}))
    [claim] = await target.next()
    await target.say(claim, "half an ")
    await target.queue.hand_back([(claim.request.id, claim.attempt)], "stopped")
    assert await gateway.registry.move_revision(MODEL, TARGET, REVISION, False) == 0
    answer = await call
    assert "half an" in answer.text
    assert '"code":"revision_aborted"' in answer.text.replace(" ", "")
    assert "rolled back" in answer.text


async def test_revisions_have_figures_of_their_own_while_they_are_listed(gateway: Gateway) -> None:
    await gateway.put_model(revisions={TARGET: 100})
    target = await gateway.open_replica(TARGET)
    for finish in ("stop", "error"):
        call = asyncio.create_task(gateway.post(PATH, CHAT | {"stream": True}))
        await target.answer("a", "b", finish=finish)
        await call
    await gateway.post(PATH, CHAT | {"n": 0})  # refused before it was given a revision
    text = (await gateway.http.get("/metrics")).text
    for outcome, count in {"ok": 1, "error": 1, "refused": 0, "left": 0}.items():
        labels = f'model="{MODEL}",outcome="{outcome}",revision="{TARGET}"'
        assert f"tidegate_revision_requests_total{{{labels}}} {count}.0" in text
    for name in ("time_to_first_token", "time_per_output_token"):
        labels = f'model="{MODEL}",revision="{TARGET}"'
        assert f"tidegate_revision_{name}_seconds_count{{{labels}}} 1.0" in text
    await gateway.put_model()
    text = (await gateway.http.get("/metrics")).text
    assert not [line for line in text.splitlines() if "tidegate_revision" in line and TARGET in line]

"""A whole platform on this machine: what a person may do to it, and what may happen to it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.checkpoints import tiny
from tests.integration.local.conftest import Platform
from tests.processes import command
from tests.waiting import await_until
from tidegate.errors import ConfigError
from tidegate.local import lifecycle, processes
from tidegate.local.home import Home
from tidegate.serve_api import ServeApi
from tidegate.serving.parking import HOLDER
from tidegate.settings import Settings
from tidegate.store.connection import Connection
from tidegate.store.keys import Keys

pytestmark = [pytest.mark.serial, pytest.mark.timeout(240)]


def part(platform: Platform, name: str) -> int:
    return next(process.pid for process in platform.running.processes if process.name == name)


async def test_it_answers_and_says_what_runs(steady: Platform) -> None:
    answer = await steady.ask("first")
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
    snapshot = await lifecycle.status(steady.settings)
    assert snapshot.running is not None
    assert [entry.name for entry in snapshot.models] == ["first", "second"]
    assert all(found.is_alive for found in snapshot.parts)
    assert {"host", "redis", "gateway"} <= {found.name for found in snapshot.parts}
    assert [shown.step for shown in steady.shown if shown.state == "done"][:2] == ["files", "redis"]


async def test_running_it_again_does_nothing_twice(steady: Platform) -> None:
    before = {process.pid for process in processes.of_instance(steady.home.instance)}
    again = await lifecycle.up(steady.settings, [steady.models])
    assert again.was_running
    for asked, said in (((1, False), "without --port 1:"), ((None, True), "without --no-auth:")):
        with pytest.raises(ConfigError, match=said):
            lifecycle.check_runs_as(again.running, port=asked[0], no_auth=asked[1])
    lifecycle.check_runs_as(again.running, port=int(again.running.url.rpartition(":")[2]), no_auth=False)
    assert again.running.host == steady.running.host
    assert before <= {process.pid for process in processes.of_instance(steady.home.instance)}


async def test_other_files_on_a_second_up_are_refused(steady: Platform, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text((steady.models / "first.yaml").read_text())
    with pytest.raises(ConfigError, match="runs already with -f"):
        await lifecycle.up(steady.settings, [other])


async def test_adding_and_removing_a_model_touches_only_that_model(steady: Platform) -> None:
    before = await steady.pids("first") | await steady.pids("second")
    steady.define("third")
    await steady.until("third", lambda entry: entry.ready and entry.replicas_ready)
    assert (await steady.ask("third")).status_code == 200
    steady.remove("third")

    async def is_gone() -> bool:
        return "third" not in await steady.entries() and not await steady.pids("third")

    await await_until(is_gone, timeout=60.0)
    assert (await steady.ask("third")).status_code == 404
    assert await steady.pids("first") | await steady.pids("second") == before


async def test_a_change_proves_itself_beside_the_old_and_takes_over(steady: Platform) -> None:
    (old,) = (await steady.entries())["first"].revisions
    others = await steady.pids("second")
    steady.define("first", engine={"name": "simulated", "maxSlots": 3})
    entry = await steady.until("first", lambda entry: entry.revisions and old not in entry.revisions)
    assert entry.slots == 3
    assert (await steady.ask("first")).status_code == 200
    await steady.until(
        "first", lambda entry: all(c.reason != "Draining" for c in entry.conditions), timeout=60.0
    )
    assert await steady.pids("second") == others


async def test_a_scaling_change_is_in_place(steady: Platform) -> None:
    before = await steady.pids("first")
    steady.define("first", scaling={"minReplicas": 2, "maxReplicas": 2})

    async def has_two() -> bool:
        return len(await steady.pids("first")) == 2

    await await_until(has_two, timeout=60.0)
    assert before <= await steady.pids("first")


async def test_a_revision_that_fails_leaves_the_old_one_serving(steady: Platform) -> None:
    revisions = (await steady.entries())["first"].revisions
    steady.define("first", engine={"name": "simulated", "args": {"no_such_argument": 1}})
    entry = await steady.until(
        "first", lambda entry: any(c.reason == "RevisionFailed" for c in entry.conditions)
    )
    assert entry.revisions == revisions
    assert entry.ready
    assert "no_such_argument" in next(c.message for c in entry.conditions if c.type == "Degraded")
    assert (await steady.ask("first")).status_code == 200


async def test_an_invalid_file_is_refused_and_what_ran_goes_on(steady: Platform) -> None:
    before = await steady.pids("first")
    steady.define("first", precision="fp16")
    await await_until(lambda: steady.running.problems, timeout=30.0)
    assert "spec.precision" in steady.running.problems[0].field
    assert steady.running.problems[0].value == "'fp16'"
    assert await steady.pids("first") == before
    assert (await steady.ask("first")).status_code == 200
    steady.define("first")
    await await_until(lambda: not steady.running.problems, timeout=30.0)


async def test_a_missing_checkpoint_is_one_sentence_in_status_and_answer(steady: Platform) -> None:
    steady.define("lost", engine={"name": "transformers"}, source={"uri": "/nowhere/at/all"})
    entry = await steady.until("lost", lambda entry: entry.reason == "SourceNotFound")
    assert "There is no folder at /nowhere/at/all" in entry.message
    answer = await steady.ask("lost")
    assert answer.status_code == 503
    assert "There is no folder at" in answer.json()["error"]["message"]


async def test_a_model_at_zero_wakes_for_a_request_and_sleeps_again(steady: Platform) -> None:
    steady.define("sleepy", scaling={"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 1})
    await steady.until("sleepy", lambda entry: entry.reason == "Asleep")
    assert (await steady.ask("sleepy")).status_code == 200
    await steady.until("sleepy", lambda entry: entry.reason == "Asleep")


async def test_a_parked_model_wakes_from_memory_until_it_is_removed(steady: Platform, tmp_path: Path) -> None:
    def holders() -> list[psutil.Process]:
        return [each for each in processes.of_instance(steady.home.instance) if HOLDER in command(each)]

    def define(zero: str) -> None:
        steady.define(
            "parked",
            engine={"name": "transformers", "maxSlots": 2},
            source={"uri": str(checkpoint)},
            scaling={"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 1, "zero": zero},
        )

    checkpoint = tiny(tmp_path / "llama", "llama")
    define("Parked")
    await steady.until("parked", lambda entry: "weights are parked" in entry.message, timeout=240.0)
    (before,) = holders()
    assert (await steady.ask("parked")).status_code == 200
    log = await asyncio.to_thread((steady.home.logs / "replica-parked.log").read_text)
    assert "loads parked weights" in log
    assert "the self-check passed as it is remembered" in log
    assert list((steady.home.node / "checks").iterdir())
    await steady.until("parked", lambda entry: "weights are parked" in entry.message, timeout=120.0)
    assert holders() == [before]
    define("Empty")  # in place: the revision stays
    await await_until(lambda: not holders(), timeout=60.0)
    entry = await steady.until("parked", lambda entry: entry.reason == "Asleep")
    assert "parked" not in entry.message


async def test_four_that_sleep_take_turns_in_the_room_of_two(steady: Platform) -> None:
    cores = ((os.cpu_count() or 1) - 0.5) / 2
    names = [f"turn{number}" for number in range(4)]
    for name in names:
        scaling = {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 3600}
        steady.define(name, resources={"cpus": cores}, scaling=scaling)
    for name in names:
        await steady.until(name, lambda entry: entry.ready, timeout=120.0)
    for name in (*names, names[0]):
        assert (await steady.ask(name)).status_code == 200
    # The two that were asked last are awake, though nobody's idleSeconds are over.
    awake = {stats.model for stats in await steady.replicas()} & {*names}
    assert awake <= {names[3], names[0]}
    for name in names:
        assert (await steady.until(name, lambda entry: entry.ready)).reason in ("Serving", "Asleep")


async def test_a_lost_application_comes_back(steady: Platform) -> None:
    async with ServeApi(steady.running.ray_url, token=steady.running.ray_token) as api:
        await api.put({"proxy_location": "Disabled", "applications": []})

        async def both() -> bool:
            states = (await api.get()).applications.values()
            return sorted(state.status for state in states) == ["RUNNING", "RUNNING"]

        await await_until(both, timeout=90.0)
    await steady.until("first", lambda entry: entry.replicas_ready, timeout=60.0)
    assert (await steady.ask("first")).status_code == 200


async def test_a_killed_serve_controller_comes_back(steady: Platform) -> None:
    before = await steady.pids("first")
    (controller,) = [
        process
        for process in processes.of_instance(steady.home.instance)
        if command(process)[:1] == ["ray::ServeController"]
    ]
    controller.kill()
    steady.define("third")
    await steady.until("third", lambda entry: entry.ready and entry.replicas_ready, timeout=120.0)
    assert (await steady.ask("first")).status_code == 200
    assert await steady.pids("first") == before


async def test_the_gateway_comes_back_at_the_same_address(steady: Platform) -> None:
    url, old = steady.running.url, part(steady, "gateway")
    os.kill(old, signal.SIGKILL)
    await await_until(lambda: part(steady, "gateway") != old, timeout=60.0)
    assert steady.running.url == url

    async def answers() -> bool:
        try:
            return (await steady.ask("first")).status_code == 200
        except httpx.HTTPError:
            return False

    await await_until(answers, timeout=60.0)


async def test_redis_comes_back_with_its_data(steady: Platform) -> None:
    old = part(steady, "redis")
    os.kill(old, signal.SIGKILL)
    await await_until(lambda: part(steady, "redis") != old, timeout=60.0)
    assert (await steady.entries()).keys() == {"first", "second"}

    async def answers() -> bool:
        return (await steady.ask("first")).status_code == 200

    await await_until(answers, timeout=60.0)


async def test_what_a_flush_took_comes_back_by_itself(steady: Platform) -> None:
    async with Connection(steady.running.redis_url, name="test") as connection:
        keys = Keys(connection, key_prefix=steady.running.key_prefix)
        (before,) = await keys.list()
        await connection.call("FLUSHALL")
        await await_until(keys.list)
        (after,) = await keys.list()
        assert (after.name, after.prefix) == (before.name, before.prefix)
    for name in ("first", "second"):
        await steady.until(name, lambda entry: entry.ready and entry.replicas_ready, timeout=90.0)

    async def answers() -> bool:
        return (await steady.ask("first")).status_code == 200

    await await_until(answers, timeout=60.0)


async def test_a_file_of_the_worst_kind_is_refused_and_the_host_lives(steady: Platform) -> None:
    host = steady.running.host
    (steady.models / "bad.yaml").write_text("a: &a [*a]\nsince: 2024-02-30\n")
    await await_until(lambda: any("bad.yaml" in problem.field for problem in steady.running.problems))
    assert steady.running.host == host
    assert (await steady.ask("first")).status_code == 200


async def test_what_serve_stores_names_the_redis_and_ray_opens_no_metrics(steady: Platform) -> None:
    running = steady.running
    headers = {"x-ray-authorization": f"Bearer {running.ray_token}"}
    headers["authorization"] = f"Bearer {running.ray_token}"
    async with httpx.AsyncClient(timeout=5.0) as client:
        stored = await client.get(f"{running.ray_url}/api/serve/applications/", headers=headers)
        assert "env:TG_REDIS_URL" in stored.text
        assert running.redis_url not in stored.text
        for process in processes.of_instance(steady.home.instance, "ray"):
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN and not socket.laddr.ip.startswith("127."):
                    with suppress(httpx.HTTPError):  # gRPC does not answer in HTTP/1
                        answer = await client.get(f"http://127.0.0.1:{socket.laddr.port}/metrics")
                        assert not answer.is_success, (command(process), answer.text[:80])


async def test_a_killed_ray_comes_back_and_nothing_is_proved_again(steady: Platform) -> None:
    old = part(steady, "ray raylet")
    os.kill(old, signal.SIGKILL)
    await await_until(lambda: part(steady, "ray raylet") != old, timeout=120.0)
    entry = await steady.until("first", lambda entry: entry.ready and entry.replicas_ready, timeout=120.0)
    assert entry.revisions
    assert (await steady.ask("first")).status_code == 200


async def test_down_leaves_no_process_and_no_temporary_file_also_after_a_kill(tmp_path: Path) -> None:
    models = tmp_path / "none"
    models.mkdir()
    settings = Settings(home=tmp_path / "home", port=0)
    home = Home(settings.home)
    try:
        async with asyncio.timeout(120):
            started = await lifecycle.up(settings, [models])
        assert started.model is None
        psutil.Process(started.running.host.pid).kill()
        await await_until(lambda: not started.running.host.is_alive())
        assert (await lifecycle.status(settings)).leftovers > 0
        port = int(started.running.url.rpartition(":")[2])  # the orphan of the gateway holds it
        async with asyncio.timeout(120):
            again = await lifecycle.up(settings.model_copy(update={"port": port}), [models])
        assert again.running.url == started.running.url
        psutil.Process(again.running.host.pid).kill()
        await await_until(lambda: not again.running.host.is_alive())
        assert await lifecycle.down(settings)
        assert processes.of_instance(home.instance) == []
        assert not home.temporary.exists()
        assert home.key.exists()
        assert not await lifecycle.down(settings)
    finally:
        await lifecycle.clean(settings)
    assert not home.data.exists()
    assert not home.key.exists()


async def test_the_control_api_changes_what_runs_until_the_file_does(steady: Platform) -> None:
    running = steady.running
    assert steady.home.record.stat().st_mode & 0o777 == 0o600
    headers = {"authorization": f"Bearer {running.control_key}"}
    async with httpx.AsyncClient(base_url=running.control_url, headers=headers, trust_env=False) as api:
        by_clients_key = await api.get("/v1/models", headers={"authorization": f"Bearer {running.key}"})
        assert by_clients_key.status_code == 403
        assert (await steady.ask("first", key=running.control_key)).status_code == 401
        before = await steady.pids("first")
        two = {"min_replicas": 2, "max_replicas": 2}
        plan = (await api.post("/v1/models/first/scale?dryRun=true", json=two)).json()
        assert (plan["replicas_now"], plan["replicas_peak"]) == (1, 2)
        scaled = await api.post("/v1/models/first/scale", json=two)
        assert scaled.json()["is_overlaid"]

        async def has_two() -> bool:
            return len(await steady.pids("first")) == 2

        await await_until(has_two, timeout=60.0)
        assert before <= await steady.pids("first")
        drained = await api.post("/v1/models/second/drain", json={})
        assert drained.json()["drains"]
        await steady.until("second", lambda entry: entry.reason == "Drained")
        assert (await steady.ask("second")).status_code == 503

        async def has_none() -> bool:
            return not await steady.pids("second")

        await await_until(has_none, timeout=60.0)
        await api.post("/v1/models/second/drain", json={"drain": False})
        await steady.until("second", lambda entry: entry.ready and entry.replicas_ready)
        assert (await steady.ask("second")).status_code == 200
        steady.define("first", scaling={"minReplicas": 1, "maxReplicas": 3})

        async def is_the_files() -> bool:
            model = (await api.get("/v1/models/first")).json()
            return not model["is_overlaid"] and model["spec"]["scaling"]["maxReplicas"] == 3

        await await_until(is_the_files, timeout=30.0)
        noted = (await api.get("/v1/audit")).json()["items"]
        assert [entry["what"] for entry in noted][:3] == ["drain", "drain", "scale"]


async def test_a_restart_brings_fresh_replicas_beside_the_old(steady: Platform) -> None:
    before = await steady.pids("first")
    revisions = (await steady.entries())["first"].revisions
    running = steady.running
    headers = {"authorization": f"Bearer {running.control_key}"}
    async with httpx.AsyncClient(base_url=running.control_url, headers=headers, trust_env=False) as api:
        assert (await api.post("/v1/models/first/restart")).status_code == 202
    answers = []

    async def is_fresh() -> bool:
        answers.append((await steady.ask("first")).status_code)
        now = await steady.pids("first")
        return bool(now) and not now & before

    await await_until(is_fresh, timeout=90.0)
    assert set(answers) == {200}
    assert (await steady.entries())["first"].revisions == revisions

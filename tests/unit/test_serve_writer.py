"""The one writer of the Serve config: it writes changes only, and one bad application harms no other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.control.builders import REPLICAS, model
from tidegate.control.observed import ApplicationState, ServeState
from tidegate.control.serve_config import Application, application_configs
from tidegate.serve_api import ServeRejected, ServeUnavailable
from tidegate.serve_writer import RETRY_SECONDS, ServeWriter


class Serve:
    """Takes a config whole or refuses it whole, as Ray's does; reports defaults beside what it was given."""

    def __init__(self, *bad: str) -> None:
        self.held: dict[str, Mapping[str, Any]] = {}
        self.puts: list[list[str]] = []
        self.bad = set(bad)  # "name" or "name@idle seconds"
        self.is_down = False

    async def put(self, config: Mapping[str, Any]) -> None:
        if self.is_down:
            raise ServeUnavailable("no answer")
        names = [each["name"] for each in config["applications"]]
        self.puts.append(names)
        for each in config["applications"]:
            model = each["name"].partition("--")[0]
            idle = each["deployments"][0]["autoscaling_config"]["downscale_to_zero_delay_s"]
            if {model, f"{model}@{idle:g}"} & self.bad:
                raise ServeRejected(f"{model} is wrong")
        self.held = {
            each["name"]: {**each, "external_scaler_enabled": False} for each in config["applications"]
        }

    def state(self) -> ServeState:
        return ServeState(
            "c",
            {name: ApplicationState(name, "RUNNING", config=config) for name, config in self.held.items()},
        )

    def idle(self, name: str) -> float:
        found = self.held[f"{name}--r"]["deployments"][0]["autoscaling_config"]["downscale_to_zero_delay_s"]
        return float(found)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def app(name: str, idle: float = 300) -> Application:
    spec = model(name, scaling={"idleSeconds": idle}).spec
    return Application(name, "r", spec, "", keep_awake=False)


async def write(writer: ServeWriter, serve: Serve, wanted: Iterable[Application]) -> Mapping[str, str]:
    """What is refused after it."""
    before = len(serve.puts)
    has_sent = await writer.write(serve, application_configs(wanted, REPLICAS), serve.state())
    assert has_sent == (len(serve.puts) > before or serve.is_down)
    return writer.rejected


async def test_the_same_again_writes_nothing() -> None:
    serve, writer = Serve(), ServeWriter()
    assert await write(writer, serve, [app("a"), app("b")]) == {}
    assert await write(writer, serve, [app("a"), app("b")]) == {}
    assert len(serve.puts) == 1
    # Nor does another writer, as after a restart.
    await write(ServeWriter(), serve, [app("a"), app("b")])
    assert len(serve.puts) == 1


async def test_a_change_and_a_removal_are_written() -> None:
    serve, writer = Serve(), ServeWriter()
    await write(writer, serve, [app("a"), app("b")])
    await write(writer, serve, [app("a", 9)])
    assert (list(serve.held), serve.idle("a")) == (["a--r"], 9)


async def test_a_refused_newcomer_stays_out_and_the_others_come_in() -> None:
    serve, writer = Serve("bad"), ServeWriter()
    refused = await write(writer, serve, [app("a"), app("bad"), app("c")])
    assert dict(refused) == {"bad--r": "bad is wrong"}
    assert list(serve.held) == ["a--r", "c--r"]
    count = len(serve.puts)
    assert dict(await write(writer, serve, [app("a"), app("bad"), app("c")])) == dict(refused)
    assert len(serve.puts) == count, "what was refused is not sent again and again"


async def test_a_refused_change_leaves_the_last_good_one() -> None:
    serve, writer = Serve("b@9"), ServeWriter()
    await write(writer, serve, [app("a"), app("b")])
    refused = await write(writer, serve, [app("a", 7), app("b", 9)])
    assert dict(refused) == {"b--r": "b is wrong"}
    assert (serve.idle("a"), serve.idle("b")) == (7, 300)
    # Others go on changing beside it.
    assert dict(await write(writer, serve, [app("a", 8), app("b", 9), app("c")])) == dict(refused)
    assert (serve.idle("a"), list(serve.held)) == (8, ["a--r", "b--r", "c--r"])
    # And a correction is taken at once.
    assert await write(writer, serve, [app("a", 8), app("b", 10), app("c")]) == {}
    assert serve.idle("b") == 10


async def test_a_restarted_writer_keeps_the_good_ones_too() -> None:
    serve = Serve("b@9")
    await write(ServeWriter(), serve, [app("a"), app("b")])
    refused = await write(ServeWriter(), serve, [app("a", 7), app("b", 9)])
    assert (list(refused), serve.idle("a"), serve.idle("b")) == (["b--r"], 7, 300)


async def test_what_goes_goes_also_beside_a_refusal() -> None:
    serve, writer = Serve("bad"), ServeWriter()
    await write(writer, serve, [app("a"), app("b")])
    await write(writer, serve, [app("a"), app("bad")])
    assert list(serve.held) == ["a--r"]


async def test_a_refusal_is_tried_again_in_time() -> None:
    clock = Clock()
    serve, writer = Serve("a"), ServeWriter(now=clock)
    assert await write(writer, serve, [app("a")])
    serve.bad.clear()
    clock.now += RETRY_SECONDS - 1
    assert await write(writer, serve, [app("a")])
    clock.now += 1
    assert await write(writer, serve, [app("a")]) == {}
    assert list(serve.held) == ["a--r"]


async def test_a_refusal_that_nothing_new_explains_is_a_problem_of_the_whole() -> None:
    serve, writer = Serve(), ServeWriter()
    await write(writer, serve, [app("a"), app("b")])
    serve.bad.add("a")
    assert await write(writer, serve, [app("a")]) == {}
    assert writer.problem == ("ServeRejected", "a is wrong")


async def test_silence_is_a_problem_until_serve_answers() -> None:
    serve, writer = Serve(), ServeWriter()
    serve.is_down = True
    await write(writer, serve, [app("a")])
    first = writer.problem
    serve.is_down = False
    assert await write(writer, serve, [app("a")]) == {}
    assert (first, writer.problem) == (("ServeUnavailable", "no answer"), None)
    assert list(serve.held) == ["a--r"]


async def test_what_is_being_deleted_counts_as_gone() -> None:
    serve, writer = Serve(), ServeWriter()
    await write(writer, serve, [app("a")])
    going = ServeState("c", {"a--r": ApplicationState("a--r", "DELETING", config=serve.held["a--r"])})
    assert not await writer.write(serve, {}, going)
    assert len(serve.puts) == 1


sets = st.dictionaries(st.sampled_from("abcde"), st.sampled_from([1.0, 2.0, 3.0]), max_size=5)
faults = st.sets(st.sampled_from([f"{name}@{idle}" for name in "abcde" for idle in (1, 2, 3)]))


@settings(max_examples=150, deadline=None)
@given(st.lists(sets, max_size=5), faults)
async def test_every_good_application_stands_as_wanted(wanted: list[dict[str, float]], bad: set[str]) -> None:
    serve, writer = Serve(*bad), ServeWriter()
    for now in wanted:
        before = {name: serve.idle(name.partition("--")[0]) for name in serve.held}
        refused = await write(writer, serve, [app(name, idle) for name, idle in now.items()])
        for name, idle in now.items():
            if f"{name}@{idle:g}" in bad:
                assert f"{name}--r" in refused
                held = serve.idle(name) if f"{name}--r" in serve.held else None
                assert held == before.get(f"{name}--r"), "a refused change alters nothing"
            else:
                assert serve.idle(name) == idle
                assert f"{name}--r" not in refused
        assert set(serve.held) <= {f"{name}--r" for name in now}

"""Who may have replicas now: room is given out once, nobody at work gives way, everybody gets a turn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.unit.control.builders import model
from tests.unit.control.living_pool import LivingPool
from tidegate.control.observed import Capacity, Group
from tidegate.control.plan import TURNS_SECONDS, PoolPlan
from tidegate.control.reasons import Reason
from tidegate.control.room import seat_of
from tidegate.control.seating import REST_SECONDS
from tidegate.control.turns import Claim, Turns, take_turns

GIB = 1 << 30
LONG = 40  # ticks within which everything here comes to rest


def sleeper(name: str, *, cpus: float = 1, most: int = 1, **spec: Any) -> Any:
    scaling = {"minReplicas": 0, "maxReplicas": most, "idleSeconds": 86_400}
    return model(name, **{"resources": {"cpus": cpus}, "scaling": scaling, **spec})


def laptop(*models: Any, cpus: float = 2) -> LivingPool:
    pool = LivingPool(*models)
    pool.see(capacity=Capacity(cpus, 0))
    return pool


def cluster(*models: Any, group: Group) -> LivingPool:
    pool = LivingPool(*models)
    pool.see(groups=(group,))
    return pool


def ready(plan: PoolPlan) -> set[str]:
    return {name for name, entry in plan.entries.items() if entry.ready}


@pytest.mark.parametrize("where", ["laptop", "cluster"])
def test_thirty_models_of_one_core_on_ten_prove_themselves_in_turn_and_any_ten_are_awake(where: str) -> None:
    models = [sleeper(f"m{number:02}") for number in range(30)]
    pool = laptop(*models, cpus=10)
    if where == "cluster":
        pool = cluster(*models, group=Group("cpu", max_workers=5, cpus=2))
    plan = pool.ticks(LONG)
    assert ready(plan) == {each.name for each in models}
    assert plan.is_settled
    for number in range(20, 30):
        pool.ask(f"m{number}", seconds=60)
    pool.ticks(LONG)
    assert pool.awake() == {f"m{number}" for number in range(20, 30)}
    # An eleventh waits while all ten work, and says by whom; then the one that is idle longest gives way.
    pool.ask("m00")
    plan = pool.ticks(3)
    entry = plan.entries["m00"]
    assert (entry.ready, entry.reason, entry.accepts) == (False, Reason.WaitingForRoom, True)
    assert "1 CPU core" in entry.message
    assert "held by m20, m21, m22, m23 and 6 more" in entry.message
    assert not plan.is_settled
    pool.ticks(2 * LONG)
    assert pool.left("m00") == 0
    assert pool.ended_at_work == []


def test_two_models_that_never_run_together_share_a_gpu() -> None:
    gpu = Group("gpu", gpus_per_worker=1, gpu_memory_bytes=24 * GIB, cpus=8)
    names = ("one", "two")
    pool = cluster(*(sleeper(name, resources={"gpuMemory": "16Gi"}) for name in names), group=gpu)
    assert ready(pool.ticks(LONG)) == {"one", "two"}
    for name in (*names, *names):
        pool.ask(name, seconds=3)
        pool.ticks(LONG)
        assert pool.awake() == {name}
    assert pool.most_gpus == 0.67
    assert (pool.starts["one"], pool.starts["two"]) == (3, 3)


def test_the_longest_idle_gives_way_and_not_before_it_has_rested() -> None:
    pool = laptop(*(sleeper(name) for name in "abc"))
    pool.ticks(LONG)
    for name in "ba":
        pool.ask(name)
        pool.ticks(3 + int(REST_SECONDS))
    assert pool.awake() == {"a", "b"}
    pool.ask("c")
    pool.ticks(6)
    assert pool.awake() == {"a", "c"}


def test_who_was_just_asked_is_left_a_moment() -> None:
    pool = laptop(sleeper("a"), sleeper("b"), cpus=1)
    pool.ticks(LONG)
    pool.ask("a")
    pool.ticks(3)
    before = pool.now
    pool.ask("b")
    while "a" in pool.awake():
        pool.tick()
    assert pool.now - before >= REST_SECONDS - 2
    pool.ticks(4)
    assert pool.awake() == {"b"}


def test_a_large_one_is_not_starved_by_small_ones_that_alternate() -> None:
    """They are never idle at the same moment; each leaves when it is, and waits behind the large one."""
    pool = laptop(sleeper("big", cpus=2), sleeper("one"), sleeper("two"))
    pool.ticks(LONG)
    for name in ("one", "two"):
        pool.ask(name, 5)
    pool.ticks(3)
    pool.ask("big")
    for tick in range(4 * LONG):
        if tick % 20 == 0:
            pool.ask("one", seconds=12)
        if tick % 20 == 10:
            pool.ask("two", seconds=12)
        pool.tick()
        if pool.starts["big"] == 2:
            return
    raise AssertionError("it never had its turn")


def test_a_small_one_passes_where_it_hinders_nobody() -> None:
    pool = laptop(sleeper("long", cpus=3), sleeper("large", cpus=3), sleeper("small"), cpus=4)
    pool.ticks(LONG)
    pool.ask("long", seconds=200)
    pool.ticks(10)
    pool.ask("large")
    pool.ticks(2)
    pool.ask("small")
    pool.ticks(5)
    assert pool.awake() == {"long", "small"}


def test_a_request_waits_for_the_proof_that_runs_and_one_more_at_most() -> None:
    pool = laptop(sleeper("asked"), cpus=1)
    pool.ticks(LONG)
    pool.models += [sleeper(f"new{number}") for number in range(8)]
    while pool.starts.total() < 3:
        pool.tick()
    pool.ask("asked")
    while "asked" not in pool.awake():
        pool.tick()
    assert len([name for name in pool.starts if name.startswith("new")]) <= 3
    assert ready(pool.ticks(3 * LONG)) == {each.name for each in pool.models}


def test_load_takes_free_room_and_nobody_is_sent_away_for_it() -> None:
    pool = laptop(sleeper("loaded", most=3), sleeper("idle"), cpus=3)
    pool.ticks(LONG)
    pool.ask("idle")
    pool.ticks(10)
    for _ in range(12):
        pool.ask("loaded", seconds=30)
    pool.ticks(10)
    assert len(next(each for name, each in pool.served.items() if name.startswith("loaded")).live) == 2
    assert "idle" in pool.awake()


def test_more_that_is_always_there_takes_its_room_when_others_are_idle() -> None:
    pool = laptop(sleeper("idle"), model("fixed", resources={"cpus": 1}), cpus=2)
    pool.ticks(LONG)
    pool.ask("idle", seconds=20)
    pool.ticks(5)
    pool.models[1] = model("fixed", resources={"cpus": 1}, scaling={"minReplicas": 2, "maxReplicas": 2})
    plan = pool.ticks(3)
    assert plan.entries["fixed"].ready
    progressing = next(each for each in plan.entries["fixed"].conditions if each.type == "Progressing")
    assert (progressing.reason, "held by idle" in progressing.message) == ("WaitingForRoom", True)
    pool.ticks(LONG)
    assert pool.awake() == {"fixed"}
    assert pool.ended_at_work == []


def test_on_one_machine_what_never_sleeps_and_never_fits_is_told() -> None:
    pool = laptop(*(model(name, resources={"cpus": 1}) for name in "abc"), cpus=2)
    entry = pool.ticks(LONG).entries["c"]
    assert (entry.ready, entry.reason) == (False, Reason.WaitingForRoom)
    assert "held by a and b: none of them may sleep (minReplicas)" in entry.message


def test_with_room_for_all_nothing_is_bounded_and_nothing_is_written() -> None:
    pool = laptop(sleeper("a", most=2), model("b"), cpus=4)
    plan = pool.ticks(LONG)
    for each in plan.applications:
        assert each.granted == each.spec.scaling.max_replicas
        assert not each.leaves
    assert plan.next_at is None
    pool.ask("a", seconds=5)
    assert all(kept.waits_since == 0 for kept in pool.tick().records["a"].revisions.values())


def test_where_not_all_fit_the_next_look_is_soon() -> None:
    pool = laptop(sleeper("a"), sleeper("b"), cpus=1)
    pool.ticks(LONG)
    pool.ask("a", seconds=1000)
    plan = pool.ticks(5)
    assert plan.is_settled
    assert plan.next_at == pool.now - 1 + TURNS_SECONDS


def test_where_kubernetes_has_fewer_nodes_than_the_pool_may_take_they_take_turns_all_the_same() -> None:
    models = [sleeper(f"m{number}") for number in range(6)]
    pool = cluster(*models, group=Group("cpu", max_workers=5, cpus=1))
    pool.nodes = 2
    assert ready(pool.ticks(3 * LONG)) == {each.name for each in models}
    for name in ("m0", "m3", "m5", "m1"):
        pool.ask(name)
        pool.ticks(LONG)
        assert pool.left(name) == 0
    assert pool.ended_at_work == []


def test_idle_ones_that_ray_has_spread_over_all_workers_give_way_to_a_large_one() -> None:
    """There is room in all, but in no worker; only one of them has to go, the one that is idle longest."""
    pool = cluster(*(sleeper(name) for name in "abc"), group=Group("cpu", max_workers=3, cpus=4))
    pool.ticks(LONG)
    assert len({each.node for served in pool.served.values() for each in served.live}) == 3
    for name in "cab":
        pool.ask(name)
        pool.ticks(LONG)
    pool.models.append(sleeper("large", cpus=4))
    assert "large" in ready(pool.ticks(LONG))
    assert pool.awake() == {"large", "a", "b"}


def test_the_longest_idle_goes_whatever_worker_it_is_on() -> None:
    pool = cluster(*(sleeper(f"m{number}") for number in range(9)), group=Group("cpu", max_workers=4, cpus=2))
    pool.ticks(LONG)
    for number in (3, 1, 4, 0, 5, 2, 6, 7):
        pool.ask(f"m{number}")
        pool.ticks(15)
    assert "m8" not in pool.awake()
    pool.ask("m8")
    pool.ticks(8)
    assert pool.awake() == {f"m{number}" for number in range(9)} - {"m3"}


def test_since_when_it_waits_is_kept_and_forgotten() -> None:
    pool = laptop(sleeper("a"), sleeper("b"), cpus=1)
    pool.ticks(LONG)
    pool.ask("a", seconds=20)
    pool.ticks(3)
    pool.ask("b")
    pool.tick()
    began = pool.now - 1
    plan = pool.ticks(5)
    assert [kept.waits_since for kept in plan.records["b"].serving] == [began]
    assert [kept.waits_since for kept in pool.ticks(LONG).records["b"].serving] == [0]


def claim(name: str, **changes: Any) -> Claim:
    values: dict[str, Any] = {
        "key": (name, "r"),
        "group": "g",
        "seat": seat_of(0, 1, 0),
        "staying": ["n"] * changes.get("present", 0),
        "ending": (),
        "present": 0,
        "least": 0,
        "due": 0,
        "wanted": 0,
        "most": 1,
    }
    return Claim(**{**values, **changes})


def turns(*claims: Claim, cpus: float = 2) -> Turns:
    return take_turns(claims, [Group("g", cpus=cpus)], now=100.0)


def test_what_ends_still_takes_room_and_is_counted_by_nobody_else() -> None:
    found = turns(claim("a", due=1), claim("ends", ending=["n", "n"]))
    assert found.granted == {("a", "r"): 0, ("ends", "r"): 0}
    assert set(found.waiting) == {("a", "r")}


def test_more_than_fits_gets_nothing_more() -> None:
    """As after a pool was made smaller."""
    found = turns(claim("a", present=3, due=1), claim("b"), cpus=2)
    assert found.granted == {("a", "r"): 3, ("b", "r"): 0}


def test_what_was_granted_stays_granted_until_it_stands() -> None:
    found = turns(claim("late", due=1, is_entitled=True), claim("early", due=1, waits_since=1.0), cpus=1)
    assert found.granted == {("late", "r"): 1, ("early", "r"): 0}


shares = st.builds(
    seat_of, st.sampled_from([0, 0.1, 0.34, 0.67, 1, 2]), st.sampled_from([0, 0.5, 1, 3]), st.integers(0, 4)
)
any_claims = st.lists(
    st.builds(
        lambda seat, ending, present, least, load, more, flags, idle: {
            "seat": seat,
            "ending": ["n"] * ending,
            "present": present,
            "least": least,
            "due": max(least, load),
            "wanted": max(least, load) + more,
            "most": max(least, load) + 2 * more,
            "is_entitled": flags[0],
            "is_proof": flags[1] and not least,
            "waits_since": float(idle),
            "idle_since": float(idle) if not max(least, load) and flags[2] else None,
        },
        shares,
        st.integers(0, 1),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 1),
        st.integers(0, 2),
        st.tuples(st.booleans(), st.booleans(), st.booleans()),
        st.integers(1, 90),
    ),
    max_size=10,
)


@settings(max_examples=200, deadline=None)
@given(any_claims, st.integers(1, 3), st.integers(0, 2))
def test_of_any_claims(wishes: list[dict[str, Any]], workers: int, gpus: int) -> None:
    claims = [claim(f"m{number}", **wish) for number, wish in enumerate(wishes)]
    group = Group("g", gpus, 24 * GIB, workers, 0, 4, 8)
    found = take_turns(claims, [group], now=100.0)
    by_key = {each.key: each for each in claims}
    assert found.granted.keys() == by_key.keys()
    for key, granted in found.granted.items():
        asking = by_key[key]
        assert asking.present <= granted <= max(asking.most, asking.present), "nobody is cut down"
        assert (key in found.waiting) == (granted < asking.due)
    assert all(by_key[key].idle_since is not None for key in found.leaving), "nobody at work goes"
    assert not found.leaving or found.waiting, "nobody goes for nothing"
    extra = {key for key in by_key if found.granted[key] > by_key[key].present}
    held = [(by_key[key], granted + len(by_key[key].ending)) for key, granted in found.granted.items()]
    if extra:
        assert sum(each.seat.cpus_milli * count for each, count in held) <= workers * 4000
        assert sum(each.seat.hundredths * count for each, count in held) <= workers * gpus * 100
        assert sum(each.seat.memory_bytes * count for each, count in held) <= workers * 8


sizes = st.sampled_from([0.5, 1, 1, 2, 3])
events = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=25
)


# Shrinking takes longer than a test may, and the example tells as much.
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.lists(st.tuples(sizes, st.integers(1, 3), st.sampled_from([0, 0, 0, 1])), min_size=1, max_size=10),
    st.integers(3, 5),
    st.sampled_from([0, 1, 2]),
    events,
)
def test_room_is_never_given_twice_nobody_is_ended_at_work_and_every_request_is_answered(
    crowd: list[tuple[float, int, int]], cpus: int, workers: int, asked: list[tuple[int, int, int]]
) -> None:
    """`LivingPool` asserts the room with every tick."""
    models = []
    for number, (size, most, least) in enumerate(crowd):
        scaling = {"minReplicas": min(least, most), "maxReplicas": most, "idleSeconds": 86_400}
        models.append(model(f"m{number}", resources={"cpus": size}, scaling=scaling))
    fixed = sum(size for size, _, least in crowd if least)
    largest = max(size for size, _, _ in crowd)
    if fixed + largest > cpus:  # otherwise some can never run
        models = [sleeper(each.name, cpus=each.spec.resources.cpus) for each in models]
    pool = laptop(*models, cpus=cpus)
    if workers:
        pool = cluster(*models, group=Group("cpu", max_workers=workers, cpus=cpus))
    assert ready(pool.ticks(30 + 12 * len(models))) == {each.name for each in models}
    for number, seconds, pause in asked:
        pool.ask(models[number % len(models)].name, seconds)
        pool.ticks(pause)
    for _ in range(60 * len(asked)):
        if not any(pool.work.values()):
            break
        pool.tick()
    assert not any(pool.work.values()), "a request was never answered"
    assert pool.ended_at_work == []

"""What the scenarios make of their rounds: pure, from tallies to judged figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtests.figures import Section
from loadtests.generator import Tally
from loadtests.measure import Run
from loadtests.scenarios import (
    choices,
    connections,
    crowd,
    engine,
    idle,
    peers,
    quiet,
    short,
    split,
    streams,
    wake,
    warm,
)
from loadtests.wrk import ShortRun


def verdicts(section: Section) -> dict[str, str]:
    return {figure.name: figure.goal.verdict(figure.value) for figure in section.figures if figure.goal}


def values(section: Section) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in section.figures}


def stream_run(events: int, ttft: float, cpu: dict[str, float], **tally: object) -> Run:
    whole = Tally(
        window_seconds=10.0,
        window_events=events,
        tokens=events,
        events=events,
        finished=10,
        statuses={"200": 10},
        token_counts={"100": 10},
        ttft=[ttft] * 10,
        gaps=[0.02] * 10,
    )
    for name, value in tally.items():
        setattr(whole, name, value)
    return Run(whole, cpu, 0.1)


DIRECT = stream_run(64_000, 0.030, {"direct": 0.9, "generator": 0.7})
PLATFORM = stream_run(63_990, 0.0315, {"gateway": 2.0, "redis": 1.0, "replica": 0.8, "generator": 0.9})


def test_streams_judge_ratio_latency_and_cost() -> None:
    section = streams.summarize(128, 50, [(DIRECT, PLATFORM)], fastest=12_750)
    assert set(verdicts(section).values()) == {"aim met"}
    found = values(section)
    assert found["tok/s of direct"] == pytest.approx(63_990 / 64_000)
    assert found["added TTFT p50"] == pytest.approx(1.5)
    assert found["CPU s per 1,000 tokens (gateway + Redis + replica)"] == pytest.approx(3.8 / 63.99)
    assert any("the ratio counts" in remark for remark in section.remarks)


def test_streams_of_a_slow_generator_do_not_count() -> None:
    section = streams.summarize(128, 50, [(DIRECT, PLATFORM)], fastest=9_000)
    assert any("does not count" in remark for remark in section.remarks)


def test_streams_of_a_platform_whose_processes_are_unknown_have_no_cost() -> None:
    section = streams.summarize(128, 50, [(DIRECT, replace(PLATFORM, cpu={"generator": 0.9}))], 12_800)
    assert verdicts(section)["CPU s per 1,000 tokens (gateway + Redis + replica)"] == "not measured"


def test_streams_tell_what_went_wrong() -> None:
    broken = stream_run(60_000, 0.03, {"gateway": 1.0}, broken_streams=2, statuses={"200": 8, "503": 1})
    section = streams.summarize(128, 50, [(DIRECT, broken)], 12_800)
    assert any("503" in remark and "unfinished 2" in remark for remark in section.remarks)


def short_run(finished: int) -> Run:
    tally = Tally(window_seconds=10.0, window_finished=finished, statuses={"200": finished}, durations=[0.01])
    return Run(tally, {"gateway": 5.0, "generator": 1.0})


def test_short_requests_against_both_yardsticks() -> None:
    wrk = {
        name: ShortRun(1, rate, 0, 0, None, None, "wrk")
        for name, rate in (("nginx", 20e3), ("platform", 5e3))
    }
    section = short.summarize(
        short.Findings(
            short_run(500_000), [short_run(200_000)], [short_run(100_000)], [short_run(40_000)], wrk
        )
    )
    found = values(section)
    assert found["requests per second"] == 4000
    assert found["of nginx in the same run"] == pytest.approx(0.2)
    assert found["of that"] == pytest.approx(0.4)
    assert ["platform of nginx", "0.250", ""] in section.tables[-1][1]
    assert not any("lower bound" in remark for remark in section.remarks)


def test_short_requests_without_nginx_and_wrk_say_so() -> None:
    section = short.summarize(short.Findings(short_run(50_000), [], [], [short_run(40_000)], {}))
    assert verdicts(section)["of nginx in the same run"] == "not measured"
    told = " ".join(section.remarks)
    assert "nginx is not installed" in told
    assert "wrk is not installed" in told
    assert "lower bound" in told


def test_a_quiet_request_is_charged_what_it_adds() -> None:
    section = quiet.summarize({"whole answer": [(DIRECT, PLATFORM)]})
    assert values(section)["whole answer: added p50"] == pytest.approx(1.5)
    assert verdicts(section)["whole answer: added p50"] == "must met"


def test_patient_clients_use_the_engine_up() -> None:
    section = crowd.summarize_patient([(DIRECT, PLATFORM)], nominal=6400)
    assert set(verdicts(section).values()) == {"must met"}
    assert values(section)["direct, of slots / step time"] == pytest.approx(1.0)


def test_a_lost_stream_of_patient_clients_is_an_error() -> None:
    lost = stream_run(63_990, 0.03, {}, unfinished=1, statuses={"200": 9, "429": 3})
    section = crowd.summarize_patient([(DIRECT, lost)], nominal=6400)
    assert verdicts(section)["errors other than 429"] == "NOT met"
    assert values(section)["429"] == 3


def test_overload_takes_results_and_refusals_with_retry_after() -> None:
    fine = stream_run(3_000, 0.03, {}, statuses={"200": 60, "429": 900})
    assert set(verdicts(crowd.summarize_overload([fine], 300)).values()) == {"must met"}
    rude = stream_run(3_000, 0.03, {}, statuses={"200": 60, "503": 1}, refused_without_retry_after=2)
    assert set(verdicts(crowd.summarize_overload([rude], 300)).values()) == {"NOT met"}


def test_engine_against_plain_generate() -> None:
    plain = {"seconds": 1.0, "tokens": 2048.0, "prefill_seconds": 0.01}
    once = stream_run(2048, 0.03, {}, first_sent=100.0, last_finished=101.25, token_counts={"128": 16})
    arriving = stream_run(2048, 0.05, {}, token_counts={"128": 16})
    section = engine.summarize([engine.Round(plain, once, arriving)])
    found = values(section)
    assert found["tokens/s of one plain batched generate"] == pytest.approx(0.8)
    assert found["staggered: (TTFT p50 - prefill) in decode steps"] == pytest.approx(2.0)
    assert set(verdicts(section).values()) == {"must met"}
    assert "Tokens per answer: 128." in section.remarks


def test_idle_and_warm_are_judged() -> None:
    section = idle.summarize({"gateway": 0.2, "replica": 3.0}, {"gateway": 60.0, "replica": 30.0}, [], 20.0)
    assert verdicts(section) == {
        "idle gateway, of a core": "must met",
        "idle replica, of a core": "NOT met",
        "gateway resident memory": "must met",
        "torch, transformers, ray in the gateway": "must met",
    }
    assert set(verdicts(warm.summarize(80.0, 40.0)).values()) == {"must met"}
    assert set(verdicts(warm.summarize(80.0, 50.0)).values()) == {"NOT met"}


def test_connections_are_judged_by_cpu_and_a_missing_client_is_said() -> None:
    def calls(cpu: float) -> list[dict[str, object]]:
        return [{"calls": 1000, "seconds": 2.0, "cpu": cpu, "latencies": [0.001, 0.002]}] * 3

    section = connections.summarize(
        ["ours", "redis-py"],
        {
            (name, concurrency): calls(cpu)
            for name, cpu in (("ours", 0.1), ("redis-py", 0.12))
            for concurrency in connections.CONCURRENCIES
        },
        {"ours": [{"messages": 100, "cpu": 0.01}], "redis-py": [{"messages": 100, "cpu": 0.02}]},
        {
            "ours": [{"calls": 10, "errors": {}, "gap": 0.004}],
            "redis-py": [{"calls": 10, "errors": {"ConnectionError": 48}, "gap": 0.008}],
        },
    )
    assert verdicts(section) == {
        "CPU of a call, 1 at once: redis-py, of ours": "NOT met",
        "CPU of a call, 16 at once: redis-py, of ours": "NOT met",
        "CPU of a call, 128 at once: redis-py, of ours": "NOT met",
        "CPU of a message: redis-py, of ours": "must met",
    }
    (_, rates), (_, breaks) = section.tables
    assert rates[0] == ["1", "ours", "500", "0.100", "1.00 / 2.00"]
    assert breaks[1] == ["redis-py", "0.2000", "8 ms", "48 (ConnectionError)"]
    assert section.remarks == ["Not installed, left out: coredis."]


def test_a_waking_is_split_into_its_parts() -> None:
    up = {
        "time": "1970-01-01T00:00:02.500Z",
        "began": 1.5,
        "seconds": {"process": 9.0, "Redis": 0.1, "load and report": 0.9},
    }
    parts = wake.parts_of(asked=1.0, seconds=1.75, up=up, starting=1.25)
    assert parts == {
        "noticed, replica asked for": pytest.approx(0.25),
        "process": pytest.approx(0.25),
        "Redis": 0.1,
        "load and report": 0.9,
        "claim, prompt, first step": pytest.approx(0.25),
    }


def test_a_waking_is_judged_above_reading_the_weights() -> None:
    wakings = [wake.Waking(seconds, 1.0, {"process": seconds}) for seconds in (1.0, 2.5, 2.9)]
    large = wake.summarize(wakings, reading=0.75, size=1_000_000_000)
    assert verdicts(large) == {"zero to the first token, above reading": "must met"}
    small = wake.summarize(wakings, reading=0.0, size=8_000_000)
    assert set(verdicts(small).values()) == {"NOT met"}
    assert large.tables[0][1] == [
        ["process", "1.00", "2.50", "2.90"],
        ["first token", "1.00", "2.50", "2.90"],
    ]


def test_the_loop_bounds_what_a_split_gains() -> None:
    before = {7: 1.0, 8: 5.0}
    after = {7: 1.25, 8: 7.0, 9: 0.5}
    measured = split.of_threads(7, 16, 1000, before, after)
    assert measured == split.Measured(16, 1000, engine=2.0, loop=0.25)
    found = values(split.summarize([measured], {16: (0.0008, 0.0016)}))
    assert found["16 streams: engine thread"] == pytest.approx(2000)
    assert found["16 streams: event loop"] == pytest.approx(250)
    assert found["16 streams: most that a split gains"] == pytest.approx(10.0)


def test_choices_are_compared_with_greedy() -> None:
    found = {
        (16, "top_p 0.9", peers.OURS): [0.95, 0.90, 0.93],
        (16, "top_p 0.9", peers.BARE): [0.5],
        (64, "n 8", peers.OURS): [0.89],
        (64, "n 8", peers.BARE): [1.0],
    }
    section = choices.summarize(found)
    assert verdicts(section) == {
        "top_p 0.9, 16 at once, tokens/s of greedy": "must met",
        "n 8, 64 at once, tokens/s of greedy": "NOT met",
    }
    assert section.tables[0][1][0] == ["16", "top_p 0.9", "0.93 (0.95, 0.90, 0.93)", "0.50"]
    assert choices.clients(64, choices.CASES["n 8"]) == 8

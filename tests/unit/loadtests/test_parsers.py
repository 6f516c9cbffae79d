"""What the load tests read from other programs: /proc, wrk, py-spy; and what they write for nginx and wrk."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests import machine
from loadtests.direct import content_length
from loadtests.nginx import proxy_config
from loadtests.profiling import leaders
from loadtests.run import chosen, external_target, parse
from loadtests.scenarios.idle import heavy_libraries
from loadtests.wrk import parse_wrk, wrk_script

WRK = """Running 4s test @ http://127.0.0.1:40000/v1/chat/completions
  1 threads and 64 connections
  Latency Distribution
     50%    2.06ms
     75%    3.10ms
     90%    4.00ms
     99%    1.50s
  106599 requests in 4.01s, 34.66MB read
  Socket errors: connect 0, read 2, write 1, timeout 3
  Non-2xx or 3xx responses: 12
Requests/sec:  26553.62
Transfer/sec:      8.63MB
"""


def test_wrk_output() -> None:
    run = parse_wrk(WRK)
    assert (run.requests, run.requests_per_second) == (106599, 26553.62)
    assert (run.bad_statuses, run.socket_errors) == (12, 6)
    assert run.latency_p50 == pytest.approx(0.00206)
    assert run.latency_p99 == pytest.approx(1.5)


def test_wrk_without_a_rate_is_refused_with_what_it_printed() -> None:
    with pytest.raises(ValueError, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1")


def test_wrk_script_quotes_the_body() -> None:
    script = wrk_script('{"a": "b"}', "tg-secret")
    assert 'wrk.body = "{\\"a\\": \\"b\\"}"' in script
    assert 'wrk.headers["authorization"] = "Bearer tg-secret"' in script
    assert "authorization" not in wrk_script("{}", "")


def test_cpu_seconds_of_a_process_whose_name_has_brackets() -> None:
    fields = ["S", *("0" for _ in range(10)), "250", "50", *("0" for _ in range(30))]
    stat = "42 (a) (b c)) " + " ".join(fields)
    assert machine.parse_stat_seconds(stat) == pytest.approx(300 / machine.CLOCK_TICKS)


def test_busy_seconds_leave_idle_time_and_other_cores_out() -> None:
    stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 10 20 5000 7 3 2 1 0 0\ncpu1 500 0 0 0 0 0 0 0 0 0\nintr 5\n"
    assert machine.parse_busy_seconds(stat, [0]) == pytest.approx(136 / machine.CLOCK_TICKS)


def test_leaders_of_a_profile() -> None:
    raw = "run (a.py:1);send (b.py:2) 30\nrun (a.py:1) 10\nrun (a.py:1);send (b.py:2) 10\nnot a sample\n"
    assert leaders(raw, 1) == [(0.8, "send (b.py:2)")]
    assert leaders("", 5) == []


def test_heavy_libraries_of_a_process() -> None:
    assert heavy_libraries("7f00 r-xp /venv/torch/lib/libtorch_cpu.so") == ["libtorch", "/torch/"]
    assert heavy_libraries("7f00 r-xp /usr/lib/libc.so.6") == []


def test_nginx_proxies_with_keep_alive_and_writes_only_into_its_folder(tmp_path: Path) -> None:
    config = proxy_config(tmp_path, 4000, 5000, workers=2)
    assert "listen 127.0.0.1:4000" in config
    assert "server 127.0.0.1:5000; keepalive" in config
    assert config.count("{") == config.count("}")
    assert all(str(tmp_path) in line for line in config.splitlines() if "_temp_path" in line)


def test_content_length_of_a_request_head() -> None:
    assert content_length(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12") == 12
    assert content_length(b"GET / HTTP/1.1\r\nHost: a") == 0


def test_scenario_names_stand_once_and_groups_open() -> None:
    assert chosen(["short", "path"])[0] == "short"
    assert chosen(["short", "path"]).count("short") == 1
    assert set(chosen(["path"])) < set(chosen(["all"]))


def test_external_platform_from_options() -> None:
    options = parse(["short", "--url", "http://127.0.0.1:8000", "--key", "k", "--pid", "gateway=12"])
    target = external_target(options.url, options.key, options.model, options.pid)
    assert target is not None
    assert (target.host, target.port, target.key) == ("127.0.0.1", 8000, "k")
    assert target.process_ids == {"gateway": 12}
    assert external_target(None, "", "m", []) is None
    with pytest.raises(SystemExit, match="http://HOST:PORT"):
        external_target("ftp://x", "", "m", [])

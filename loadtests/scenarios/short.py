"""Short requests, not streamed, 64 clients: requests per second against nginx as a plain proxy.

The yardstick is nginx with keep-alive on both sides before the very same engine, in turn with the platform.
It stands before two ways to serve that engine: the raw baseline, which costs next to nothing (the strict
figure, and the judged one), and uvicorn, as engines are usually served. Where `wrk` is installed it drives
all of them once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, company, middle, percentile, ratio, spread
from loadtests.machine import Processes
from loadtests.measure import Load, Run, Target, chat_body, run_load
from loadtests.nginx import find_nginx, start_proxy
from loadtests.profiling import profile_during
from loadtests.scenarios.streams import platform_target
from loadtests.stack import EngineShape, start_direct
from loadtests.wrk import ShortRun, find_wrk, run_wrk

CLIENTS = 64
PER_SECOND = Goal("higher", 2000)
NGINX, NGINX_UVICORN = "nginx", "nginx-uvicorn"
OF_NGINX = Goal("higher", 0.17, 0.3)


@dataclass(frozen=True, slots=True)
class Findings:
    direct: Run
    nginx: list[Run]
    nginx_uvicorn: list[Run]
    platform: list[Run]
    wrk: dict[str, ShortRun]


def run(context: Context) -> Section:
    shape = EngineShape(slots=CLIENTS, step_ms=0)
    load = Load(CLIENTS, context.short_tokens, context.seconds, is_stream=False)
    nginx, wrk = find_nginx(), find_wrk()
    with context.processes() as processes:
        direct = start_direct(processes, shape)
        targets = [] if nginx is None else yardsticks(processes, nginx, shape, direct)
        with platform_target(context, processes, shape) as platform:
            targets.append(platform)
            alone = run_load(direct, load)
            runs: dict[str, list[Run]] = {target.name: [] for target in targets}
            for _ in range(context.rounds):
                for target in targets:
                    runs[target.name].append(run_load(target, load))
            by_wrk = {t.name: _by_wrk(wrk, context, t) for t in (direct, *targets)} if wrk else {}
            if context.profile_seconds:
                profile_during(context, platform, load)
    return summarize(
        Findings(alone, runs.get(NGINX, []), runs.get(NGINX_UVICORN, []), runs[platform.name], by_wrk)
    )


def yardsticks(processes: Processes, nginx: str, shape: EngineShape, direct: Target) -> list[Target]:
    """nginx before the raw baseline, and before the same engine behind uvicorn."""
    usual = start_direct(processes, shape, "direct-uvicorn", "loadtests.direct_asgi")
    targets = []
    for name, engine in ((NGINX, direct), (NGINX_UVICORN, usual)):
        proxy, port = start_proxy(processes, nginx, engine.port, workers=2, name=name)
        parts = {"nginx": proxy.pid, **engine.process_ids}
        targets.append(Target(name, "127.0.0.1", port, engine.model, process_ids=parts))
    return targets


def _by_wrk(wrk: str, context: Context, target: Target) -> ShortRun:
    body = chat_body(target.model, context.short_tokens, is_stream=False)
    folder: Path = context.folder
    return run_wrk(wrk, folder, target.url, body, target.key, CLIENTS, context.seconds)


def summarize(findings: Findings) -> Section:
    """Pure: rates are medians over rounds, the ratio is the median of each round's own."""
    mine = [rate(run) for run in findings.platform]
    yardstick = [rate(run) for run in findings.nginx]
    shares = [ratio(one, other) for one, other in zip(mine, yardstick, strict=False)]
    usual = [rate(run) for run in findings.nginx_uvicorn]
    usual_shares = [ratio(one, other) for one, other in zip(mine, usual, strict=False)]
    section = Section("short", f"Short requests, not streamed, {CLIENTS} clients, everything on 2 cores")
    section.figures = [
        Figure("requests per second", middle(mine), "/s", PER_SECOND, 0),
        Figure("of nginx in the same run", middle(shares) if shares else None, "", OF_NGINX, 3),
        Figure("nginx as a plain proxy", middle(yardstick) if yardstick else None, "/s", None, 0),
        Figure("nginx before the engine behind uvicorn", middle(usual), "/s", None, 0),
        Figure("of that", middle(usual_shares), "", None, 3),
        Figure("the generator alone against the engine directly", rate(findings.direct), "/s", None, 0),
    ]
    latencies = [second for run in findings.platform for second in run.tally.durations]
    section.figures += [
        Figure("latency p50", 1000 * percentile(latencies, 50), "ms"),
        Figure("latency p99", 1000 * percentile(latencies, 99), "ms"),
    ]
    section.tables.append(_cost_table(findings.platform))
    if findings.wrk:
        section.tables.append(_wrk_table(findings.wrk))
    section.remarks = [f"Rounds, requests/s: {spread(mine, 0)}; nginx: {spread(yardstick, 0)}."]
    section.remarks.append(company([run.cores_of_others for run in [*findings.nginx, *findings.platform]]))
    if not findings.nginx:
        section.remarks.append("nginx is not installed (Debian: nginx-light): the ratio is not measured.")
    if not findings.wrk:
        section.remarks.append("wrk is not installed (Debian: wrk): only our own generator was used.")
    if rate(findings.direct) < 2 * middle(mine):
        section.remarks.append(
            "The generator alone does not reach twice this rate: the figure is a lower bound."
        )
    bad = {s: n for run in findings.platform for s, n in run.tally.statuses.items() if s != "200"}
    if bad or any(run.tally.connection_errors or run.tally.unfinished for run in findings.platform):
        section.remarks.append(f"Not every request succeeded: {bad}.")
    return section


def rate(run: Run) -> float:
    return run.tally.window_finished / run.tally.window_seconds


def _cost_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    roles = list(runs[0].cpu) if runs else []
    rows = [
        [role, f"{middle([ratio(1e6 * run.cpu[role], run.tally.window_finished) for run in runs]):.0f}"]
        for role in roles
    ]
    return ["process", "CPU µs per request"], rows


def _wrk_table(by_wrk: dict[str, ShortRun]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, f"{run.requests_per_second:.0f}", str(run.bad_statuses + run.socket_errors)]
        for name, run in by_wrk.items()
    ]
    if "nginx" in by_wrk and "platform" in by_wrk:
        share = ratio(by_wrk["platform"].requests_per_second, by_wrk["nginx"].requests_per_second)
        rows.append(["platform of nginx", f"{share:.3f}", ""])
    return ["with wrk instead", "requests/s", "errors"], rows

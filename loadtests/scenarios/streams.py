"""Many paced streams: does the platform keep up with the engine, what does it add, what does it cost?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, company, middle, percentile, ratio, spread
from loadtests.machine import Processes
from loadtests.measure import Load, Run, Target, run_load
from loadtests.profiling import profile_during
from loadtests.stack import EngineShape, start_direct, start_platform

RATIO = Goal("higher", 0.99, 0.999)
ADDED_TTFT_P50_MS = Goal("lower", 5, 2)
ADDED_TTFT_P99_MS = Goal("lower", 15, 5)
CPU_PER_1000_TOKENS = Goal("lower", 0.10, 0.07)
ENOUGH_HEADROOM = 0.98  # of twice the rate, by the generator alone


def run(context: Context, clients: int, tokens_per_second: float, tokens: int) -> Section:
    """`clients` streams at once of `tokens` tokens, the engine giving each `tokens_per_second`."""
    shape = EngineShape(slots=clients, step_ms=1000 / tokens_per_second)
    load = Load(
        clients=clients,
        tokens=tokens,
        seconds=context.seconds,
        stream_seconds=tokens * shape.step_seconds,
        think_seconds=shape.step_seconds,
    )
    with context.processes() as processes:
        direct = start_direct(processes, shape)
        fastest = fastest_rate(processes, shape, load)
        pairs: list[tuple[Run, Run]] = []
        with platform_target(context, processes, shape) as platform:
            for _ in range(context.rounds):
                pairs.append((run_load(direct, load), run_load(platform, load)))
            if context.profile_seconds:
                profile_during(context, platform, load)
    return summarize(clients, tokens_per_second, pairs, fastest)


@contextlib.contextmanager
def platform_target(context: Context, processes: Processes, shape: EngineShape) -> Iterator[Target]:
    if context.external is not None:
        yield context.external
    else:
        yield start_platform(processes, shape).target


def fastest_rate(processes: Processes, shape: EngineShape, load: Load) -> float:
    """Tokens per second that the generator alone takes from a baseline twice as fast."""
    target = start_direct(processes, EngineShape(shape.slots, shape.step_ms / 2), "direct-twice")
    reached = run_load(
        target,
        Load(
            clients=load.clients,
            tokens=load.tokens,
            seconds=min(load.seconds, 8.0),
            stream_seconds=load.stream_seconds / 2,
            think_seconds=load.think_seconds / 2,
        ),
    )
    processes.stop(processes.started[-1])
    return reached.tally.tokens_per_second()


def summarize(
    clients: int, tokens_per_second: float, pairs: list[tuple[Run, Run]], fastest: float
) -> Section:
    """Pure: from the rounds to figures. Every figure is the median over rounds of platform against direct."""
    ratios = [ratio(p.tally.tokens_per_second(), d.tally.tokens_per_second()) for d, p in pairs]
    added = {
        percent: [
            1000 * (percentile(p.tally.ttft, percent) - percentile(d.tally.ttft, percent)) for d, p in pairs
        ]
        for percent in (50, 99)
    }
    headroom = ratio(fastest, 2 * middle([d.tally.tokens_per_second() for d, _ in pairs]))
    costs = [ratio(1000 * p.cpu_total(), p.window_tokens()) for _, p in pairs]
    has_cpu = all(len(p.cpu) > 1 for _, p in pairs)
    section = Section(
        "streams", f"{clients} streams × {tokens_per_second:g} tok/s, simulated engine, everything on 2 cores"
    )
    section.figures = [
        Figure("tok/s of direct", middle(ratios), "", RATIO, 4),
        Figure("added TTFT p50", middle(added[50]), "ms", ADDED_TTFT_P50_MS),
        Figure("added TTFT p99", middle(added[99]), "ms", ADDED_TTFT_P99_MS),
        Figure(
            "CPU s per 1,000 tokens (gateway + Redis + replica)",
            middle(costs) if has_cpu else None,
            "s",
            CPU_PER_1000_TOKENS,
            4,
        ),
    ]
    section.tables = [_side_by_side(pairs), _cpu_table(pairs)]
    section.remarks = [
        f"Rounds, tok/s of direct: {spread(ratios, 4)}; added TTFT p50 ms: {spread(added[50], 2)}; "
        f"p99 ms: {spread(added[99], 2)}.",
        f"Against an engine twice as fast the generator alone takes {headroom:.3f} of twice the rate: "
        + ("the ratio counts." if headroom >= ENOUGH_HEADROOM else "TOO SLOW, the ratio does not count."),
        company([run.cores_of_others for pair in pairs for run in pair]),
        *_troubles(pairs),
    ]
    return section


def _side_by_side(pairs: list[tuple[Run, Run]]) -> tuple[list[str], list[list[str]]]:
    head = ["", "tok/s", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "tokens per event", "requests finished"]
    rows = []
    for name, runs in (("direct", [d for d, _ in pairs]), ("platform", [p for _, p in pairs])):
        ttft = [second for run in runs for second in run.tally.ttft]
        gaps = [second for run in runs for second in run.tally.gaps]
        rows.append(
            [
                name,
                f"{middle([run.tally.tokens_per_second() for run in runs]):.0f}",
                f"{1000 * percentile(ttft, 50):.1f} / {1000 * percentile(ttft, 99):.1f}",
                f"{1000 * percentile(gaps, 50):.1f} / {1000 * percentile(gaps, 99):.1f}",
                f"{middle([run.tally.tokens_per_event() for run in runs]):.3f}",
                str(sum(run.tally.finished for run in runs)),
            ]
        )
    return head, rows


def _cpu_table(pairs: list[tuple[Run, Run]]) -> tuple[list[str], list[list[str]]]:
    roles = list(dict.fromkeys(role for pair in pairs for run in pair for role in run.cpu))
    rows = []
    for role in roles:
        row = [role]
        for runs in ([d for d, _ in pairs], [p for _, p in pairs]):
            found = [ratio(1000 * run.cpu[role], run.window_tokens()) for run in runs if role in run.cpu]
            row.append(f"{middle(found):.4f}" if found else "")
        rows.append(row)
    return ["CPU s per 1,000 tokens", "direct run", "platform run"], rows


def _troubles(pairs: list[tuple[Run, Run]]) -> list[str]:
    found = []
    for name, runs in (("direct", [d for d, _ in pairs]), ("platform", [p for _, p in pairs])):
        tallies = [run.tally for run in runs]
        refused = {s: n for tally in tallies for s, n in tally.statuses.items() if s != "200"}
        broken = sum(tally.broken_streams + tally.connection_errors + tally.unfinished for tally in tallies)
        lengths = {count for tally in tallies for count in tally.token_counts}
        if refused or broken or len(lengths) > 1:
            found.append(
                f"{name}: statuses {refused}, broken or unfinished {broken}, token counts {lengths}."
            )
    return found

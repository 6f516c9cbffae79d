"""One request at a time on an idle platform: what does the way through it add?"""

from __future__ import annotations

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, company, middle, percentile, spread
from loadtests.measure import Load, Run, run_load
from loadtests.scenarios.streams import platform_target
from loadtests.stack import EngineShape, start_direct

ADDED_MS = Goal("lower", 2.0, 0.8)
PAUSE_SECONDS = 0.02  # between requests, so that every process has gone to sleep again


def run(context: Context) -> Section:
    shape = EngineShape(slots=8, step_ms=0)
    kinds = {
        "whole answer": Load(1, 1, context.seconds / 2, is_stream=False, think_seconds=PAUSE_SECONDS),
        "first streamed token": Load(1, 1, context.seconds / 2, think_seconds=PAUSE_SECONDS),
    }
    pairs: dict[str, list[tuple[Run, Run]]] = {kind: [] for kind in kinds}
    with context.processes() as processes:
        direct = start_direct(processes, shape)
        with platform_target(context, processes, shape) as platform:
            for _ in range(context.rounds):
                for kind, load in kinds.items():
                    pairs[kind].append((run_load(direct, load), run_load(platform, load)))
    return summarize(pairs)


def summarize(pairs: dict[str, list[tuple[Run, Run]]]) -> Section:
    """Pure. The time to the first content, which for a whole answer is the answer."""
    section = Section("quiet", "One quiet request: latency added to direct")
    for kind, runs in pairs.items():
        added = {
            percent: [
                1000 * (percentile(p.tally.ttft, percent) - percentile(d.tally.ttft, percent))
                for d, p in runs
            ]
            for percent in (50, 99)
        }
        section.figures += [
            Figure(f"{kind}: added p50", middle(added[50]), "ms", ADDED_MS),
            Figure(f"{kind}: added p99", middle(added[99]), "ms"),
            Figure(
                f"{kind}: direct p50", 1000 * middle([percentile(d.tally.ttft, 50) for d, _ in runs]), "ms"
            ),
        ]
        section.remarks.append(company([run.cores_of_others for pair in runs for run in pair]))
        section.remarks.append(f"Rounds, {kind}, added p50 ms: {spread(added[50], 2)}.")
    return section

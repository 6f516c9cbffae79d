"""More clients than slots: patient ones (nothing is lost), and too many (429 and nothing else)."""

from __future__ import annotations

from loadtests.context import Context
from loadtests.figures import Figure, Goal, Section, company, middle, ratio, spread
from loadtests.measure import Load, Run, run_load
from loadtests.profiling import profile_during
from loadtests.scenarios.streams import platform_target
from loadtests.stack import EngineShape, start_direct, start_platform
from tidegate.messages.queue import QueueLimits

PATIENT_CLIENTS, PATIENT_SLOTS = 256, 32
OVERLOAD_CLIENTS, OVERLOAD_SLOTS, OVERLOAD_BOUND = 50, 6, 12
STEP_MS, TOKENS = 20.0, 50
CAPACITY = Goal("higher", 0.99)
NONE = Goal("lower", 0)


def run_patient(context: Context) -> Section:
    """256 clients that wait their turn on 32 slots: how much of the engine's capacity is used?"""
    shape = EngineShape(PATIENT_SLOTS, STEP_MS)
    load = Load(
        PATIENT_CLIENTS,
        TOKENS,
        context.seconds,
        stream_seconds=TOKENS * shape.step_seconds,
        spread_seconds=2.0,
        drain_seconds=60.0,
    )
    with context.processes() as processes:
        direct = start_direct(processes, shape)
        with platform_target(context, processes, shape) as platform:
            pairs = [(run_load(direct, load), run_load(platform, load)) for _ in range(context.rounds)]
            if context.profile_seconds:
                profile_during(context, platform, load)
    return summarize_patient(pairs, PATIENT_SLOTS / shape.step_seconds)


def summarize_patient(pairs: list[tuple[Run, Run]], nominal: float) -> Section:
    """Pure. Capacity is what the same engine gives directly, its slots refilled without a gap."""
    shares = [ratio(p.tally.tokens_per_second(), d.tally.tokens_per_second()) for d, p in pairs]
    section = Section("patient", f"{PATIENT_CLIENTS} patient clients on {PATIENT_SLOTS} engine slots")
    section.figures = [
        Figure("of the engine's capacity", middle(shares), "", CAPACITY, 4),
        Figure("errors other than 429", float(sum(errors(p) for _, p in pairs)), "", NONE, 0),
        Figure("direct, of slots / step time", ratio(_rate(pairs, 0), nominal), "", None, 4),
        Figure("platform, of slots / step time", ratio(_rate(pairs, 1), nominal), "", None, 4),
        Figure("requests finished", float(sum(p.tally.finished for _, p in pairs)), "", None, 0),
        Figure("429", float(sum(p.tally.statuses.get("429", 0) for _, p in pairs)), "", None, 0),
    ]
    section.remarks.append(company([run.cores_of_others for pair in pairs for run in pair]))
    section.remarks.append(f"Rounds, of capacity: {spread(shares, 4)}.")
    return section


def run_overload(context: Context) -> Section:
    """50 clients on 6 slots with room for 6 more in the queue: results, or 429 with Retry-After."""
    shape = EngineShape(OVERLOAD_SLOTS, STEP_MS)
    load = Load(
        OVERLOAD_CLIENTS,
        TOKENS,
        context.seconds,
        stream_seconds=TOKENS * shape.step_seconds,
        spread_seconds=0.1,
        drain_seconds=60.0,
        backoff_seconds=0.2,
    )
    with context.processes() as processes:
        if context.external is not None:
            platform = context.external
        else:
            platform = start_platform(processes, shape, QueueLimits(max_requests=OVERLOAD_BOUND)).target
        runs = [run_load(platform, load) for _ in range(context.rounds)]
    return summarize_overload(runs, OVERLOAD_SLOTS / shape.step_seconds)


def summarize_overload(runs: list[Run], nominal: float) -> Section:
    """Pure."""
    statuses: dict[str, int] = {}
    for run in runs:
        for status, count in run.tally.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    section = Section(
        "overload", f"{OVERLOAD_CLIENTS} clients on {OVERLOAD_SLOTS} slots, at most {OVERLOAD_BOUND} accepted"
    )
    section.figures = [
        Figure("neither result nor 429", float(sum(errors(run) for run in runs)), "", NONE, 0),
        Figure(
            "429 without Retry-After",
            float(sum(run.tally.refused_without_retry_after for run in runs)),
            "",
            NONE,
            0,
        ),
        Figure("results", float(statuses.get("200", 0)), "", None, 0),
        Figure("429", float(statuses.get("429", 0)), "", None, 0),
        Figure(
            "of the engine's capacity",
            ratio(middle([run.tally.tokens_per_second() for run in runs]), nominal),
            "",
            None,
            3,
        ),
    ]
    section.remarks.append(f"Statuses: {statuses}.")
    return section


def errors(run: Run) -> int:
    """Requests that ended in anything but a whole result or a 429."""
    tally = run.tally
    others = sum(count for status, count in tally.statuses.items() if status not in ("200", "429"))
    return others + tally.broken_streams + tally.connection_errors + tally.unfinished


def _rate(pairs: list[tuple[Run, Run]], which: int) -> float:
    return middle([pair[which].tally.tokens_per_second() for pair in pairs])

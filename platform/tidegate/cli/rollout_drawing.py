"""A rollout as text: whole, for a screen that is drawn again and again, or as one line of a log. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec

from tidegate.cli.output import age, table
from tidegate.messages.rollouts import ENDED

if TYPE_CHECKING:
    from tidegate.control_api.views import ModelView
    from tidegate.messages.rollouts import GateView, RolloutView, StepView

BAR_CELLS = 20
EIGHTHS = " ▏▎▍▌▋▊▉"
REVISION_TITLES = ("REVISION", "", "WEIGHT", "", "REPLICAS")
GATE_TITLES = ("", "GATE", "EVIDENCE", "OF NEEDED", "NEW", "STABLE")
GATE_MARKS = {"passes": "✓", "waits": "…", "fails": "✗"}


def draw_model(model: ModelView, now: float, *, is_wide: bool = False) -> str:
    """Return a model's rollout, or that there is none, and what was asked and not yet done."""
    parts = [draw(model.rollout, now, is_wide=is_wide) if model.rollout is not None else headline(model)]
    if model.pinned:
        parts.append(
            f"An undo holds revision {model.pinned} in the place of the spec's, until the spec changes."
        )
    if (action := model.action) is not None:
        by = f" by {action.author}" if action.author else ""
        what = " ".join(filter(None, (action.verb, action.revision)))
        parts.append(f"asked{by}, not begun yet: {what}")
    return "\n\n".join(parts)


def draw(view: RolloutView, now: float, *, is_wide: bool = False) -> str:
    """Return what a person wants to know: where it stands, what it waits for, and why. Gates in whose hands
    it is not say why only where it `is_wide`. `now` in unix seconds."""
    blocks = [
        "\n".join(filter(None, (f"{view.model}: {_where(view)}", _why(view.reason, view.message)))),
        "\n".join(_facts(view, now)),
        table(REVISION_TITLES, _revisions(view)),
    ]
    if view.gates:
        told = ("fails",) if view.phase in ENDED else ("fails", "waits")
        said = [gate for gate in view.gates if gate.message and (is_wide or gate.state in told)]
        sentences = [f"{GATE_MARKS[gate.state]} {gate.name}: {gate.message}" for gate in said]
        blocks.append("\n".join([table(GATE_TITLES, [_gate(gate) for gate in view.gates]), *sentences]))
    return "\n\n".join(blocks)


def headline(model: ModelView) -> str:
    """Return a model's rollout in one line."""
    if (view := model.rollout) is not None:
        return " ".join(filter(None, (_where(view), _why(view.reason, view.message))))
    entry = model.entry
    why = _why(entry.reason, entry.message) if entry is not None else "The platform has not looked at it yet."
    return f"No rollout of {model.name}. {why}"


def record_of(model: ModelView) -> dict[str, Any]:
    """Return the same for programs."""
    shown = {"model": model.name, "rollout": model.rollout, "action": model.action, "pinned": model.pinned}
    return cast("dict[str, Any]", msgspec.to_builtins(shown))


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """Return a bar that is filled to `share`, 0 to 1, in eighths of a cell."""
    eighths = round(min(1.0, max(0.0, share)) * cells * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(cells, "·")


def evidence_share(evidence: float, needed: float) -> float:
    """Return how far evidence has come, 0 to 1. E-values multiply, so equal steps are equal factors: 10 is
    half of the way to 100. At 1 and below nothing speaks against the revision."""
    if needed <= 1 or evidence <= 1:
        return 0.0
    return min(1.0, math.log(evidence) / math.log(needed))


def _where(view: RolloutView) -> str:
    where = {
        "Queued": f"place {view.position} in the Pool's line of rollouts",
        "Warming": f"{view.target} gets ready",
        "Shadow": f"{view.target} answers copies of requests, for nobody",
        "Completed": f"{view.target} takes all requests",
        "Aborted": f"{view.stable or view.target} takes all requests",
    }.get(view.phase, f"{view.target} takes {view.weight} % of the requests")
    return f"{view.phase}: {where}."


def _why(reason: str, message: str) -> str:
    return ": ".join(filter(None, (reason, message)))


def _facts(view: RolloutView, now: float) -> list[str]:
    facts = [("strategy", view.strategy), ("steps", _steps(view))]
    has_ended = view.phase in ENDED
    if view.started:
        until = view.ended if has_ended and view.ended else now
        facts.append(("time", age(until - view.started) + ("" if has_ended else _of_step(view, now))))
    if view.needed_requests and not has_ended:
        share = view.clean_requests / view.needed_requests
        counted = f"{view.clean_requests} of {view.needed_requests} requests that ended well"
        facts.append(("evidence", f"{bar(share)}   {counted}"))
    if view.ends_at > now and not has_ended:
        facts.append(("ends", f"in about {age(view.ends_at - now)}, at {_clock(view.ends_at)}"))
    return [f"{name.ljust(10)} {text}" for name, text in facts]


def _steps(view: RolloutView) -> str:
    if view.phase == "Completed":
        marks = ["✓"] * len(view.steps)
    else:
        here = "✗" if view.phase == "Aborted" else "▶"
        marks = ["✓" if i < view.step else here if i == view.step else "·" for i in range(len(view.steps))]
    named = [f"{mark} {_step(step)}" for mark, step in zip(marks, view.steps, strict=True)]
    return "   ".join((["▶ shadow"] if view.phase == "Shadow" else []) + named)


def _step(step: StepView) -> str:
    name = f"{step.weight} %"
    least = [f"{age(step.hold_seconds)} or more"] if step.hold_seconds else []
    if least or step.pause:
        name += f" ({', '.join(least + ['until resumed'] * step.pause)})"
    return name


def _of_step(view: RolloutView, now: float) -> str:
    if view.phase in ENDED or not view.step_since or not 0 <= view.step < len(view.steps):
        return ""
    hold = view.steps[view.step].hold_seconds
    of = f" of {age(hold)}" if hold else ""
    return f", {age(now - view.step_since)}{of} in step {view.step + 1} of {len(view.steps)}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M", time.localtime(at))


def _revisions(view: RolloutView) -> list[Sequence[str]]:
    shares = {view.target: view.weight}
    if view.stable and view.stable != view.target:
        shares[view.stable] = 100 - view.weight
    is_refused = view.phase == "Aborted" and view.stable
    names = {view.stable: "stable", view.target: "refused" if is_refused else "new"}
    if view.phase == "Completed":
        names = {view.target: "stable"}
    rest = [revision for revision in view.replicas if revision not in shares]
    return [
        (
            revision,
            names.get(revision, ""),
            f"{shares.get(revision, 0)} %",
            bar(shares.get(revision, 0) / 100),
            view.replicas.get(revision, "0/0"),
        )
        for revision in [*shares, *rest]
    ]


def _gate(gate: GateView) -> Sequence[str]:
    """Evidence on a log scale; a gate that needs no statistics has none."""
    if not gate.needed:
        return GATE_MARKS[gate.state], gate.name, "", "", "", ""
    return (
        GATE_MARKS[gate.state],
        gate.name,
        bar(evidence_share(gate.evidence, gate.needed)),
        f"{_number(gate.evidence)} of {_number(gate.needed)}",
        f"{gate.target_failures}/{gate.target_requests}",
        f"{gate.stable_failures}/{gate.stable_requests}",
    )


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}" if value < 100_000 else f"{value:.0e}"

"""A change of a model as commands make it: planned, asked about where it interrupts, carried out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from tidegate.cli.output import Format, age, say, show_record

if TYPE_CHECKING:
    from tidegate.cli.control_client import Change, Control
    from tidegate.control_api.views import PlanView

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only show what the platform would do; nothing changes.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def make(
    control: Control, model: str, change: Change, style: Format, *, is_dry_run: bool, question: str = ""
) -> None:
    """Carry a change out, or show its plan. A `question` is asked first, below the plan. Raises `typer.Abort`
    for a no, and where nobody can answer."""
    if is_dry_run:
        plan = control.plan(change)
        show_record(msgspec.to_builtins(plan), style, plan_text(plan, time.time()))
        return
    if question:
        say(plan_text(control.plan(change), time.time()))
        typer.confirm(question, abort=True, err=True)
    answer = control.carry_out(change)
    if style in (Format.json, Format.yaml):
        show_record(msgspec.to_builtins(answer), style, "")
    say(f"Asked. `tidegate rollout status {model} -w` shows what comes of it.")


def plan_text(plan: PlanView, now: float) -> str:
    """Return what a person wants to know of a plan."""
    head = "the platform would do this:" if plan.actions else "nothing changes."
    lines = [f"{plan.model}: {head}"]
    lines += [f"{number}. {action}" for number, action in enumerate(plan.actions, 1)]
    lines.append(f"replicas   {plan.replicas_now} now, {plan.replicas_peak} at most")
    if plan.gpus_now or plan.gpus_peak:
        lines.append(f"GPUs       {plan.gpus_now:g} now, {plan.gpus_peak:g} at most")
    if plan.ends_at > now:
        lines.append(f"ends       in about {age(plan.ends_at - now)}")
    return "\n".join(lines)

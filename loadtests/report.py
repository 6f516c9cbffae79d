"""Reports of the scenarios: markdown tables with verdicts, and plain data for JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from loadtests.figures import Figure, Section


def markdown(section: Section) -> str:
    """One section as markdown: verdict table first, then the rest."""
    parts = [f"### {section.title}"]
    judged = [figure for figure in section.figures if figure.goal is not None]
    if judged:
        parts.append(table(["figure", "measured", "must", "aim", ""], [_verdict_row(f) for f in judged]))
    if others := [figure for figure in section.figures if figure.goal is None]:
        parts.append(table(["also", "measured"], [[f.name, f.shown()] for f in others]))
    parts += [table(head, rows) for head, rows in section.tables]
    if section.remarks:
        parts.append("\n".join(f"- {remark}" for remark in section.remarks))
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def as_json(sections: Sequence[Section]) -> list[dict[str, object]]:
    """Plain data of all sections, each figure with its verdict."""
    found = []
    for section in sections:
        plain = asdict(section)
        plain["figures"] = [
            {**asdict(figure), "verdict": figure.goal.verdict(figure.value) if figure.goal else None}
            for figure in section.figures
        ]
        found.append(plain)
    return found


def is_all_met(sections: Sequence[Section]) -> bool:
    """True where every figure with a goal was measured and reaches its must."""
    return all(
        figure.goal.verdict(figure.value) in ("must met", "aim met")
        for section in sections
        for figure in section.figures
        if figure.goal is not None
    )


def _verdict_row(figure: Figure) -> list[str]:
    goal = figure.goal
    assert goal is not None
    sign = "≥" if goal.better == "higher" else "≤"
    return [
        figure.name,
        figure.shown(),
        f"{sign} {goal.must:g}",
        f"{sign} {goal.aim:g}" if goal.aim is not None else "",
        goal.verdict(figure.value),
    ]

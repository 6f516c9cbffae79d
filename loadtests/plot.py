"""Draws figures as SVG, without a library: grouped bars beside a line at 1. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

BAR, GAP, HEIGHT, TOP, BOTTOM, LEFT = 18, 26, 220, 48, 40, 44
COLOURS = ("#8a8f98", "#0b6e99", "#d97706", "#4d7c0f")


def bars(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Return a chart of `groups` (label -> name of a bar -> its height, 1 being the yardstick's)."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    most = max(1.2, *(value for group in groups.values() for value in group.values()))
    group_width = BAR * len(names) + GAP
    width = LEFT + group_width * len(groups) + GAP

    def height(value: float) -> float:
        return HEIGHT * value / most

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + BOTTOM}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
    ]
    for place, name in enumerate(names):
        at = LEFT + 150 * place
        parts.append(f'<rect x="{at}" y="24" width="10" height="10" fill="{COLOURS[place]}"/>')
        parts.append(f'<text x="{at + 14}" y="33">{escape(name)}</text>')
    for mark in (0.5, 1.0):
        y = TOP + HEIGHT - height(mark)
        parts.append(f'<line x1="{LEFT}" x2="{width - GAP}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for index, (label, group) in enumerate(groups.items()):
        left = LEFT + GAP / 2 + index * group_width
        for place, name in enumerate(names):
            value = group.get(name, 0.0)
            x, y = left + place * BAR, TOP + HEIGHT - height(value)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{BAR - 3}" height="{height(value):.1f}" '
                f'fill="{COLOURS[place]}"><title>{escape(name)}: {value:.2f}</title></rect>'
            )
        middle = left + BAR * len(names) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{escape(label)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.figures import Figure, Goal, Section, company, middle, percentile, ratio, spread
from loadtests.report import as_json, is_all_met, markdown

LOWER = Goal("lower", must=5, aim=2)
HIGHER = Goal("higher", must=0.99, aim=0.999)
NO_AIM = Goal("lower", must=0)


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (LOWER, 1.9, "aim met"),
        (LOWER, 2.0, "aim met"),
        (LOWER, 5.0, "must met"),
        (LOWER, 5.1, "NOT met"),
        (HIGHER, 0.9995, "aim met"),
        (HIGHER, 0.99, "must met"),
        (HIGHER, 0.98, "NOT met"),
        (NO_AIM, 0.0, "must met"),
        (NO_AIM, 1.0, "NOT met"),
        (LOWER, None, "not measured"),
        (LOWER, math.nan, "not measured"),
    ],
)
def test_verdict_of_a_figure(goal: Goal, value: float | None, verdict: str) -> None:
    assert goal.verdict(value) == verdict


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_one_of_the_values_with_enough_at_or_below_it(
    values: list[float], percent: float
) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values) - 1e-9


def test_statistics_of_nothing_are_not_numbers() -> None:
    assert math.isnan(percentile([], 50))
    assert math.isnan(middle([]))
    assert math.isnan(ratio(1, 0))


def test_small_statistics() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2
    assert percentile(list(range(1, 101)), 99) == 99
    assert middle([3, 1, 2]) == 2
    assert ratio(1, 4) == 0.25
    assert spread([0.5, 0.25], 2) == "0.50, 0.25"


def test_company_tells_what_others_took() -> None:
    assert "0.50 cores" in company([0.4, 0.5, 0.6])
    assert "not known" in company([])


def _section() -> Section:
    return Section(
        "streams",
        "Many streams",
        figures=[
            Figure("tok/s of direct", 0.9991, "", HIGHER, 4),
            Figure("added TTFT p50", 6.5, "ms", LOWER),
            Figure("clients", 128, "", None, 0),
            Figure("never measured", None, "s"),
        ],
        tables=[(["role", "CPU"], [["gateway", "0.03"]])],
        remarks=["Rounds: 0.9991."],
    )


def test_markdown_shows_figures_with_verdicts_tables_and_remarks() -> None:
    text = markdown(_section())
    assert "| tok/s of direct | 0.9991 | ≥ 0.99 | ≥ 0.999 | aim met |" in text
    assert "| added TTFT p50 | 6.50 ms | ≤ 5 | ≤ 2 | NOT met |" in text
    assert "| clients | 128 |" in text
    assert "| never measured | – |" in text
    assert "| gateway | 0.03 |" in text
    assert "- Rounds: 0.9991." in text


def test_json_carries_values_and_verdicts() -> None:
    [section] = as_json([_section()])
    figures = section["figures"]
    assert isinstance(figures, list)
    assert [figure["verdict"] for figure in figures] == ["aim met", "NOT met", None, None]
    assert figures[0]["value"] == 0.9991


def test_all_met_counts_only_figures_with_a_goal() -> None:
    section = _section()
    assert not is_all_met([section])
    section.figures = [figure for figure in section.figures if figure.name != "added TTFT p50"]
    assert is_all_met([section])
    section.figures.append(Figure("of nginx", None, "", HIGHER))
    assert not is_all_met([section])

"""What an attempt was like, and what its end counts as."""

from __future__ import annotations

import pytest

from tidegate.errors import PROMPT_REFUSALS
from tidegate.messages.outcomes import bucket_of
from tidegate.messages.work import Finish, Segment, Tokens
from tidegate.serving.measure import Measure

CREATED = 1000.0


def a_measure(*outputs: tuple[int, str, float], log: tuple[Segment, ...] = ()) -> Measure:
    measure = Measure(CREATED, log)
    for output in outputs:
        measure.add(*output)
    return measure


def test_the_first_token_counts_from_the_call_and_the_others_from_each_other() -> None:
    measure = a_measure((1, "a", 1002.0), (2, "b", 1002.5), (2, "", 1004.0))
    assert measure.ends(Finish("stop")).split() == ["ok", f"t{bucket_of(2.0)}", f"i{bucket_of(0.5)}"]


@pytest.mark.parametrize(
    ("outputs", "reason", "kind"),
    [
        ([(1, "", 1001.0)], "stop", "empty"),
        ([], "stop", "empty"),
        ([(1, "a", 1001.0)], "stop", "instant"),
        ([(1, "a", 1001.0), (1, "b", 1001.0)], "length", "length"),
    ],
)
def test_an_abnormal_end_is_one_that_ended_well_and_its_kind(
    outputs: list[tuple[int, str, float]], reason: str, kind: str
) -> None:
    ends = a_measure(*outputs).ends(Finish(reason))  # type: ignore[arg-type]
    assert ends.split()[:2] == ["ok", kind]


def test_an_answer_of_several_tokens_that_stops_is_normal() -> None:
    words = a_measure((1, "a", 1001.0), (1, "", 1001.0)).ends(Finish("stop")).split()
    assert {"empty", "instant", "length"}.isdisjoint(words)


@pytest.mark.parametrize("code", [*PROMPT_REFUSALS])
def test_what_the_client_did_wrong_counts_nowhere(code: str) -> None:
    assert a_measure().ends(Finish("error", code)) == ""


def test_our_errors_count_with_the_times_that_were_seen() -> None:
    assert a_measure().ends(Finish("error", "EngineError")) == "error"
    assert a_measure((1, "a", 1001.0)).ends(Finish("error", "EngineError")) == f"error t{bucket_of(1.0)}"


def test_a_continued_answer_has_no_first_token_and_the_text_of_before() -> None:
    log = (Segment("a", 0, output=Tokens([1], "a")),)
    assert a_measure((1, "", 1009.0), log=log).ends(Finish("stop")) == "ok"
    ends = a_measure((1, "", 1009.0), (1, "", 1010.0), log=log).ends(Finish("stop"))
    assert ends == f"ok i{bucket_of(1.0)}"

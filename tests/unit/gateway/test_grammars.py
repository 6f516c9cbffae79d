"""Of each schema there is a grammar, or a sentence that names the path to the keyword; never an exception."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.schemas import FOLLOWED, REFUSED, WRONG
from tidegate.gateway.constraints import Checked, Constraint
from tidegate.gateway.grammars import KNOWN, check


def checked(schema: Any, *, is_strict: bool = False) -> Checked:
    return check(Constraint("json", schema, "field", is_strict))


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed_has_a_grammar(name: str) -> None:
    found = checked(FOLLOWED[name], is_strict=True)
    assert (found.refusal, found.warnings) == ("", [])
    assert LLMatcher.validate_grammar(found.grammar) == ""


@pytest.mark.parametrize("keyword", REFUSED)
def test_what_cannot_is_refused_with_its_path(keyword: str) -> None:
    found = checked(REFUSED[keyword])
    path, _, why = found.refusal.partition(": ")
    assert (found.grammar, path.rpartition("/")[2]) == ("", keyword)
    assert path.count("/") > (keyword != "dependentSchemas")
    assert why


@pytest.mark.parametrize("schema", WRONG)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    assert checked(schema).refusal


def test_keywords_that_nobody_knows_are_named_or_refused() -> None:
    schema = {"properties": {"a/b": {"nullable": True}}, "x-guidance": {"lenient": True}, "x-mine": 1}
    found = checked(schema)
    assert [warning.split(": ")[0] for warning in found.warnings] == ["/", "/properties/a~1b"]
    assert "lenient" not in found.grammar
    assert "x-guidance" in checked(schema, is_strict=True).refusal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["string", "object", "#", "#/$defs/a"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(KNOWN)), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(schema=JSON, is_strict=st.booleans())
def test_nothing_raises(schema: Any, is_strict: bool) -> None:
    found = checked(schema, is_strict=is_strict)
    assert bool(found.grammar) != bool(found.refusal)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_any_texts_may_be_chosen_among(texts: list[str]) -> None:
    assert check(Constraint("choice", texts, "field")).refusal == ""


def test_also_a_character_that_lark_takes_for_none() -> None:
    assert check(Constraint("choice", ["a\x7fb"], "field")).refusal == ""

"""What `make test-clients` makes of a suite's report and the written exceptions."""

from __future__ import annotations

from tests.clients.declared import exceptions, suites
from tests.clients.outcomes import Exempt, Outcome, cell, judge, read_junit

REPORT = """<testsuites><testsuite>
<testcase classname="a.test_chat.TestChat" name="test_one[strict]"/>
<testcase classname="a.test_chat.TestChat" name="test_two">
<failure message="Error 404&#10;more">x</failure></testcase>
<testcase classname="a.test_other" name="test_three"><error message="broken"/></testcase>
<testcase classname="" name="a.test_other"><skipped message="not here"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_read_with_its_features() -> None:
    assert read_junit(REPORT, [("*test_chat*", "chat")]) == [
        Outcome("a.test_chat.TestChat.test_one[strict]", "chat", "passed"),
        Outcome("a.test_chat.TestChat.test_two", "chat", "failed", "Error 404"),
        Outcome("a.test_other.test_three", "other", "failed", "broken"),
        Outcome("a.test_other", "other", "skipped", "not here"),
    ]


def exempt(*tests: str, says: str = "*404*") -> Exempt:
    return Exempt("a", tests, says, "not offered")


def test_a_failure_is_explained_by_its_name_and_by_what_it_says() -> None:
    found = read_junit(REPORT, [])
    verdict = judge(found, [exempt("*test_two")])
    assert [outcome.test for outcome, _ in verdict.explained] == ["a.test_chat.TestChat.test_two"]
    assert [outcome.test for outcome in verdict.unexplained] == ["a.test_other.test_three"]
    assert not verdict.stale
    assert not verdict.is_good
    assert cell(found, verdict) == "1 passed, 1 FAILED, 1 excepted, 1 skipped"
    assert judge(found, [exempt("*test_two"), exempt("*test_three", says="broken")]).is_good


def test_a_failure_that_says_something_else_is_not_explained() -> None:
    verdict = judge(read_junit(REPORT, []), [exempt("*test_two", says="*500*")])
    assert "a.test_chat.TestChat.test_two" in [outcome.test for outcome in verdict.unexplained]


def test_an_exception_that_no_longer_holds_is_named() -> None:
    found = read_junit(REPORT, [])
    for names in (("*test_one[strict]", "*test_two"), ("*test_two", "*gone"), ("*test_o*",)):
        assert judge(found, [exempt(*names)]).stale, names


def test_an_exception_by_chance_may_pass_but_not_be_gone() -> None:
    found = read_junit(REPORT, [])
    drawn = Exempt("a", ("*test_one[strict]",), "*404*", "drawn", by_chance=True)
    assert not judge(found, [drawn]).stale
    assert judge(found, [Exempt("a", ("*gone",), "*404*", "drawn", by_chance=True)]).stale


def test_every_exception_names_a_suite() -> None:
    assert {entry.suite for entry in exceptions()} <= suites().keys()

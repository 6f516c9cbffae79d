"""The table that turns errors into HTTP."""

from __future__ import annotations

import pytest

from tidegate import errors
from tidegate.errors import (
    AuthenticationFailed,
    ConfigError,
    FieldProblem,
    InvalidRequest,
    QueueFull,
    QueueUnavailable,
    RequestError,
    SourceError,
)


def all_request_errors(base: type[RequestError] = RequestError) -> list[type[RequestError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, base)]


@pytest.mark.parametrize("kind", all_request_errors())
def test_every_error_has_openais_body(kind: type[RequestError]) -> None:
    error = kind("A sentence.", param="field")
    # What Redis said is for the log.
    shown = kind.SHOWN if issubclass(kind, QueueUnavailable) else "A sentence."
    assert error.body() == {
        "error": {"message": shown, "type": kind.type, "param": "field", "code": kind.code}
    }
    assert 400 <= kind.status < 600
    assert kind is RequestError or kind.reason in {base.__name__ for base in kind.__mro__}


def test_a_code_of_its_own_replaces_the_tables() -> None:
    assert InvalidRequest("x", code="context_length_exceeded").body()["error"]["code"] == (
        "context_length_exceeded"
    )


@pytest.mark.parametrize(
    ("seconds", "header"), [(None, None), (0.0, "1"), (0.2, "1"), (7.6, "8"), (120.0, "120"), (9e9, "120")]
)
def test_retry_after_is_between_1_and_120_seconds(seconds: float | None, header: str | None) -> None:
    assert QueueFull("x", retry_after_seconds=seconds).headers().get("retry-after") == header


def test_401_names_the_scheme() -> None:
    assert AuthenticationFailed("x").headers() == {"www-authenticate": "Bearer"}


def test_config_errors_name_field_value_and_remedy() -> None:
    problem = FieldProblem("TIDEGATE_PORT", "'x'", "use a number")
    assert str(problem) == "TIDEGATE_PORT: 'x': use a number"
    assert ConfigError("x", [problem]).problems == [problem]
    assert ConfigError("x").problems == []


def test_source_errors_carry_their_reason() -> None:
    assert SourceError("Offline", "No network.").source_reason == "Offline"

"""Log lines: JSON objects or readable text, with the request's id."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Literal

import orjson
import pytest

from tidegate import telemetry
from tidegate.telemetry import Laps, configure_logging, fields


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_fields_and_the_request_id() -> None:
    stream = io.StringIO()
    configure_logging("json", "info", stream)
    logger = logging.getLogger("tidegate.test")
    token = telemetry.request_id.set("req_1")
    logger.info("model %s added", "m", extra=fields(model="m", replicas=2))
    telemetry.request_id.reset(token)
    logger.debug("not shown")
    [line] = map(orjson.loads, stream.getvalue().splitlines())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "tidegate.test",
        "message": "model m added",
        "request_id": "req_1",
        "model": "m",
        "replicas": 2,
    }


def test_an_error_stays_one_line_of_json() -> None:
    stream = io.StringIO()
    configure_logging("json", "info", stream)
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("tidegate.test").exception("it failed")
    [line] = map(orjson.loads, stream.getvalue().splitlines())
    assert "ValueError: inside" in line["error"]
    assert "request_id" not in line


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_line_has_a_bound_whatever_is_said(log_format: Literal["json", "console"]) -> None:
    stream = io.StringIO()
    configure_logging(log_format, "info", stream)
    try:
        raise ValueError("e" * 1_000_000)
    except ValueError:
        logging.getLogger("tidegate.test").exception("m" * 1_000_000, extra=fields(model="f" * 1_000_000))
    assert len(stream.getvalue()) < 50_000


def test_auto_is_readable_only_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        configure_logging("auto", "info", stream)
        logging.getLogger("tidegate.test").warning("hello", extra=fields(key="value"))
    assert "warning test: hello key=value" in terminal.getvalue()
    assert orjson.loads(pipe.getvalue())["message"] == "hello"


def test_laps_name_the_parts_of_a_start_in_order() -> None:
    laps = Laps()
    laps.end("imports")
    laps.end("weights")
    assert list(laps.seconds) == ["imports", "weights"]
    assert all(seconds >= 0 for seconds in laps.seconds.values())

"""Structured logging and the names of all metrics.

Log lines are JSON objects in production and readable text on a terminal. Every line written while a
request is served carries its id: the gateway sets `request_id` (a context variable) once per HTTP call.

Metric names follow OpenTelemetry's gen_ai conventions where they name the thing (dots become underscores,
as its Prometheus exporter does), vLLM's names for token and queue counts, and `tidegate_` otherwise.
"""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import IO, Any, Literal

import orjson

from tidegate.errors import shortened

TIME_TO_FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds"  # noqa: S105
REQUEST_DURATION = "gen_ai_server_request_duration_seconds"
TIME_PER_OUTPUT_TOKEN = "gen_ai_server_time_per_output_token_seconds"  # noqa: S105
REQUESTS = "tidegate_requests"  # prometheus_client appends _total to counters
REVISION_REQUESTS = "tidegate_revision_requests"
REVISION_FIRST_TOKEN = "tidegate_revision_time_to_first_token_seconds"  # noqa: S105
REVISION_PER_TOKEN = "tidegate_revision_time_per_output_token_seconds"  # noqa: S105
PROMPT_TOKENS = "tidegate_prompt_tokens"
GENERATION_TOKENS = "tidegate_generation_tokens"
OPEN_REQUESTS = "tidegate_gateway_open_requests"
SEGMENTS = "tidegate_gateway_segments"
REPLAYS = "tidegate_gateway_replays"
REQUESTS_WAITING = "tidegate_num_requests_waiting"
REQUESTS_RUNNING = "tidegate_num_requests_running"
QUEUE_STATE = "tidegate_queue_state"
QUEUE_MAY_EVICT = "tidegate_queue_may_evict"
MODEL_REPLICAS = "tidegate_model_replicas"

# OpenTelemetry's advised bucket bounds for the two latency histograms, in seconds.
DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 120.0),
)
PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

# Of a line: what a library or a request says may have any length.
MOST_MESSAGE_CHARACTERS, MOST_ERROR_CHARACTERS = 4096, 32_768

request_id: ContextVar[str] = ContextVar("request_id", default="")

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logging(
    log_format: Literal["auto", "json", "console"],
    level: str,
    stream: IO[str] | None = None,
) -> None:
    """Send every log record of this process to `stream` (stderr). `auto` is console on a terminal."""
    stream = stream or sys.stderr
    if log_format == "auto":
        log_format = "console" if stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
    for name in ("httpx", "httpcore", "watchfiles"):  # a line for each of the host's own regular looks
        logging.getLogger(name).setLevel(max(LEVELS[level], logging.WARNING))


def fields(**values: Any) -> dict[str, Any]:
    """Structured fields of a log line: `logger.info("model added", extra=fields(model=name))`."""
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, request_id, fields, error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shortened(record.getMessage(), MOST_MESSAGE_CHARACTERS),
        }
        if current := request_id.get():
            line["request_id"] = current
        line.update(_bounded_fields(record))
        if record.exc_info:
            line["error"] = shortened(self.formatException(record.exc_info), MOST_ERROR_CHARACTERS)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class ConsoleFormatter(logging.Formatter):
    """`12:00:01.250 info    gateway: message key=value request_id=...`, then the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = _bounded_fields(record)
        if current := request_id.get():
            extra["request_id"] = current
        tail = "".join(f" {name}={value}" for name, value in extra.items())
        level, name = record.levelname.lower(), record.name.removeprefix("tidegate.")
        message = shortened(record.getMessage(), MOST_MESSAGE_CHARACTERS)
        text = f"{clock}.{int(record.msecs):03d} {level:<7} {name}: {message}{tail}"
        if record.exc_info:
            text += "\n" + shortened(self.formatException(record.exc_info), MOST_ERROR_CHARACTERS)
        return text


class Laps:
    """Times the parts of something that is done once, one after another: seconds by name, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end(self, part: str) -> None:
        """What has passed since the part before was this one."""
        now = time.monotonic()
        self.seconds[part] = round(now - self._last, 3)
        self._last = now


def _bounded_fields(record: logging.LogRecord) -> dict[str, Any]:
    found = getattr(record, "fields", {})
    return {
        name: shortened(value, MOST_MESSAGE_CHARACTERS) if isinstance(value, str) else value
        for name, value in found.items()
    }


def _rfc3339(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"

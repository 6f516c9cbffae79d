"""`tidegate run` against a server that says what a gateway may say, the broken ways included."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.integration.cli.command import assert_refused, tidegate


@dataclass
class Gateway:
    """Answers each POST with what `script` holds, and remembers what was asked."""

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    script: bytes = b""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    told = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            told.authorizations.append(self.headers["authorization"])
            self.send_response(told.status)
            for name, value in told.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(told.script)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    yield told
    server.shutdown()
    server.server_close()
    thread.join()


def event(body: dict[str, Any]) -> bytes:
    return b"id: chatcmpl-x/1\ndata: " + json.dumps(body).encode() + b"\n\n"


def text(content: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}]})


FINISH = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}})
DONE = b"data: [DONE]\n\n"


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr(gateway: Gateway) -> None:
    gateway.script = text("Grüß ") + b": heartbeat\n\n" + text("Gott\n") + FINISH + USAGE + DONE
    result = tidegate("run", "m", "hello", "--url", gateway.url, "--key", "k", "--verbose")
    assert (result.returncode, result.stdout) == (0, "Grüß Gott\n\n")
    assert "TTFT" in result.stderr
    assert "2 tokens" in result.stderr
    assert "heartbeat" not in result.stderr
    assert gateway.authorizations == ["Bearer k"]


def test_options_become_fields(gateway: Gateway) -> None:
    gateway.script = text("x") + FINISH + USAGE + DONE
    options = ["--system", "Be brief.", "--max-tokens", "7", "--temperature", "0", "--seed", "3"]
    tidegate("run", "m", "-", *options, "--url", gateway.url + "/v1", stdin="from stdin")
    (body,) = gateway.bodies
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "from stdin"},
    ]
    assert (body["max_completion_tokens"], body["temperature"], body["seed"]) == (7, 0, 3)
    assert gateway.authorizations == [None]


def test_json_is_one_object(gateway: Gateway) -> None:
    gateway.script = text("4") + text("2") + FINISH + USAGE + DONE
    gateway.headers = {"x-request-id": "chatcmpl-x"}
    result = tidegate("run", "m", "hello", "--url", gateway.url, "-o", "json")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["finish_reason"], answer["request_id"]) == ("42", "stop", "chatcmpl-x")
    assert answer["usage"]["completion_tokens"] == 2


def test_places_in_the_queue_are_told_once_each(gateway: Gateway) -> None:
    waiting = b": waiting, position 2, estimated wait 3 s\n\n"
    gateway.script = waiting + waiting + text("x") + FINISH + USAGE + DONE
    result = tidegate("run", "m", "hello", "--url", gateway.url)
    assert result.stderr == "waiting, position 2, estimated wait 3 s\n"


def test_a_refusal_is_its_message_and_when_to_try_again(gateway: Gateway) -> None:
    gateway.status, gateway.headers = 429, {"retry-after": "7"}
    gateway.script = json.dumps({"error": {"message": "The queue is full.", "code": "queue_full"}}).encode()
    assert_refused(tidegate("run", "m", "x", "--url", gateway.url), "The queue is full.", "7 s")


def test_an_answer_of_something_else_is_shown(gateway: Gateway) -> None:
    gateway.status, gateway.script = 502, b"<html>bad gateway</html>"
    assert_refused(tidegate("run", "m", "x", "--url", gateway.url), "502", "bad gateway")


def test_an_error_in_the_stream_fails(gateway: Gateway) -> None:
    gateway.script = text("begun") + event({"error": {"message": "The engine failed."}})
    result = tidegate("run", "m", "x", "--url", gateway.url)
    assert (result.returncode, result.stdout) == (1, "begun")
    assert result.stderr.strip().endswith("error: The engine failed.")


def test_a_stream_that_just_ends_fails(gateway: Gateway) -> None:
    gateway.script = text("begun")
    result = tidegate("run", "m", "x", "--url", gateway.url)
    assert result.returncode == 1
    assert "ended before" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_gateway_is_one_sentence() -> None:
    assert_refused(tidegate("run", "m", "x", "--url", "http://127.0.0.1:1"), "http://127.0.0.1:1")

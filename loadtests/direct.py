"""The baseline "direct": the simulated engine behind the least HTTP that answers the same SSE.

`python -m loadtests.direct --port N --slots N --step-ms X`. One process: a uvloop event loop with a raw
`asyncio.Protocol`, and one engine thread. No routing, no validation, no auth, no queue but a first-in
first-out list in front of the slots. What the platform costs is what it adds to this.

Between the two threads stand an inbox behind a condition and one `call_soon_threadsafe` per engine step.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import orjson
import uvloop

from loadtests.requests import engine_request
from loadtests.sse import HEAD_END
from tidegate.engines.base import Engine, Prepared, StepOutput
from tidegate.engines.create import create_engine
from tidegate.messages.work import NO_TOKENS, Finish, Request
from tidegate.replica_args import EngineSpec

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Driver:
    """Owns the engine thread. `deliver` runs on the event loop with all outputs of one step."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[StepOutput]], None],
    ) -> None:
        self._engine, self._loop, self._deliver = engine, loop, deliver
        self._condition = threading.Condition()
        self._added: list[Request] = []
        self._aborted: list[str] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._engine.load()
        self._thread.start()

    def add(self, request: Request) -> None:
        with self._condition:
            self._added.append(request)
            self._condition.notify()

    def abort(self, request_id: str) -> None:
        with self._condition:
            self._aborted.append(request_id)
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()
        self._engine.close()

    def _run(self) -> None:
        engine = self._engine
        waiting: deque[Request] = deque()
        while True:
            with self._condition:
                while not (waiting or self._added or self._aborted or self._closing or engine.has_work()):
                    self._condition.wait()
                if self._closing:
                    return
                waiting.extend(self._added)
                aborted, self._added, self._aborted = self._aborted, [], []
            for request_id in aborted:
                engine.abort(request_id)
                waiting = deque(request for request in waiting if request.id != request_id)
            outputs: list[StepOutput] = []
            while waiting and engine.free_slots() > 0:
                if finished := added(engine, waiting.popleft()):
                    outputs.append(finished)
            if engine.has_work():
                outputs += engine.step()
            if outputs:
                self._loop.call_soon_threadsafe(self._deliver, outputs)


def added(engine: Engine, request: Request) -> StepOutput | None:
    preparing = engine.prepare(request)
    prepared: object = None
    try:
        preparing.send(None)  # a coroutine that awaits nothing ends here
    except StopIteration as end:
        prepared = end.value
    if isinstance(prepared, Finish):
        return StepOutput(request.id, NO_TOKENS, prepared.prompt_tokens, prepared)
    assert isinstance(prepared, Prepared)
    return engine.add(prepared, [])


class DirectServer:
    """Answers by request id what the engine produces."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.driver = Driver(engine, loop, self._deliver)
        self.waiting: dict[str, Connection] = {}
        self.numbers = itertools.count()

    def _deliver(self, outputs: list[StepOutput]) -> None:
        waiting = self.waiting
        for output in outputs:
            if (connection := waiting.get(output.request_id)) is not None:
                if output.finish is not None:
                    del waiting[output.request_id]
                connection.write_output(output)


class Connection(asyncio.Protocol):
    """Keep-alive HTTP/1.1, one request at a time."""

    def __init__(self, server: DirectServer) -> None:
        self.server = server
        self.transport: asyncio.Transport | None = None
        self.buffer = b""
        self.request_id = ""
        self.is_stream = False
        self.with_usage = False
        self.is_first = True
        self.pieces: list[str] = []
        self.prefix = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio.Transport, though they act as one.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        if self.server.waiting.pop(self.request_id, None) is not None:
            self.server.driver.abort(self.request_id)

    def data_received(self, received: bytes) -> None:
        self.buffer = self.buffer + received if self.buffer else received
        end = self.buffer.find(HEAD_END)
        if end < 0:
            return
        length = content_length(self.buffer[:end])
        if len(self.buffer) < end + 4 + length:
            return
        body = self.buffer[end + 4 : end + 4 + length]
        self.buffer = self.buffer[end + 4 + length :]
        self._accept(body)

    def _accept(self, body: bytes) -> None:
        if self.transport is None:
            return
        if not body:  # a GET: is it up?
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            return
        call = orjson.loads(body)
        self.request_id = f"chatcmpl-{next(self.server.numbers):022d}"
        self.is_stream = bool(call.get("stream"))
        self.with_usage = bool((call.get("stream_options") or {}).get("include_usage"))
        self.is_first, self.pieces = True, []
        now = time.time()
        self.prefix = (
            f'"id":"{self.request_id}","object":"chat.completion.chunk","created":{int(now)},'
            f'"model":"{call["model"]}"'
        ).encode()
        self.server.waiting[self.request_id] = self
        self.server.driver.add(engine_request(self.request_id, call, now))

    def write_output(self, output: StepOutput) -> None:
        if self.transport is None:
            return
        if not self.is_stream:
            self.pieces.append(output.output.text)
            if output.finish is not None:
                self.transport.write(self._whole_answer(output))
            return
        parts = []
        if self.is_first:
            self.is_first = False
            parts += [STREAM_HEAD, self._event(b'{"role":"assistant","content":""}', b"null")]
        parts.append(self._event(b'{"content":' + orjson.dumps(output.output.text) + b"}", b"null"))
        if (finish := output.finish) is not None:
            parts.append(self._event(b"{}", b'"' + finish.reason.encode() + b'"'))
            if self.with_usage:
                counts = usage(finish.prompt_tokens, finish.completion_tokens)
                parts.append(chunk(b"data: {" + self.prefix + b',"choices":[],"usage":' + counts + b"}\n\n"))
            parts.append(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self.transport.write(b"".join(parts))

    def _event(self, delta: bytes, reason: bytes) -> bytes:
        return chunk(
            b'data: {%b,"choices":[{"index":0,"delta":%b,"finish_reason":%b}]}\n\n'
            % (self.prefix, delta, reason)
        )

    def _whole_answer(self, output: StepOutput) -> bytes:
        finish = output.finish
        assert finish is not None
        body = (
            b'{%b,"choices":[{"index":0,"message":{"role":"assistant","content":%b},"finish_reason":"%b"}],"usage":%b}'
            % (
                self.prefix,
                orjson.dumps("".join(self.pieces)),
                finish.reason.encode(),
                usage(finish.prompt_tokens, finish.completion_tokens),
            )
        )
        return (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        ) + body


def content_length(head: bytes) -> int:
    """The body's length of a request head; 0 where none is given."""
    lowered = head.lower()
    start = lowered.find(b"\r\ncontent-length:")
    if start < 0:
        return 0
    return int(lowered[start + 17 :].split(b"\r\n", 1)[0])


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
    )


async def serve(host: str, port: int, spec: EngineSpec) -> None:
    """Serve until cancelled."""
    loop = asyncio.get_running_loop()
    server = DirectServer(create_engine(spec), loop)
    server.driver.start()
    try:
        listener = await loop.create_server(lambda: Connection(server), host, port, backlog=2048)
        async with listener:
            await listener.serve_forever()
    finally:
        server.driver.close()


def options_from(module: str, description: str | None) -> tuple[argparse.Namespace, EngineSpec]:
    """The command line of a baseline: where it listens, and its engine."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=20.0)
    options = parser.parse_args()
    args: dict[str, object] = {"step_ms": options.step_ms}
    return options, EngineSpec("simulated", max_slots=options.slots, args=args)


def main() -> None:
    options, spec = options_from("loadtests.direct", __doc__)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.host, options.port, spec))


if __name__ == "__main__":
    main()

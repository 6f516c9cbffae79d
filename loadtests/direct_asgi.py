"""The baseline once more, the way engines are usually served: behind uvicorn, whole answers only.

`python -m loadtests.direct_asgi --port N --slots N --step-ms X`. nginx before this one is the second
yardstick of short requests: before the raw baseline it is measured with an engine that costs next to nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson
import uvicorn

from loadtests.direct import Driver, options_from, usage
from loadtests.requests import engine_request
from tidegate.engines.base import StepOutput
from tidegate.engines.create import create_engine
from tidegate.messages.work import Finish
from tidegate.replica_args import EngineSpec

Message = MutableMapping[str, Any]


class Pending:
    """One call that waits for its answer."""

    def __init__(self, ended: asyncio.Future[Finish]) -> None:
        self.ended = ended
        self.pieces: list[str] = []


class App:
    """A bare ASGI application over one engine thread."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._driver: Driver | None = None
        self._pending: dict[str, Pending] = {}
        self._numbers = itertools.count()

    async def __call__(
        self,
        _: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        answer = await self._answer(orjson.loads(body)) if body else b"ok"
        length = str(len(answer)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _answer(self, call: dict[str, Any]) -> bytes:
        request_id = f"chatcmpl-{next(self._numbers):022d}"
        pending = self._pending[request_id] = Pending(asyncio.get_running_loop().create_future())
        now, model = time.time(), call["model"]
        self._started().add(engine_request(request_id, call, now))
        finish = await pending.ended
        del self._pending[request_id]
        message = {"role": "assistant", "content": "".join(pending.pieces)}
        return orjson.dumps(
            {
                "id": request_id,
                "object": "chat.completion",
                "created": int(now),
                "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": finish.reason}],
                "usage": orjson.Fragment(usage(finish.prompt_tokens, finish.completion_tokens)),
            }
        )

    def _started(self) -> Driver:
        if self._driver is None:
            loop = asyncio.get_running_loop()
            self._driver = Driver(create_engine(self._spec), loop, self._deliver)
            self._driver.start()
        return self._driver

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            pending = self._pending[output.request_id]
            pending.pieces.append(output.output.text)
            if output.finish is not None:
                pending.ended.set_result(output.finish)


def main() -> None:
    options, spec = options_from("loadtests.direct_asgi", __doc__)
    uvicorn.run(
        App(spec),
        host=options.host,
        port=options.port,
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()

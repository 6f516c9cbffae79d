"""Requests at a steady rate by the official client, and what became of each: what a model's users see while
it changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2
import openai

MAX_TOKENS = 16
SILENCE_SECONDS = 120.0


@dataclass(slots=True)
class Call:
    """One request; times are unix seconds, `ended` 0 while it runs. `revision` is the one that answered."""

    began: float
    ended: float = 0.0
    revision: str = ""
    text: str = ""
    problem: str = ""

    @property
    def is_bad(self) -> bool:
        return bool(self.ended) and (bool(self.problem) or not self.text)


class SteadyLoad:
    """Asks for a stream `rate` times a second, whatever became of those before. `url` is the gateway's."""

    def __init__(self, url: str, key: str, model: str, rate: float) -> None:
        self.calls: list[Call] = []
        self._url, self._key, self._model, self._rate = url, key, model, rate
        self._open: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SteadyLoad]:
        """It asks until the block ends, and then until the last answer has ended."""
        asking = asyncio.create_task(self._run())
        try:
            yield self
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def between(self, began: float, ended: float) -> Sequence[Call]:
        """Those that began then."""
        return [call for call in self.calls if began <= call.began <= ended]

    async def _run(self) -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{self._url}/v1", api_key=self._key, max_retries=0, timeout=SILENCE_SECONDS
        ) as client:
            due = time.monotonic()
            try:
                while True:
                    task = asyncio.create_task(self._ask(client, Call(time.time())))
                    self._open.add(task)
                    task.add_done_callback(self._open.discard)
                    due += 1 / self._rate
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
            finally:
                await asyncio.gather(*self._open, return_exceptions=True)

    async def _ask(self, client: openai.AsyncOpenAI, call: Call) -> None:
        self.calls.append(call)
        try:
            stream = await client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": f"Question {len(self.calls)}"}],
                max_tokens=MAX_TOKENS,
                stream=True,
            )
            async for chunk in stream:
                call.revision = chunk.system_fingerprint or call.revision
                call.text += "".join(choice.delta.content or "" for choice in chunk.choices)
        except (openai.APIError, httpx2.HTTPError) as error:
            call.problem = str(error) or repr(error)
        call.ended = time.time()

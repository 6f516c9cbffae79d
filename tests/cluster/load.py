"""Clients that stream from the gateway without a pause, and what became of each of their requests.

The clients are coroutines of one thread, so that the test beside them may kill and wait as it likes. Every
request's whole answer is known beforehand, so a token that is lost, doubled or of another request shows.

A request is accepted once its answer has begun. An accepted one must come to its right end (`complete`); one
whose connection ended before (`cut`) the client asks again, as one does when a gateway dies. `unheard` is one
whose connection ended before any answer: nothing was accepted, and the client asks again. All else is `lost`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import orjson

from tests.waiting import wait_until

SILENCE_SECONDS = 150.0  # a stream of which nothing is heard for so long is lost
PAUSE_SECONDS = 0.05  # before a client asks a gateway again that was not there

Outcome = Literal["open", "complete", "cut", "unheard", "lost"]


@dataclass(frozen=True)
class Part:
    """`streams` clients that ask one model the same questions again and again."""

    model: str
    answers: Mapping[str, str]  # by question
    streams: int
    max_tokens: int = 256


@dataclass
class Call:
    model: str
    question: str
    began: float
    outcome: Outcome = "open"
    problem: str = ""
    text: str = ""
    first_token_seconds: float = 0.0
    longest_silence_seconds: float = 0.0
    _heard: float = field(default=0.0)

    def hear(self) -> None:
        now = time.monotonic()
        silence = now - (self._heard or self.began)
        self.longest_silence_seconds = max(self.longest_silence_seconds, silence)
        self._heard = now

    def __str__(self) -> str:
        return f"{self.outcome} {self.model}: {self.question!r} -> {self.text!r} {self.problem}"


@dataclass(frozen=True)
class Tally:
    """What became of all requests of one load."""

    calls: tuple[Call, ...]

    def of(self, outcome: Outcome) -> list[str]:
        return [str(call) for call in self.calls if call.outcome == outcome]

    @property
    def figures(self) -> dict[str, Any]:
        """For the table at the end."""
        found: dict[str, Any] = {"requests": len(self.calls)}
        for outcome in ("cut", "unheard"):
            if count := sum(call.outcome == outcome for call in self.calls):
                found[outcome] = count
        for model in dict.fromkeys(call.model for call in self.calls):
            longest = max(call.longest_silence_seconds for call in self.calls if call.model == model)
            found[f"longest pause in a stream of {model}"] = f"{longest:.1f} s"
        return found


class Load:
    """`with Load(...) as load:` streams until its end, and then until every open stream has ended."""

    def __init__(self, address: str, key: str, parts: Sequence[Part]) -> None:
        self._address = address
        self._headers = {"Authorization": f"Bearer {key}"}
        self._parts = parts
        self._calls: list[Call] = []
        self._is_over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_for_answers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join(SILENCE_SECONDS + 60)
        if error is None:
            assert not self._thread.is_alive(), [str(call) for call in self._calls if call.outcome == "open"]

    def wait_for_answers(self, timeout: float = 120) -> float:
        """Until every client has a whole answer to a question asked from now on; after how many seconds."""
        begun = time.monotonic()
        wanted = {part.model: part.streams for part in self._parts}

        def is_served() -> bool:
            assert self._failure is None, self._failure
            new = [call for call in list(self._calls) if call.outcome == "complete" and call.began >= begun]
            return all(sum(call.model == name for call in new) >= count for name, count in wanted.items())

        wait_until(is_served, timeout)
        return time.monotonic() - begun

    @property
    def tally(self) -> Tally:
        """Of a load that is over."""
        assert not self._thread.is_alive()
        assert self._failure is None, self._failure
        return Tally(tuple(self._calls))

    def _run(self) -> None:
        try:
            asyncio.run(self._stream())
        except BaseException as error:
            self._failure = error

    async def _stream(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for part in self._parts:
                for number in range(part.streams):
                    clients.create_task(self._client(part, number))

    async def _client(self, part: Part, number: int) -> None:
        """One client with one connection, as a Service spreads connections and not requests."""
        questions = list(part.answers)
        turn = number
        async with httpx.AsyncClient(trust_env=False, headers=self._headers, timeout=SILENCE_SECONDS) as http:
            while not self._is_over.is_set():
                call = Call(part.model, questions[turn % len(questions)], time.monotonic())
                self._calls.append(call)
                call.outcome = await self._ask(http, call, part)
                if call.outcome in ("complete", "lost"):
                    turn += 1
                else:
                    await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, http: httpx.AsyncClient, call: Call, part: Part) -> Outcome:
        body = {
            "model": part.model,
            "messages": [{"role": "user", "content": call.question}],
            "max_tokens": part.max_tokens,
            "temperature": 0,
            "seed": 7,
            "stream": True,
        }
        is_accepted = False
        try:
            async with http.stream("POST", f"{self._address}/v1/chat/completions", json=body) as response:
                is_accepted = response.status_code == 200
                if not is_accepted:
                    call.problem = f"{response.status_code} {(await response.aread()).decode()}"
                    return "lost"
                return await self._read(response, call, part.answers[call.question])
        except httpx.TimeoutException as error:
            call.problem = f"nothing was heard for {SILENCE_SECONDS:.0f} s ({error!r})"
            return "lost"
        except httpx.TransportError as error:
            call.problem = repr(error)
            return "cut" if is_accepted else "unheard"

    async def _read(self, response: httpx.Response, call: Call, answer: str) -> Outcome:
        finish = ""
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                if finish and call.text == answer:
                    return "complete"
                call.problem = f"ended ({finish}), but the right answer is {answer!r}"
                return "lost"
            event = orjson.loads(line.removeprefix("data: "))
            if "error" in event:
                call.problem = str(event["error"])
                return "lost"
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    call.first_token_seconds = call.first_token_seconds or time.monotonic() - call.began
                    call.hear()
                    call.text += text
                finish = choice["finish_reason"] or finish
        call.problem = "the connection was closed before the answer's end"
        return "cut"


def assert_nothing_lost(tally: Tally, *, breaks: bool = False) -> None:
    assert tally.of("lost") == []
    assert tally.of("open") == []
    if not breaks:
        assert tally.of("cut") == []
        assert tally.of("unheard") == []

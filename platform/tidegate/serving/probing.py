"""Probes: questions that an engine must answer before its replica takes requests.

They run as requests do, through `prepare` and the batch, greedily and one after the other. The replica hands
what its engine delivers to `take`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tidegate.engines.base import Engine, EngineLoadError, Prepared, StepOutput
from tidegate.messages.work import (
    ChatPrompt,
    Finish,
    Generate,
    Request,
    Sampling,
    Segment,
    TextPrompt,
    Tokens,
)
from tidegate.replica_args import Probe

SHOWN_CHARACTERS = 200
REASON = "ProbeFailed"


@dataclass
class _Asked:
    probe: Probe
    ended: asyncio.Future[Finish]
    text: list[str] = field(default_factory=list)

    @property
    def answer(self) -> str:
        return "".join(self.text)


class Probing:
    def __init__(self, engine: Engine, hand_over: Callable[[Prepared, list[Segment]], int]) -> None:
        self._engine = engine
        self._hand_over = hand_over
        self._asked: dict[str, _Asked] = {}

    async def run(self, probes: Sequence[Probe], timeout_seconds: float) -> None:
        """Raises `EngineLoadError` (ProbeFailed) with what was expected of the first that fails, and what
        came."""
        for number, probe in enumerate(probes, start=1):
            self._asked[f"probe.{number}"] = _Asked(probe, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_seconds):
                for number, asked in enumerate(self._asked.values(), start=1):
                    self._check(number, asked, await self._end_of(f"probe.{number}", asked))
        except TimeoutError:
            raise EngineLoadError(
                REASON, f"The probes were not answered within {timeout_seconds:g} seconds."
            ) from None

    def take(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            asked = self._asked.get(output.request_id)
            if asked is None or asked.ended.done():
                continue
            asked.text.append(output.output.text)
            if output.finish is not None:
                asked.ended.set_result(output.finish)

    async def _end_of(self, name: str, asked: _Asked) -> Finish:
        prepared = await self._engine.prepare(_request(name, asked.probe))
        if isinstance(prepared, Finish):
            return prepared
        if isinstance(prepared, Tokens):
            asked.text.append(prepared.text)
            return Finish("stop")
        self._hand_over(prepared, [])
        return await asked.ended

    def _check(self, number: int, asked: _Asked, finish: Finish) -> None:
        probe, answer = asked.probe, asked.answer
        if finish.reason == "error":
            raise EngineLoadError(REASON, f"{_named(number, probe)} failed: {finish.code}: {finish.message}")
        if probe.expect and probe.expect not in answer:
            wanted = f"the text {_shown(probe.expect)}"
        elif probe.pattern and re.search(probe.pattern, answer) is None:
            wanted = f"the pattern {_shown(probe.pattern)}"
        else:
            return
        raise EngineLoadError(REASON, f"{_named(number, probe)} expected {wanted} and got {_shown(answer)}.")


def _request(name: str, probe: Probe) -> Request:
    prompt = (
        ChatPrompt([dict(each) for each in probe.messages]) if probe.messages else TextPrompt(probe.prompt)
    )
    now = time.time()
    return Request(
        id=name,
        tenant="",
        model="",
        revision="",
        gateway="",
        created=now,
        deadline=now + 86_400,
        priority=0,
        cost=0,
        work=Generate(prompt, Sampling(seed=0, temperature=0.0, max_tokens=probe.max_tokens)),
    )


def _named(number: int, probe: Probe) -> str:
    question = probe.prompt or probe.messages[-1].get("content", "")
    return f"Probe {number} ({_shown(question)})"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")

"""Requests for engines, and what comes back, for the tests of engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tidegate.engines.base import Engine, Prepared, StepOutput
from tidegate.engines.transformers.prompts import check_token_ids, render, tokenize, usable
from tidegate.messages.work import (
    NO_TOKENS,
    ChatPrompt,
    Finish,
    Generate,
    Inputs,
    Prompt,
    Request,
    Sampling,
    Segment,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)

_loops = ThreadPoolExecutor(1)


def a_request(request_id: str, prompt: str | list[int] | list[dict[str, Any]], **sampling: Any) -> Request:
    """A request for text, token ids or chat messages. Greedy, and past end tokens, unless told otherwise."""
    wanted = {"seed": 7, "temperature": 0.0, "ignore_eos": True, **sampling}
    form: Prompt
    if isinstance(prompt, str):
        form = TextPrompt(prompt)
    elif prompt and isinstance(prompt[0], dict):
        form = ChatPrompt([item for item in prompt if isinstance(item, dict)])
    else:
        form = TokenPrompt([item for item in prompt if isinstance(item, int)])
    return Request(
        id=request_id,
        tenant="tenant",
        model="tiny",
        revision="rev",
        gateway="gateway",
        created=0.0,
        deadline=1e12,
        priority=0,
        cost=1,
        work=Generate(form, Sampling(**wanted)),
    )


def sampling_of(request: Request) -> Sampling:
    assert isinstance(request.work, Generate)
    return request.work.sampling


@dataclass
class Result:
    """All that an engine said about one request, and the same as the log of segments."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: int = 0
    finish: Finish | None = None
    log: list[Segment] = field(default_factory=list)

    def take(self, output: StepOutput) -> None:
        assert self.finish is None, "output after the finish"
        self.tokens += output.output.token_ids
        self.text += output.output.text
        self.logprobs += output.output.logprobs
        self.prompt_tokens = output.prompt_tokens
        self.finish = output.finish
        self.log.append(
            Segment(output.request_id, len(self.log), output.finish, output.output, output.prompt_tokens)
        )


def add(engine: Engine, request: Request, log: list[Segment] | None = None) -> StepOutput | None:
    """Prepare a request and add it, as a replica does. Also where an event loop runs on this thread."""
    prepared = _loops.submit(asyncio.run, engine.prepare(request)).result()
    if isinstance(prepared, Finish):
        return StepOutput(request.id, NO_TOKENS, prepared.prompt_tokens, prepared)
    assert isinstance(prepared, Prepared)
    return engine.add(prepared, log or [])


def prompt_ids(request: Request, tokenizer: Any, vocabulary_size: int) -> list[int]:
    """Make a request's prompt token ids, as an engine and its process beside it do together."""
    check_token_ids(request, tokenizer, vocabulary_size)
    prompt = request.work.prompt
    assert not isinstance(prompt, Inputs)
    if isinstance(prompt, TokenPrompt):
        ids = prompt.token_ids
    else:
        ids = tokenize(render(prompt, tokenizer, request.model), prompt, tokenizer)
    return usable(ids, prompt, tokenizer, request.model, vocabulary_size)


def run(
    engine: Engine,
    requests: Sequence[Request],
    *,
    apart: int = 0,
    most_steps: int = 2000,
    logs: dict[str, list[Segment]] | None = None,
) -> dict[str, Result]:
    """Run `requests` to their end, each added `apart` steps after the one before."""
    results = {request.id: Result() for request in requests}
    waiting = list(requests)
    for step in range(most_steps):
        while waiting and (apart == 0 or step % apart == 0):
            request = waiting.pop(0)
            if (output := add(engine, request, (logs or {}).get(request.id))) is not None:
                results[request.id].take(output)
            if apart:
                break
        if not waiting and not engine.has_work():
            return results
        for output in engine.step():
            results[output.request_id].take(output)
    raise AssertionError(f"not finished after {most_steps} steps")


def run_one(engine: Engine, request: Request, log: list[Segment] | None = None) -> Result:
    return run(engine, [request], logs={request.id: log or []})[request.id]


def run_steps(engine: Engine, request: Request, steps: int, log: list[Segment] | None = None) -> Result:
    """Run one request for a few steps, then abort it: what a killed replica leaves behind."""
    result = Result()
    assert add(engine, request, log or []) is None
    for _ in range(steps):
        for output in engine.step():
            result.take(output)
    engine.abort(request.id)
    return result

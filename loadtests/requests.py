"""Requests that load tests hand to an engine themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.messages.work import ChatPrompt, Generate, Request, Sampling, Work

FAR_FUTURE = 1e12


def engine_request(request_id: str, call: Mapping[str, Any], now: float) -> Request:
    """Return the request of a chat completion's body, as the gateway makes it."""
    sampling = Sampling(seed=call.get("seed", 0), max_tokens=call.get("max_tokens"))
    work = Generate(ChatPrompt(call["messages"]), sampling)
    return request_for(request_id, work, model=call["model"], now=now)


def request_for(request_id: str, work: Work, *, model: str = "", now: float = 0.0) -> Request:
    """Return a request of nobody in particular, which never runs out of time."""
    return Request(
        id=request_id,
        tenant="",
        model=model,
        revision="",
        gateway="",
        created=now,
        deadline=FAR_FUTURE,
        priority=0,
        cost=0,
        work=work,
    )

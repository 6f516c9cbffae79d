"""The request that the baselines hand to an engine: what the gateway makes of the same call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.messages.work import ChatPrompt, Generate, Request, Sampling

FAR_FUTURE = 1e12


def engine_request(request_id: str, call: Mapping[str, Any], now: float) -> Request:
    """Return the request of a chat completion's body."""
    sampling = Sampling(seed=call.get("seed", 0), max_tokens=call.get("max_tokens"))
    return Request(
        id=request_id,
        tenant="",
        model=call["model"],
        revision="",
        gateway="",
        created=now,
        deadline=FAR_FUTURE,
        priority=0,
        cost=0,
        work=Generate(ChatPrompt(call["messages"]), sampling),
    )

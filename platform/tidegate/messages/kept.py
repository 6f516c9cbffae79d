"""A call that is kept: any gateway can read its answer again, from the beginning or from where a client
was."""

from __future__ import annotations

from typing import Any

import msgspec


class KeptCall(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What is needed to write the answer of a call once more, beside the logs of its requests, which are
    named `{id}.{index}`. Fields are appended, as in `messages.work`."""

    id: str
    tenant: str
    path: str  # of its dialect
    created: int  # unix seconds
    model: str
    revision: str
    context_length: int
    sequences: int
    body: bytes  # as the client sent it
    messages: list[dict[str, Any]] = []  # of the conversation before it
    ended: int = 0  # unix seconds; 0: not yet. As it is found, never as it is kept


def gateway_of(call_id: str) -> str:
    """The gateway of a kept call's requests: the call itself. Whoever reads it hears this one's channel."""
    return f"call:{call_id}"

"""From a checked call to its requests. Pure, but for the ids and seeds it is handed."""

from __future__ import annotations

import base64
import os
import random

from msgspec.structs import replace

from tidegate.gateway.dialects.base import AnswerHead, Call
from tidegate.messages.registry import Key
from tidegate.messages.work import Request

SHADOW_PRIORITY = -1000  # the lowest


def build_requests(
    call: Call,
    head: AnswerHead,
    *,
    key: Key,
    gateway: str,
    created: float,
    deadline: float,
    random_seed: int,
) -> list[Request]:
    """One request for each sequence of the call. Times are unix seconds."""
    return [
        Request(
            id=f"{head.call_id}.{index}",
            tenant=key.tenant,
            key=key.id,
            model=head.model,
            revision=head.revision,
            gateway=gateway,
            created=created,
            deadline=deadline,
            priority=0,
            cost=ask.cost,
            work=ask.work,
        )
        for index, ask in enumerate(call.asks(random_seed))
    ]


def shadow_of(request: Request, revision: str) -> Request:
    """A copy for another revision, behind all others, that nobody waits for and nobody is charged for."""
    return replace(
        request,
        id=request.id + ".shadow",
        revision=revision,
        gateway="",
        tenant="",
        key="shadow",
        priority=SHADOW_PRIORITY,
    )


def new_id() -> str:
    """22 characters of A-Z, a-z, 0-9, - and _: 128 random bits."""
    return base64.urlsafe_b64encode(os.urandom(16))[:22].decode()


def new_seed() -> int:
    return random.getrandbits(63)

"""What administrators read: who changed what, and what tenants hold."""

from __future__ import annotations

from typing import Any

import msgspec


class AuditEntry(msgspec.Struct, frozen=True):
    """One change. `who` is the key's name (`key` its id), or the platform itself where it decided. `before`
    and `after` hold what differs."""

    at: float  # unix seconds
    who: str
    what: str
    model: str = ""
    before: Any = None
    after: Any = None
    key: str = ""
    id: str = ""  # given by the log; those of later entries are larger


class Held(msgspec.Struct, frozen=True):
    """What waits and runs now: requests, their bytes, and the bytes that those that run have generated."""

    requests: int = 0
    request_bytes: int = 0
    generated_bytes: int = 0


class Usage(msgspec.Struct, frozen=True):
    """What each tenant holds of the queues now. Nothing that has ended is counted here."""

    tenants: dict[str, Held]

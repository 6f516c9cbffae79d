"""Who calls the control API, what the key may do, and how often an address may be wrong."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, Protocol

from fastapi import Request
from fastapi.security.http import HTTPBase

from tidegate.errors import AuthenticationFailed, ScopeMissing, TooManyFailures
from tidegate.gateway.auth import known_key
from tidegate.messages.registry import Key

FREE_FAILURES = 10  # in a row, of one address
FAILURE_SECONDS = 6.0  # for one more
MOST_ADDRESSES = 10_000
IPV6_SITE_BITS = 64  # one client has at least so many addresses


class KeyRing(Protocol):
    def find(self, secret: str) -> Key | None: ...


class OwnKey:
    """The host's own admin key, which Redis does not know, before those that it knows."""

    def __init__(self, secret: str, name: str, others: KeyRing) -> None:
        self._secret = secret.encode()
        self._key = Key(id=name, name=name, tenant="", created=0.0, scopes=("admin",))
        self._others = others

    def find(self, secret: str) -> Key | None:
        if hmac.compare_digest(secret.encode(), self._secret):
            return self._key
        return self._others.find(secret)


class Failures:
    """Sign-ins that failed, by address: a bucket each. At the bound on addresses the one that has been quiet
    the longest is forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._empty_at: OrderedDict[str, float] = OrderedDict()  # when all its failures are forgiven

    def wait_seconds(self, address: str) -> float:
        """Return how long this address must wait; 0: it may try."""
        left = self._empty_at.get(_client(address), 0.0) - self._clock()
        return max(0.0, left - (FREE_FAILURES - 1) * FAILURE_SECONDS)

    def note(self, address: str) -> None:
        client = _client(address)
        now = self._clock()
        self._empty_at[client] = max(now, self._empty_at.pop(client, now)) + FAILURE_SECONDS
        if len(self._empty_at) > MOST_ADDRESSES:
            self._empty_at.popitem(last=False)

    def __len__(self) -> int:
        return len(self._empty_at)


class SignedIn(HTTPBase):
    """The key of a call as a dependency of routes, which puts the scheme into the document."""

    def __init__(self, keys: KeyRing, failures: Failures, needed: Literal["read", "admin"]) -> None:
        super().__init__(scheme="bearer", scheme_name="bearer")
        self._keys = keys
        self._failures = failures
        self._needed = needed

    async def __call__(self, request: Request) -> Key:  # type: ignore[override]
        address = request.client.host if request.client is not None else ""
        if wait := self._failures.wait_seconds(address):
            raise TooManyFailures(
                "Sign-ins from this address failed too often; wait, and send a valid key.",
                retry_after_seconds=wait,
            )
        try:
            key = known_key(request.headers.get("authorization"), self._keys)
        except AuthenticationFailed:
            self._failures.note(address)
            raise
        if self._needed not in key.scopes and "admin" not in key.scopes:
            raise ScopeMissing(
                f"The API key has the scopes {', '.join(key.scopes)} and needs {self._needed} for this. "
                f"'tidegate keys create NAME --scope {self._needed}' makes such a key."
            )
        return key


def _client(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(parsed), IPV6_SITE_BITS), strict=False))
    return str(parsed)

"""API keys. Redis holds the SHA-256 of each secret; the secret itself is shown once, when it is made.

A secret carries 256 random bits, so a plain digest cannot be guessed back and needs no slow hash.
Implements `tidegate.gateway.ports.KeyRing`.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import get_args

import msgspec

from tidegate.errors import ConfigError, FieldProblem
from tidegate.messages.registry import Key, Scope
from tidegate.store import names
from tidegate.store.connection import Connection
from tidegate.store.follower import Follower
from tidegate.store.scripts import Scripts

SECRET_PREFIX = "tg-"  # noqa: S105 - what a secret starts with
SHOWN_CHARACTERS = 8
MAX_NAME_CHARACTERS = 128
MAX_TENANT_CHARACTERS = 64

_encode = msgspec.json.Encoder().encode
_key = msgspec.json.Decoder(Key)


class Keys:
    """Uses `connection`, which its owner opens and closes."""

    def __init__(self, connection: Connection, *, key_prefix: str) -> None:
        self._connection = connection
        self._scripts = Scripts(connection, key_prefix)
        self._name = names.prefix(key_prefix) + "keys"
        self._channel = names.change_channel(key_prefix, "keys")
        self._by_digest: dict[str, Key] = {}
        self._follower = Follower(connection, self._channel, self._load)

    async def start(self) -> None:
        """Load the keys and follow their changes from now on. Raises `QueueUnavailable`."""
        await self._follower.start()

    async def close(self) -> None:
        await self._follower.close()

    def find(self, secret: str) -> Key | None:
        """The unrevoked key with this secret, in the snapshot that `start` keeps."""
        key = self._by_digest.get(digest(secret))
        return key if key is not None and key.revoked is None else None

    async def create(
        self,
        name: str,
        tenant: str = "default",
        scopes: Sequence[Scope] = ("inference",),
        *,
        now: float | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which nothing can show again. Raises `ConfigError` for a name or tenant
        that is empty, too long, or not printable, and without a scope or with an unknown one."""
        _check_name("name", name, MAX_NAME_CHARACTERS)
        _check_name("tenant", tenant, MAX_TENANT_CHARACTERS)
        _check_scopes(scopes)
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        key = _new_key(secret, name, tenant, time.time() if now is None else now, scopes)
        await self._scripts.put("keys", digest(secret), _encode(key))
        return key, secret

    async def register(self, secret: str, name: str, tenant: str = "default") -> bool:
        """Let a secret in that was made elsewhere; whether it was new. A key that is there stays as it is, so
        that a revoked one is not let in again."""
        key = _new_key(secret, name, tenant, time.time())
        hashed = digest(secret)
        is_new = bool(await self._connection.call("HSETNX", self._name, hashed, _encode(key), repeat=True))
        # Also where it is there: a repeated HSETNX answers 0 for what its first try wrote.
        await self._connection.call("PUBLISH", self._channel, hashed, repeat=True)
        return is_new

    async def restore(self, secret: str, name: str) -> bool:
        """`register`, where Redis has lost this key; whether it had. Else nobody is told anything."""
        if await self._connection.call("HEXISTS", self._name, digest(secret), repeat=True):
            return False
        return await self.register(secret, name)

    async def list(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        return sorted((await self._read()).values(), key=lambda key: key.created)

    async def revoke(self, key_id: str, *, now: float | None = None) -> Key:
        """End a key; gateways refuse it as soon as the message reaches them. Raises `ConfigError` where no
        key has this id."""
        for hashed, key in (await self._read()).items():
            if key.id == key_id:
                revoked = key if key.revoked else replace(key, revoked=time.time() if now is None else now)
                await self._scripts.put("keys", hashed, _encode(revoked))
                return revoked
        raise ConfigError(f"No key has the id {key_id!r}; `tidegate keys list` shows them.")

    async def _read(self) -> dict[str, Key]:
        found = await self._connection.call("HGETALL", self._name, repeat=True)
        return {hashed.decode(): _key.decode(text) for hashed, text in found.items()}

    async def _load(self, changed: Collection[str] | None) -> None:
        if changed is None:
            self._by_digest = await self._read()
            return
        for hashed in changed:
            text = await self._connection.call("HGET", self._name, hashed, repeat=True)
            if text is None:
                self._by_digest.pop(hashed, None)
            else:
                self._by_digest[hashed] = _key.decode(text)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check_name(field: str, value: str, most: int) -> None:
    """They are shown in tables and logs, and the tenant is a part of Redis keys."""
    if not value.strip():
        found, remedy = repr(value[:20]), "must not be empty"
    elif len(value) > most:
        found, remedy = f"{len(value)} characters", f"use at most {most}"
    elif not value.isprintable() or value != value.strip():
        found, remedy = ascii(value), "use printable characters alone, without blanks around them"
    else:
        return
    problem = FieldProblem(field, found, remedy)
    raise ConfigError(str(problem), [problem])


def _check_scopes(scopes: Sequence[str]) -> None:
    known = get_args(Scope)
    if not scopes or not set(scopes) <= set(known):
        problem = FieldProblem("scopes", ascii(", ".join(scopes)), f"use one or more of {', '.join(known)}")
        raise ConfigError(str(problem), [problem])


def _new_key(
    secret: str, name: str, tenant: str, created: float, scopes: Sequence[Scope] = ("inference",)
) -> Key:
    return Key(
        id="key_" + secrets.token_hex(6),
        name=name,
        tenant=tenant,
        created=created,
        prefix=secret[:SHOWN_CHARACTERS],
        scopes=tuple(dict.fromkeys(scopes)),
    )

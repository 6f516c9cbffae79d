"""The caller is known by a bearer key, or is nobody in particular on a loopback address."""

from __future__ import annotations

import ipaddress

from fastapi import Request
from fastapi.security.http import HTTPBase

from tidegate.errors import AuthenticationFailed, ConfigError, FieldProblem, ScopeMissing
from tidegate.gateway.asgi import Scope, text_header
from tidegate.gateway.ports import KeyRing
from tidegate.messages.registry import Key
from tidegate.settings import Settings

NO_KEY = Key(id="", name="", tenant="default", created=0.0)


# Headers that hold a key alone: Azure's clients send the one, Anthropic's the other.
BARE = (b"api-key", b"x-api-key")


def sent_key(scope: Scope) -> str | None:
    """Return what `find_key` takes."""
    if (authorization := text_header(scope, b"authorization")) is not None:
        return authorization
    return next((f"Bearer {key}" for name in BARE if (key := text_header(scope, name)) is not None), None)


def find_key(authorization: str | None, keys: KeyRing, *, no_auth: bool) -> Key:
    """The key in an `Authorization` header, that may ask models. Raises `AuthenticationFailed`,
    `ScopeMissing`."""
    if no_auth:
        return NO_KEY
    key = known_key(authorization, keys)
    if "inference" not in key.scopes:
        raise ScopeMissing(
            f"The API key has the scopes {', '.join(key.scopes)} and needs inference to ask models. "
            "'tidegate keys create' makes such a key."
        )
    return key


def known_key(authorization: str | None, keys: KeyRing) -> Key:
    """The key in an `Authorization` header, whatever it may do. Raises `AuthenticationFailed`."""
    if authorization is None:
        raise AuthenticationFailed(
            "No API key was sent. Send the header 'Authorization: Bearer KEY'; "
            "'tidegate keys create' makes a key."
        )
    scheme, _, secret = authorization.partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret:
        raise AuthenticationFailed("The Authorization header is not 'Bearer KEY'.")
    key = keys.find(secret)
    if key is None:
        raise AuthenticationFailed(
            "Incorrect API key provided: it is wrong or was revoked. 'tidegate keys list' shows valid ones."
        )
    return key


class KnownKey(HTTPBase):
    """The same as a dependency of FastAPI's routes, which puts the scheme into the document."""

    def __init__(self, keys: KeyRing, settings: Settings) -> None:
        super().__init__(scheme="bearer", scheme_name="bearer")
        self._keys = keys
        self._no_auth = settings.no_auth

    async def __call__(self, request: Request) -> Key:  # type: ignore[override]
        sent = sent_key(request.scope)
        return find_key(sent, self._keys, no_auth=self._no_auth)


def check_no_auth(settings: Settings) -> None:
    """Raises `ConfigError` where keys are switched off on an address that others can reach."""
    if settings.no_auth and not is_loopback(settings.host):
        problem = FieldProblem(
            "TIDEGATE_NO_AUTH",
            f"true with TIDEGATE_HOST={settings.host}",
            "serving without keys is allowed on a loopback address only; "
            "set TIDEGATE_HOST=127.0.0.1 or leave TIDEGATE_NO_AUTH out",
        )
        raise ConfigError(str(problem), [problem])


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

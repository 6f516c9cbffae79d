"""Keys, and when they may be left out."""

from __future__ import annotations

import pytest

from tidegate.errors import AuthenticationFailed, ConfigError, ScopeMissing
from tidegate.gateway.auth import check_no_auth, find_key, is_loopback, sent_key
from tidegate.messages.registry import Key, Scope
from tidegate.settings import Settings


class OneKey:
    def find(self, secret: str) -> Key | None:
        scopes: dict[str, tuple[Scope, ...]] = {
            "tg-right": ("inference",),
            "tg-admin": ("admin",),
            "tg-both": ("read", "inference"),
        }
        return Key("key_1", "test", "acme", 0.0, scopes=scopes[secret]) if secret in scopes else None


@pytest.mark.parametrize("authorization", ["Bearer tg-right", "bearer tg-right", "BEARER   tg-right "])
def test_the_key_names_the_tenant(authorization: str) -> None:
    assert find_key(authorization, OneKey(), no_auth=False).tenant == "acme"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Bearer tg-wrong", "tg-right"])
def test_everything_else_is_refused(authorization: str | None) -> None:
    with pytest.raises(AuthenticationFailed):
        find_key(authorization, OneKey(), no_auth=False)


def test_a_key_may_come_alone() -> None:
    for name in (b"api-key", b"x-api-key"):
        alone = [(name, b"k")]
        assert sent_key({"headers": alone}) == "Bearer k"
        assert sent_key({"headers": [*alone, (b"authorization", b"Bearer other")]}) == "Bearer other"
    assert sent_key({"headers": []}) is None


def test_a_key_of_the_control_api_asks_models_only_with_that_scope() -> None:
    with pytest.raises(ScopeMissing, match="has the scopes admin and needs inference"):
        find_key("Bearer tg-admin", OneKey(), no_auth=False)
    assert find_key("Bearer tg-both", OneKey(), no_auth=False).tenant == "acme"


def test_without_auth_there_is_one_tenant() -> None:
    assert find_key(None, OneKey(), no_auth=True).tenant == "default"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)
    check_no_auth(Settings(no_auth=True, host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_no_auth_elsewhere_stops_the_start(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError) as refused:
        check_no_auth(Settings(no_auth=True, host=host))
    assert refused.value.problems[0].field == "TIDEGATE_NO_AUTH"
    assert "TIDEGATE_HOST=127.0.0.1" in refused.value.problems[0].remedy

from __future__ import annotations

import ssl

import pytest

from tidegate.errors import ConfigError
from tidegate.store.connection import parse_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", ("localhost", 6379, "", 0, None, None)),
        ("redis://redis.example:7000/3", ("redis.example", 7000, "", 3, None, None)),
        ("redis://:s%40cret@h", ("h", 6379, "", 0, None, "s@cret")),
        ("redis://user:pw@[::1]:1/", ("::1", 1, "", 0, "user", "pw")),
        ("redis://h?db=2", ("h", 6379, "", 2, None, None)),
        ("unix:///run/redis.sock?db=4", ("localhost", 6379, "/run/redis.sock", 4, None, None)),
        ("unix://:pw@/run/a%20b.sock", ("localhost", 6379, "/run/a b.sock", 0, None, "pw")),
    ],
)
def test_urls_are_read(url: str, expected: tuple[object, ...]) -> None:
    a = parse_url(url)
    assert (a.host, a.port, a.path, a.db, a.username, a.password) == expected
    assert a.tls is None


def test_rediss_verifies_unless_told_otherwise() -> None:
    strict, lax = parse_url("rediss://h").tls, parse_url("rediss://h?ssl_cert_reqs=none").tls
    assert strict is not None
    assert lax is not None
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert lax.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize(
    "url", ["http://h", "redis://h:port", "redis://h/zero", "rediss://h?ssl_ca_certs=/no/such/file", ""]
)
def test_wrong_urls_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_url"):
        parse_url(url)


def test_a_password_is_shown_nowhere() -> None:
    assert "hunter2" not in repr(parse_url("redis://u:hunter2@h"))
    with pytest.raises(ConfigError) as caught:
        parse_url("redis://u:hunter2@h/zero")
    assert "hunter2" not in str(caught.value)

from __future__ import annotations

import ssl

import pytest

from tidegate.errors import ConfigError
from tidegate.store.address import parse_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", ("localhost", 6379, "", 0, "", "")),
        ("redis://redis.example:7000/3", ("redis.example", 7000, "", 3, "", "")),
        ("redis://:s%40cret@h", ("h", 6379, "", 0, "", "s@cret")),
        ("redis://user:pw@[::1]:1/", ("::1", 1, "", 0, "user", "pw")),
        ("redis://h?db=2", ("h", 6379, "", 2, "", "")),
        ("unix:///run/redis.sock?db=4", ("", 0, "/run/redis.sock", 4, "", "")),
        ("unix://:pw@/run/a%20b.sock", ("", 0, "/run/a b.sock", 0, "", "pw")),
    ],
)
def test_urls_are_read(url: str, expected: tuple[object, ...]) -> None:
    a = parse_url(url)
    assert (a.host, a.port, a.path, a.db, a.credentials.username, a.credentials.password) == expected
    assert not a.sentinels
    assert a.tls is None


@pytest.mark.parametrize(
    ("url", "sentinels", "master", "db"),
    [
        ("redis+sentinel://one/queue", (("one", 26379),), "queue", 0),
        ("redis+sentinel://one:1,two,[::1]:3/queue/4", (("one", 1), ("two", 26379), ("::1", 3)), "queue", 4),
        ("redis+sentinel://one,two/my%20queue?db=5", (("one", 26379), ("two", 26379)), "my queue", 5),
    ],
)
def test_sentinels_are_listed(url: str, sentinels: tuple[tuple[str, int], ...], master: str, db: int) -> None:
    address = parse_url(url)
    assert (address.sentinels, address.master, address.db, address.tls) == (sentinels, master, db, None)


def test_servers_and_sentinels_have_each_their_own_password() -> None:
    address = parse_url("rediss+sentinel://u:p%40w@one,two/queue?sentinel_username=v&sentinel_password=q%40")
    assert address.credentials.command == ("AUTH", "u", "p@w")
    assert address.sentinel_credentials.command == ("AUTH", "v", "q@")
    assert address.tls is not None
    assert parse_url("redis+sentinel://:pw@one/queue").credentials.command == ("AUTH", "default", "pw")
    assert parse_url("redis+sentinel://one/queue").sentinel_credentials.command == ()


def test_rediss_verifies_unless_told_otherwise() -> None:
    strict, lax = parse_url("rediss://h").tls, parse_url("rediss://h?ssl_cert_reqs=none").tls
    assert strict is not None
    assert lax is not None
    assert (strict.verify_mode, strict.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert lax.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "redis://h:port",
        "redis://h/zero",
        "rediss://h?ssl_ca_certs=/no/such/file",
        "redis+sentinel://a,b",
        "redis+sentinel:///master",
        "redis+sentinel://a,,b/master",
        "redis+sentinel://a:port/master",
        "sentinel://a/master",
        "",
    ],
)
def test_wrong_urls_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_url"):
        parse_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p@ss/w#rd:%41 +e@h:6379/0",
        "redis://u:hun/ter@h/0",
        "redis://u:hun#ter@h/0",
        "redis://u:hun?ter@h/0",
        "redis://u:1/0#hunter@h",
        "redis://u:1?hunter@h",
        "redis://u:hun:ter/@h",
        "redis+sentinel://u:hun/ter@one,two/queue/0",
        "redis+sentinel://u:hunter@one:hunter/queue/0",
        "unix://u:hunter@/run/redis.sock?db=hunter",
        "hunter",
        "redis:hunter@h",
        "://hunter@h",
    ],
)
def test_what_a_raw_password_does_to_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    for part in ("hunter", "hun", "ter@", "ss/w", "w#rd", "%41"):
        assert part not in caught.value.message
    assert "REDIS_PASSWORD" in caught.value.message


def test_an_at_sign_alone_does_no_harm() -> None:
    assert parse_url("redis://:p@ss@h").credentials.password == "p@ss"
    assert parse_url("redis+sentinel://:p@ss@one,two/queue").credentials.password == "p@ss"


def test_a_password_is_shown_nowhere() -> None:
    assert "hunter2" not in repr(parse_url("redis://u:hunter2@h"))
    sentinels = "redis+sentinel://u:hunter2@one,two/{}?sentinel_password=hunter3"
    assert "hunter" not in repr(parse_url(sentinels.format("queue")))
    for url in ("redis://u:hunter2@h/zero", sentinels.format("queue/zero"), sentinels.format("")):
        with pytest.raises(ConfigError) as caught:
            parse_url(url)
        assert "hunter" not in str(caught.value)

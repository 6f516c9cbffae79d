"""Settings: read once, wrong ones named."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tidegate.errors import ConfigError
from tidegate.settings import Settings, load_settings
from tidegate.store.address import parse_url


def test_defaults_need_nothing() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port, settings.no_auth) == ("127.0.0.1", 8000, False)
    assert settings.redis_url == ""


def test_variables_are_read() -> None:
    settings = load_settings(
        {"TIDEGATE_PORT": "9000", "TIDEGATE_HOME": "/srv/t", "TIDEGATE_NO_AUTH": "true", "OTHER": "x"}
    )
    assert (settings.port, settings.home, settings.no_auth) == (9000, Path("/srv/t"), True)


def test_the_plain_redis_url_yields_to_tidegates_own() -> None:
    assert load_settings({"REDIS_URL": "redis://a"}).redis_url == "redis://a"
    both = {"REDIS_URL": "redis://a", "TIDEGATE_REDIS_URL": "redis://b"}
    assert load_settings(both).redis_url == "redis://b"


@pytest.mark.parametrize("password", ["p@ss/w#rd:%41 +e", "p@ss/w#rd:%41 +e\n", "p@ss/w#rd:%41 +e\r\n"])
@pytest.mark.parametrize("prefix", ["", "TIDEGATE_"])
def test_user_and_password_apart_are_taken_as_they_are(prefix: str, password: str) -> None:
    given = {f"{prefix}REDIS_URL": "rediss://a:1/2?ssl_cert_reqs=none", f"{prefix}REDIS_PASSWORD": password}
    alone = parse_url(load_settings(given).redis_url)
    assert (alone.credentials.username, alone.credentials.password) == ("", "p@ss/w#rd:%41 +e")
    both = parse_url(load_settings({**given, f"{prefix}REDIS_USERNAME": "a/b@c"}).redis_url)
    assert (both.host, both.port, both.db, both.credentials.username) == ("a", 1, 2, "a/b@c")
    assert both.credentials.password == "p@ss/w#rd:%41 +e"


def test_what_stands_apart_replaces_what_the_url_says() -> None:
    given = {"REDIS_URL": "redis+sentinel://me:old@a,b/queue", "REDIS_PASSWORD": "new"}
    found = parse_url(load_settings(given).redis_url)
    assert (found.credentials.username, found.credentials.password) == ("me", "new")
    socket = parse_url(load_settings({"REDIS_URL": "unix:///a.sock", "REDIS_PASSWORD": "p@/"}).redis_url)
    assert (socket.path, socket.credentials.password) == ("/a.sock", "p@/")


def test_a_password_needs_its_url() -> None:
    with pytest.raises(ConfigError, match="set TIDEGATE_REDIS_URL beside it"):
        load_settings({"TIDEGATE_REDIS_PASSWORD": "secret"})
    mine = {"TIDEGATE_REDIS_URL": "redis://a", "REDIS_PASSWORD": "another server's"}
    assert load_settings(mine).redis_url == "redis://a"
    assert load_settings({"REDIS_PASSWORD": "another server's"}).redis_url == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIDEGATE_REDIS_URL", "http://:hunter2@a"),
        ("TIDEGATE_REDIS_PASSWORD", "hunter2\nhunter2"),
        ("TIDEGATE_REDIS_PASS_WORD", "redis://:hunter2@a"),
        ("TIDEGATE_REDISPASSWORD", "hunter2"),
        ("TIDEGATE_API_KEY", "hunter2"),
    ],
)
def test_a_wrong_value_that_may_be_a_password_is_not_shown(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings({"TIDEGATE_REDIS_URL": "redis://a", name: value})
    assert name in refused.value.message
    assert "hunter2" not in refused.value.message


def test_sentinels_may_name_redis() -> None:
    url = "rediss+sentinel://a,b:1/queue/0"
    assert load_settings({"REDIS_URL": url}).redis_url == url


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TIDEGATE_PORT", "70000", "65535"),
        ("TIDEGATE_PORT", "x", "integer"),
        ("TIDEGATE_REDIS_URL", "http://x", "redis://host:port/db"),
        ("TIDEGATE_KEY_PREFIX", "A B", "pattern"),
        ("TIDEGATE_HEARTBEAT_SECONDS", "0", "greater than 0"),
        ("TIDEGATE_LOG_LEVEL", "loud", "debug"),
        ("TIDEGATE_PROT", "1", "no such setting"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings({name: value})
    [problem] = refused.value.problems
    assert problem.field == name
    assert problem.value == repr(value)
    assert said in problem.remedy


def test_variables_of_child_processes_are_no_settings() -> None:
    assert load_settings({"TIDEGATE_INSTANCE": "abc"}) == load_settings({})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_service_links_of_kubernetes_are_no_settings() -> None:
    links = {
        "TIDEGATE_SERVICE_HOST": "10.0.0.1",
        "TIDEGATE_SERVICE_PORT": "8000",
        "TIDEGATE_SERVICE_PORT_HTTP": "8000",
        "TIDEGATE_PORT": "tcp://10.0.0.1:8000",
        "TIDEGATE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "TIDEGATE_PORT_8000_TCP_PROTO": "tcp",
        "TIDEGATE_PORT_8000_TCP_PORT": "8000",
        "TIDEGATE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "TIDEGATE_REDIS_SERVICE_HOST": "10.0.0.2",
        "TIDEGATE_REDIS_PORT": "tcp://[fd00::2]:6379",
        "TIDEGATE_REDIS_PORT_6379_TCP": "tcp://[fd00::2]:6379",
        "TIDEGATE_DNS_PORT": "udp://10.0.0.3:53",
    }
    assert load_settings(links).port == 8000
    for name, value in (
        ("TIDEGATE_PORT", "tcp"),
        ("TIDEGATE_REDIS_PORT", "6379"),
        ("TIDEGATE_HOSTS", "tcp://a:1"),
    ):
        with pytest.raises(ConfigError, match=name):
            load_settings({name: value})

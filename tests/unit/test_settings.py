"""Settings: read once, wrong ones named."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tidegate.errors import ConfigError
from tidegate.settings import Settings, load_settings


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

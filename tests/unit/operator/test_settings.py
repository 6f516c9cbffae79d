import pytest

from tidegate.errors import ConfigError
from tidegate.settings import read_settings
from tidegate_operator.settings import OperatorSettings

ENOUGH = {
    "REDIS_URL": "redis://redis:6379/0",
    "TIDEGATE_RAY_IMAGE": "localhost/tidegate/ray:1",
    "TIDEGATE_RAY_VERSION": "2.60.0",
}


def settings(**more: str) -> OperatorSettings:
    return read_settings(OperatorSettings, {**ENOUGH, **more})


def test_namespaces_are_a_list_without_repeats_and_default_to_the_operators_own() -> None:
    assert settings(TIDEGATE_NAMESPACES="one, two,one").watched_namespaces == ("one", "two")
    assert settings(TIDEGATE_POD_NAMESPACE="tidegate").watched_namespaces == ("tidegate",)


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("TIDEGATE_NAMESPACES", "one,Two", "pattern"),
        ("TIDEGATE_RAY_VERSION", "latest", "pattern"),
        ("TIDEGATE_SERVE_URL_TEMPLATE", "http://{host}:8265", "use only {service}"),
        ("REDIS_URL", "http://redis", "use redis://host:port/db"),
        ("TIDEGATE_NAMESPACE", "one", "no such setting"),
    ],
)
def test_a_bad_setting_stops_the_start_and_names_itself(variable: str, value: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**{variable: value})
    assert variable.removeprefix("TIDEGATE_") in caught.value.message
    assert remedy in caught.value.message


def test_a_missing_setting_is_named_without_showing_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(OperatorSettings, {"REDIS_URL": "redis://:secret@redis"})
    assert "TIDEGATE_RAY_IMAGE: missing: set it" in caught.value.message
    assert "secret" not in caught.value.message


def test_replicas_read_the_password_or_the_address_from_a_secret() -> None:
    given = {"REDIS_URL": "redis://me@h/1", "REDIS_PASSWORD": "p@/"}
    found = settings(**given, TIDEGATE_REPLICA_REDIS_PASSWORD_SECRET="tidegate-redis/password")
    assert found.redis_url == "redis://me:p%40%2F@h/1"
    assert found.replica_settings.redis_url == "env:TG_REDIS_URL"
    assert found.ray_defaults.queue_url == "redis://me@h/1"
    assert found.ray_defaults.queue_password_secret == ("tidegate-redis", "password")
    whole = settings(TIDEGATE_REPLICA_REDIS_URL_SECRET="tidegate-queue/url").ray_defaults
    assert (whole.queue_url, whole.queue_url_secret) == ("", ("tidegate-queue", "url"))


def test_replicas_may_reach_redis_at_another_address() -> None:
    found = settings(TIDEGATE_REPLICA_REDIS_URL="redis://other:6379")
    assert found.ray_defaults.queue_url == found.queue_url == "redis://other:6379"
    assert settings().ray_defaults.queue_url == ENOUGH["REDIS_URL"]


def test_the_serve_url_is_that_of_the_head_service() -> None:
    assert settings().serve_url("a-head-svc", "models", "a") == "http://a-head-svc.models.svc:8265"


def test_the_gcs_password_is_named_by_secret_and_key() -> None:
    assert settings(TIDEGATE_GCS_REDIS_PASSWORD_SECRET="s/key").ray_defaults.redis_password == ("s", "key")
    assert settings().ray_defaults.redis_password is None

"""A field of a replica's arguments needs no other place that names it: it reaches every replica."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_origin

import msgspec
import pytest
from msgspec.structs import asdict, fields

from tests.unit.control.builders import REPLICAS, model
from tidegate.control.packing import Placement
from tidegate.control.serve_config import Application, application_config, engine_spec
from tidegate.errors import ConfigError
from tidegate.replica_args import (
    EngineSpec,
    PolicyArgs,
    ReplicaArgs,
    ReplicaSettings,
    Times,
    find_redis_url,
    parse_args,
)
from tidegate.serving.__main__ import SPELLINGS, parse_command_line
from tidegate.settings import Settings, load_settings, variables
from tidegate_operator.settings import OperatorSettings

VALUES: dict[Any, Any] = {float: 7.5, int: 7, str: "seven", dict: {"seven": 7}, tuple: [{"prompt": "seven"}]}


def leaves(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, a value that is not the default) of each field that is no struct itself."""
    for field in fields(struct):
        kind = getattr(field.type, "__origin__", field.type)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from leaves(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, VALUES[kind]


def changed(struct: type[msgspec.Struct]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for path, value in leaves(struct):
        *parents, name = path.split(".")
        part = made
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    return made


def test_what_a_platform_says_reaches_each_replica() -> None:
    replicas = msgspec.convert(changed(ReplicaSettings), ReplicaSettings)
    wanted = Application("m", "r", model().spec, "/a", keep_awake=False)
    config = application_config(wanted, replicas)
    found = parse_args(json.loads(json.dumps(config["args"])))
    assert {name: getattr(found, name) for name in ReplicaSettings.__struct_fields__} == asdict(replicas)
    assert (found.model, found.revision) == ("m", "r")
    policy = config["deployments"][0]["autoscaling_config"]["policy"]["policy_kwargs"]
    assert policy == {"redis_url": "seven", "key_prefix": "seven", "model": "m", "revision": "r"}
    assert set(PolicyArgs.__struct_fields__) == set(policy)


def test_a_restart_gives_replicas_other_arguments_and_nothing_else_does() -> None:
    wanted = Application("m", "r", model().spec, "/a", keep_awake=False)
    before = application_config(wanted, REPLICAS)
    after = application_config(replace(wanted, restarted=7.5), REPLICAS)
    assert "restarted" not in before["args"]
    assert parse_args(after["args"]).restarted == 7.5
    del after["args"]["restarted"]
    assert after == before


def test_what_a_model_says_reaches_its_engine() -> None:
    wanted = model(
        source={"uri": "hf://o/n@main"},
        engine={"name": "transformers", "maxSlots": 7, "kvCacheBytes": 7, "args": {"threads": 7}},
        precision="float16",
        quantization="gptq",
        contextLength=7,
        chatTemplate="vicuna",
        resources={"cpus": 1, "gpus": 1},
    )
    place = Placement("gpu", 1.0, 1 << 30, 1 << 30)
    spec = engine_spec(Application("m", "r", wanted.spec, "/models/x", False, place, task="embed"))
    untouched = [field.name for field in fields(EngineSpec) if getattr(spec, field.name) == field.default]
    assert untouched == []
    assert spec.args == {"threads": 7}


def test_the_command_line_has_an_option_for_each_field() -> None:
    words: list[str] = []
    for path, value in leaves(ReplicaArgs):
        option = SPELLINGS.get(path, path.rpartition(".")[2]).replace("_", "-")
        words += [f"--{option}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    assert parse_command_line(words) == msgspec.convert(changed(ReplicaArgs), ReplicaArgs)


@pytest.mark.parametrize("kind", [Settings, OperatorSettings])
def test_each_time_with_a_description_is_a_setting(kind: type[Settings | OperatorSettings]) -> None:
    described = {
        field.name
        for field in fields(Times)
        if get_origin(field.type) is not None and any(meta.description for meta in field.type.__metadata__)
    }
    assert described == {name for name in Times.__struct_fields__ if name in variables(kind)} != set()
    defaults = Times()
    for name in described:
        assert variables(kind)[name].default == getattr(defaults, name)
        assert variables(kind)[name].description


def test_a_time_that_is_set_arrives() -> None:
    times = load_settings({"TIDEGATE_LEASE_SECONDS": "7.5", "TIDEGATE_DRAIN_SECONDS": "7"}).times
    assert times == Times(lease_seconds=7.5, drain_seconds=7.0)


def test_a_redis_url_may_name_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TG_REDIS_URL", "redis://:secret@h/0")
    assert find_redis_url("env:TG_REDIS_URL") == "redis://:secret@h/0"
    assert find_redis_url("redis://h/0") == "redis://h/0"
    monkeypatch.delenv("TG_REDIS_URL")
    with pytest.raises(ConfigError, match="no variable TG_REDIS_URL"):
        find_redis_url("env:TG_REDIS_URL")

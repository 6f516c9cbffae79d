"""All that can be produced is valid for Ray's own schema, and what changes in place rebuilds nothing."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.control.builders import REPLICAS, model
from tidegate.control.packing import Placement
from tidegate.control.resources import MAX_REPLICAS, Model
from tidegate.control.serve_config import (
    HELD_SECONDS,
    Application,
    application_config,
    ordered,
    put_body,
    split_application_name,
)
from tidegate.replica_args import Probe, parse_args

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 speaks to an older pydantic
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeDeploySchema

names = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", fullmatch=True)
revisions = st.from_regex(r"[0-9a-f]{10}", fullmatch=True)
replicas = st.tuples(st.integers(0, MAX_REPLICAS), st.integers(1, MAX_REPLICAS)).map(
    lambda pair: {"minReplicas": min(pair), "maxReplicas": max(pair)}
)
scalings = st.builds(
    lambda counts, target, idle, down: {
        **counts,
        "targetInFlight": target,
        "idleSeconds": idle,
        "scaleDownSeconds": down,
    },
    replicas,
    st.integers(0, 4096),
    st.floats(0, 86_400),
    st.floats(0, 86_400),
)
hardware = st.sampled_from([("auto", 0), ("auto", 0.25), ("cuda", 1), ("cuda", 4), ("cpu", 0)])
arguments = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True),
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    max_size=4,
)


@st.composite
def models(draw: st.DrawFn) -> Model:
    device, gpus = draw(hardware)
    return model(
        draw(names),
        engine={
            "name": "simulated",
            "args": draw(arguments),
            "maxSlots": draw(st.integers(0, 4096)),
            "kvCacheBytes": draw(st.integers(0, 1 << 44)),
        },
        precision=draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"])),
        contextLength=draw(st.integers(0, 1 << 24)),
        device=device,
        resources={"cpus": draw(st.floats(0, 1024)), "gpus": gpus},
        scaling=draw(scalings),
    )


placements = st.none() | st.builds(
    Placement,
    st.from_regex(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?", fullmatch=True),
    st.sampled_from([0.0, 0.01, 0.33, 1.0, 8.0]),
    st.integers(0, 1 << 44),
    st.integers(0, 1 << 44),
)
applications = st.builds(
    lambda wanted, revision, path, awake, place, granted, leaves, probes: Application(
        wanted.name, revision, wanted.spec, path, awake, place, granted, leaves, probes=tuple(probes)
    ),
    models(),
    revisions,
    st.sampled_from(["", "/models/x"]),
    st.booleans(),
    placements,
    st.none() | st.integers(0, MAX_REPLICAS),
    st.booleans(),
    st.lists(st.builds(Probe, prompt=st.text(max_size=5), expect=st.just("yes")), max_size=2),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(applications, max_size=3, unique_by=lambda wanted: wanted.name))
def test_ray_accepts_everything(wanted: list[Application]) -> None:
    config = put_body(application_config(item, REPLICAS) for item in wanted)
    sent = json.loads(json.dumps(config))
    assert sent == config, "Serve never holds what JSON cannot say"
    parsed = ServeDeploySchema.model_validate(sent)
    assert [application.name for application in parsed.applications] == [item.name for item in wanted]


@settings(max_examples=40, deadline=None)
@given(models(), scalings, st.booleans(), st.none() | st.integers(0, 3), st.booleans())
def test_scaling_changes_rebuild_nothing(
    wanted: Model, scaling: dict[str, Any], awake: bool, granted: int | None, leaves: bool
) -> None:
    spec = wanted.spec
    changed = model(wanted.name, **{**spec.model_dump(mode="json", by_alias=True), "scaling": scaling})
    before = Application(wanted.name, "0123456789", spec, "", keep_awake=True)
    after = Application(
        wanted.name, "0123456789", changed.spec, "", keep_awake=awake, granted=granted, leaves=leaves
    )
    assert code_version(before) == code_version(after)


def test_what_an_old_revision_does_not_know_rebuilds_nothing() -> None:
    spec = model("m").spec
    args = application_config(Application("m", "r", spec, "/a", keep_awake=False), REPLICAS)["args"]
    assert not {"commit", "digest"} & args.keys()
    named = Application("m", "r", spec, "/a", keep_awake=False, commit="c", digest="d")
    args = application_config(named, REPLICAS)["args"]
    assert (args["commit"], args["digest"]) == ("c", "d")
    assert "chat_template" not in args["engine"]


def test_an_argument_change_would_rebuild() -> None:
    one = Application("m", "0123456789", model("m").spec, "/a", keep_awake=False)
    two = Application("m", "0123456789", model("m").spec, "/b", keep_awake=False)
    assert code_version(one) != code_version(two)


def test_every_argument_is_one_that_a_replica_takes() -> None:
    place = Placement("gpu", 0.5, 1 << 30, 0)
    made = application_config(
        Application("m", "r", model().spec, "/a", keep_awake=False, placement=place), REPLICAS
    )
    assert parse_args(made["args"]).engine.memory_cap_bytes == 1 << 30


def code_version(wanted: Application) -> str:
    config = {"applications": [application_config(wanted, REPLICAS)]}
    return str(get_app_code_version(ServeDeploySchema.model_validate(config).applications[0]))


def test_an_unproved_revision_is_kept_awake() -> None:
    spec = model(scaling={"minReplicas": 0, "maxReplicas": 2}).spec
    counts = [
        application_config(Application("m", "r", spec, "", keep_awake=awake), REPLICAS)["deployments"][0][
            "autoscaling_config"
        ]["min_replicas"]
        for awake in (True, False)
    ]
    assert counts == [1, 0]


@pytest.mark.parametrize(
    ("granted", "leaves", "told"),
    [
        (None, False, (2, 5, 0.0, 30.0, 300.0)),
        (5, False, (2, 5, 0.0, 30.0, 300.0)),
        (3, False, (2, 3, 0.0, 30.0, 300.0)),
        (1, False, (1, 1, 0.0, 30.0, 300.0)),
        (0, False, (0, 1, HELD_SECONDS, 30.0, 300.0)),
        (2, True, (2, 2, HELD_SECONDS, 0.0, 0.0)),
    ],
)
def test_what_is_granted_bounds_what_serve_starts(
    granted: int | None, leaves: bool, told: tuple[float, ...]
) -> None:
    spec = model(scaling={"minReplicas": 2, "maxReplicas": 5}).spec
    config = application_config(
        Application("m", "r", spec, "", keep_awake=False, granted=granted, leaves=leaves), REPLICAS
    )
    scaling = config["deployments"][0]["autoscaling_config"]
    names = ("min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s")
    assert tuple(scaling[name] for name in (*names, "downscale_to_zero_delay_s")) == told
    assert ordered(config) == (told[0], told[2] == 0.0)


@pytest.mark.parametrize("config", [None, {}, {"deployments": []}, {"deployments": [{}]}])
def test_of_a_config_that_is_not_ours_nothing_was_ordered(config: dict[str, Any] | None) -> None:
    assert ordered(config) == (0, False)


def test_a_task_shows_only_where_it_is_another() -> None:
    """Or every replica of the version before would be replaced."""
    spec = model(engine={"name": "transformers"}, source={"uri": "/w"}).spec
    for task, shown in (("generate", {}), ("embed", {"task": "embed"})):
        wanted = Application("m", "r", spec, "/w", keep_awake=False, task=task)
        args = application_config(wanted, REPLICAS)["args"]
        assert {name: value for name, value in args["engine"].items() if name == "task"} == shown


def test_no_target_means_the_engines_slots() -> None:
    config = application_config(Application("m", "r", model().spec, "", keep_awake=False), REPLICAS)
    assert 0 < config["deployments"][0]["autoscaling_config"]["target_ongoing_requests"] < 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a--0123456789", ("a", "0123456789")), ("a--b--01", ("a--b", "01")), ("other", None), ("--r", None)],
)
def test_application_names_split_at_their_last_mark(name: str, parts: tuple[str, str] | None) -> None:
    assert split_application_name(name) == parts

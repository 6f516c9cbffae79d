"""The declarative Serve config: a small fixed subset of Ray Serve's schema, written without importing Ray.

What restarts replicas and what does not (read in Ray 2.60, `get_app_code_version` and
`DeploymentVersion`): `import_path`, `args`, the application's `runtime_env`, `ray_actor_options` and the
whole `autoscaling_config.policy` rebuild the application and replace its replicas. They hold only what is
fixed for a revision's life. The other numbers of `autoscaling_config` change in place, so all of a model's
scaling travels there; the policy reads them from its context. `initial_replicas` is never set: Serve would
return to it at each change of the config.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import asdict

from tidegate.control.observed import application_name
from tidegate.control.packing import Placement
from tidegate.control.resources import ModelSpec
from tidegate.replica_args import EngineSpec, PolicyArgs, Probe, ReplicaArgs, ReplicaSettings

IMPORT_PATH = "tidegate.serving.app:build"
POLICY_PATH = "tidegate.serving.autoscale:QueueDepthPolicy"
DEPLOYMENT = "Replica"
# `target_ongoing_requests` must be above 0. A model's targetInFlight is a whole number, so a value below 1
# is free to say "the engine's own slots".
ENGINE_SLOTS_TARGET = 0.5
# A delay that Serve never sees the end of: the revision may not grow. Serve skips the delay where no replica
# runs; there the policy obeys it.
HELD_SECONDS = 1e9
SHUTDOWN_MARGIN_SECONDS = 15.0  # Serve kills a replica that drains longer than drain time and this
# Each worker of a group has one whole unit of the group's own resource; a replica takes so much of it, only
# to be kept there.
GROUP_UNIT = 0.001
LATER_ARGS = ("commit", "digest", "probes", "restarted")  # of a replica
LATER_ENGINE_ARGS = ("chat_template", "task")


@dataclass(frozen=True, slots=True)
class Application:
    """One revision as it should stand in Serve. `keep_awake` holds at least one replica, as for a revision
    that has yet to prove itself. `placement` is None on one machine, where the spec's own numbers count.
    `granted` is how many replicas it may have now (None: as many as its scaling says); with `leaves` it goes
    to zero as soon as it is idle, and stays there. Replicas from before `restarted` are replaced. `task` is
    what it does, as the spec or its checkpoint says."""

    model: str
    revision: str
    spec: ModelSpec
    checkpoint: str  # local folder; empty for the simulated engine
    keep_awake: bool
    placement: Placement | None = None
    granted: int | None = None
    leaves: bool = False
    restarted: float = 0.0
    probes: tuple[Probe, ...] = ()
    commit: str = ""
    digest: str = ""  # of what lies in `checkpoint`; empty: its revision is not named by it
    task: str = "generate"

    @property
    def name(self) -> str:
        return application_name(self.model, self.revision)


def split_application_name(name: str) -> tuple[str, str] | None:
    """(model, revision) of one of our applications; None for another's."""
    model, separator, revision = name.rpartition("--")
    return (model, revision) if separator and model else None


def application_configs(
    applications: Iterable[Application], replicas: ReplicaSettings
) -> dict[str, Mapping[str, Any]]:
    """Return what Serve should hold, by application."""
    return {item.name: application_config(item, replicas) for item in applications}


def put_body(configs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the whole body of a PUT to Serve: every application, the old ones included."""
    return {"proxy_location": "Disabled", "applications": list(configs)}


def application_config(application: Application, replicas: ReplicaSettings) -> dict[str, Any]:
    args = replica_args(application, replicas)
    return {
        "name": application.name,
        "route_prefix": None,
        "import_path": IMPORT_PATH,
        "args": _encoded(args),
        "deployments": [
            {
                "name": DEPLOYMENT,
                "autoscaling_config": autoscaling_config(application, args),
                "max_surge_percent": 100,
                "graceful_shutdown_wait_loop_s": 0.1,
                "graceful_shutdown_timeout_s": args.times.drain_seconds + SHUTDOWN_MARGIN_SECONDS,
                "health_check_period_s": 2.0,
                "health_check_timeout_s": 30.0,
                "ray_actor_options": ray_actor_options(application.spec, application.placement),
            }
        ],
    }


def _encoded(args: ReplicaArgs) -> dict[str, Any]:
    """What a version adds must not show where it is not used: other arguments are another application. As
    JSON gives them back, which has no tuples, or they would never be what Serve holds."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(args))
    found["engine"] = used(found["engine"], LATER_ENGINE_ARGS)
    return used(found, LATER_ARGS)


def used(args: Mapping[str, Any], later: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if value or name not in later}


def ray_actor_options(spec: ModelSpec, placement: Placement | None) -> dict[str, Any]:
    """Return what Ray reserves for one replica, and where."""
    options: dict[str, Any] = {"num_cpus": spec.resources.cpus}
    if placement is None:
        return {**options, "num_gpus": spec.resources.gpus}
    options |= {"num_gpus": placement.gpus, "resources": {group_resource(placement.group): GROUP_UNIT}}
    if placement.memory_bytes:
        options["memory"] = placement.memory_bytes
    return options


def group_resource(group: str) -> str:
    """The name of the Ray resource that only workers of this group have."""
    return f"tidegate-group-{group}"


def replica_args(application: Application, replicas: ReplicaSettings) -> ReplicaArgs:
    return ReplicaArgs(
        **asdict(replicas),
        model=application.model,
        revision=application.revision,
        engine=engine_spec(application),
        restarted=application.restarted,
        probes=application.probes,
        commit=application.commit,
        digest=application.digest,
    )


def engine_spec(application: Application) -> EngineSpec:
    spec, placement, device = application.spec, application.placement, application.spec.device
    if device == "auto":
        gpus = placement.gpus if placement is not None else spec.resources.gpus
        device = "cuda" if gpus > 0 else "cpu"
    return EngineSpec(
        name=spec.engine.name,
        path=application.checkpoint,
        precision=spec.precision,
        quantization=spec.quantization,
        device=device,
        context_length=spec.context_length,
        max_slots=spec.engine.max_slots,
        kv_cache_bytes=spec.engine.kv_cache_bytes,
        memory_cap_bytes=placement.memory_cap_bytes if placement is not None else 0,
        args=dict(spec.engine.args),
        chat_template=spec.chat_template,
        task="" if application.task == "generate" else application.task,  # as the version before wrote it
    )


def autoscaling_config(application: Application, args: ReplicaArgs) -> dict[str, Any]:
    scaling = application.spec.scaling
    granted = scaling.max_replicas if application.granted is None else application.granted
    is_held = application.leaves or not granted
    return {
        "min_replicas": min(granted, max(scaling.min_replicas, 1 if application.keep_awake else 0)),
        "max_replicas": max(1, min(granted, scaling.max_replicas)),
        "target_ongoing_requests": float(scaling.target_in_flight) or ENGINE_SLOTS_TARGET,
        "upscale_delay_s": HELD_SECONDS if is_held else 0.0,
        "downscale_delay_s": 0.0 if application.leaves else scaling.scale_down_seconds,
        "downscale_to_zero_delay_s": 0.0 if application.leaves else scaling.idle_seconds,
        "policy": {
            "policy_function": POLICY_PATH,
            "policy_kwargs": msgspec.to_builtins(msgspec.convert(args, PolicyArgs, from_attributes=True)),
        },
    }


def ordered(config: Mapping[str, Any] | None) -> tuple[int, bool]:
    """Return what Serve was told by this config of an application: how many replicas it keeps at least, and
    whether it may start the first."""
    scaling = _scaling(config)
    return int(scaling.get("min_replicas") or 0), scaling.get("upscale_delay_s") == 0.0


def ordered_most(config: Mapping[str, Any] | None) -> int:
    """Return up to how many replicas Serve was told that it may start; 0: none more."""
    scaling = _scaling(config)
    return int(scaling.get("max_replicas") or 0) if scaling.get("upscale_delay_s") == 0.0 else 0


def ordered_gpus(config: Mapping[str, Any] | None) -> float:
    """Return what Ray reserves for a replica of the application of this config."""
    return float((_deployment(config).get("ray_actor_options") or {}).get("num_gpus") or 0)


def _scaling(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return _deployment(config).get("autoscaling_config") or {}


def _deployment(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    deployments: Sequence[Mapping[str, Any]] = (config or {}).get("deployments") or [{}]
    return deployments[0]

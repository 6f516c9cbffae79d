"""The declarative Serve config: a small fixed subset of Ray Serve's schema, written without importing Ray.

What restarts replicas and what does not (read in Ray 2.60, `get_app_code_version` and
`DeploymentVersion`): `import_path`, `args`, the application's `runtime_env`, `ray_actor_options` and the
whole `autoscaling_config.policy` rebuild the application and replace its replicas. They hold only what is
fixed for a revision's life. The other numbers of `autoscaling_config` change in place, so all of a model's
scaling travels there; the policy reads them from its context. `initial_replicas` is never set: Serve would
return to it at each change of the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.control.observed import application_name
from tidegate.control.packing import Placement
from tidegate.control.resources import ModelSpec

IMPORT_PATH = "tidegate.serving.app:build"
POLICY_PATH = "tidegate.serving.autoscale:QueueDepthPolicy"
DEPLOYMENT = "Replica"
# `target_ongoing_requests` must be above 0. A model's targetInFlight is a whole number, so a value below 1
# is free to say "the engine's own slots".
ENGINE_SLOTS_TARGET = 0.5
SHUTDOWN_MARGIN_SECONDS = 15.0  # Serve kills a replica that drains longer than drain time and this
# Each worker of a group has one whole unit of the group's own resource; a replica takes so much of it, only
# to be kept there.
GROUP_UNIT = 0.001


@dataclass(frozen=True, slots=True)
class ReplicaRuntime:
    """What every replica needs to know of the platform it runs in. Fixed while the platform is up."""

    redis_url: str
    key_prefix: str
    lease_seconds: float
    step_timeout_seconds: float
    result_ttl_seconds: float = 60.0
    orphan_seconds: float = 120.0
    drain_seconds: float = 45.0
    log_dir: str = ""  # where replicas write replica-{model}.log; empty: only Ray keeps their output


@dataclass(frozen=True, slots=True)
class Application:
    """One revision as it should stand in Serve. `keep_awake` holds at least one replica, as for a revision
    that has yet to prove itself. `placement` is None on one machine, where the spec's own numbers count."""

    model: str
    revision: str
    spec: ModelSpec
    checkpoint: str  # local folder; empty for the simulated engine
    keep_awake: bool
    placement: Placement | None = None

    @property
    def name(self) -> str:
        return application_name(self.model, self.revision)


def split_application_name(name: str) -> tuple[str, str] | None:
    """(model, revision) of one of our applications; None for another's."""
    model, separator, revision = name.rpartition("--")
    return (model, revision) if separator and model else None


def serve_config(applications: Iterable[Application], runtime: ReplicaRuntime) -> dict[str, Any]:
    """The whole body of a PUT to Serve: every application, the old ones included."""
    return put_body(application_config(application, runtime) for application in applications)


def put_body(configs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The same from the configs of single applications."""
    return {"proxy_location": "Disabled", "applications": list(configs)}


def application_config(application: Application, runtime: ReplicaRuntime) -> dict[str, Any]:
    return {
        "name": application.name,
        "route_prefix": None,
        "import_path": IMPORT_PATH,
        "args": {
            "model": application.model,
            "revision": application.revision,
            "engine": engine_args(application.spec, application.checkpoint, application.placement),
            "redis_url": runtime.redis_url,
            "key_prefix": runtime.key_prefix,
            "lease_seconds": runtime.lease_seconds,
            "step_timeout_seconds": runtime.step_timeout_seconds,
            "result_ttl_seconds": runtime.result_ttl_seconds,
            "orphan_seconds": runtime.orphan_seconds,
            "drain_seconds": runtime.drain_seconds,
            "log_dir": runtime.log_dir,
        },
        "deployments": [
            {
                "name": DEPLOYMENT,
                "autoscaling_config": autoscaling_config(application, runtime),
                "max_surge_percent": 100,
                "graceful_shutdown_wait_loop_s": 0.1,
                "graceful_shutdown_timeout_s": runtime.drain_seconds + SHUTDOWN_MARGIN_SECONDS,
                "health_check_period_s": 2.0,
                "health_check_timeout_s": 30.0,
                "ray_actor_options": ray_actor_options(application.spec, application.placement),
            }
        ],
    }


def ray_actor_options(spec: ModelSpec, placement: Placement | None) -> dict[str, Any]:
    """What Ray reserves for one replica, and where."""
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


def engine_args(spec: ModelSpec, checkpoint: str, placement: Placement | None = None) -> dict[str, Any]:
    """The fields of `engines.base.EngineSpec`."""
    device = spec.device
    if device == "auto":
        gpus = placement.gpus if placement is not None else spec.resources.gpus
        device = "cuda" if gpus > 0 else "cpu"
    return {
        "name": spec.engine.name,
        "path": checkpoint,
        "task": spec.task,
        "precision": spec.precision,
        "quantization": spec.quantization,
        "device": device,
        "context_length": spec.context_length,
        "max_slots": spec.engine.max_slots,
        "kv_cache_bytes": spec.engine.kv_cache_bytes,
        "memory_cap_bytes": placement.memory_cap_bytes if placement is not None else 0,
        "args": dict(spec.engine.args),
    }


def autoscaling_config(application: Application, runtime: ReplicaRuntime) -> dict[str, Any]:
    scaling = application.spec.scaling
    return {
        "min_replicas": max(scaling.min_replicas, 1 if application.keep_awake else 0),
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": float(scaling.target_in_flight) or ENGINE_SLOTS_TARGET,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": scaling.scale_down_seconds,
        "downscale_to_zero_delay_s": scaling.idle_seconds,
        "policy": {
            "policy_function": POLICY_PATH,
            "policy_kwargs": {
                "redis_url": runtime.redis_url,
                "key_prefix": runtime.key_prefix,
                "model": application.model,
                "revision": application.revision,
            },
        },
    }

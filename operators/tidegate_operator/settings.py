"""Settings of the operator, read once at start from `TIDEGATE_*` variables (and `REDIS_URL`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tidegate.control.serve_config import ReplicaRuntime
from tidegate.settings import PREFIX, Seconds
from tidegate_operator.pod_template import RayDefaults

OWN_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SERVE_URL_TEMPLATE = "http://{service}.{namespace}.svc:8265"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class OperatorSettings(BaseSettings):
    """One frozen object, handed down. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    redis_url: str = Field(min_length=1)
    key_prefix: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")] = "tidegate"
    replica_redis_url: str = ""  # as replicas reach it; empty: as the operator does

    # Empty: the operator's own. Names of models are global to the gateways, so one operator serves all.
    namespaces: Annotated[tuple[Name, ...], NoDecode] = ()
    pod_name: str = "tidegate-operator"
    pod_namespace: str = ""
    lease_name: Name = "tidegate-operator"

    ray_image: str = Field(min_length=1)
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+[.][0-9]+[.][0-9]+$")]
    gcs_redis_address: str = ""
    gcs_redis_password_secret: str = Field(default="", pattern=r"^$|^[^/]+/[^/]+$")  # secret/key
    serve_url_template: str = SERVE_URL_TEMPLATE

    health_host: str = "0.0.0.0"  # noqa: S104 - the kubelet and Prometheus ask from outside the pod
    health_port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    workers: Annotated[int, Field(ge=1, le=64)] = 4  # pools that are looked at at once
    resync_seconds: Seconds = 120.0
    drain_seconds: Seconds = 45.0

    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # Of replicas; the gateways' own must be the same.
    lease_seconds: Seconds = 6.0
    result_ttl_seconds: Seconds = 60.0
    orphan_seconds: Seconds = 120.0
    step_timeout_seconds: Seconds = 120.0

    @field_validator("namespaces", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))

    @field_validator("redis_url", "replica_redis_url")
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        if value and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("use redis://host:port/db, rediss:// or unix:///path.sock")
        return value

    @field_validator("serve_url_template")
    @classmethod
    def _fillable(cls, value: str) -> str:
        try:
            value.format(service="service", namespace="namespace", cluster="cluster")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError("use only {service}, {namespace} and {cluster} in it") from error
        return value

    @property
    def own_namespace(self) -> str:
        """Where the operator's pod runs; "default" outside a cluster."""
        if self.pod_namespace:
            return self.pod_namespace
        if OWN_NAMESPACE_FILE.exists():
            return OWN_NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        return "default"

    @property
    def watched_namespaces(self) -> tuple[str, ...]:
        return self.namespaces or (self.own_namespace,)

    @property
    def ray_defaults(self) -> RayDefaults:
        secret, _, key = self.gcs_redis_password_secret.partition("/")
        return RayDefaults(
            image=self.ray_image,
            ray_version=self.ray_version,
            redis_address=self.gcs_redis_address,
            redis_password=(secret, key) if secret else None,
        )

    @property
    def replica_runtime(self) -> ReplicaRuntime:
        return ReplicaRuntime(
            redis_url=self.replica_redis_url or self.redis_url,
            key_prefix=self.key_prefix,
            lease_seconds=self.lease_seconds,
            step_timeout_seconds=self.step_timeout_seconds,
            result_ttl_seconds=self.result_ttl_seconds,
            orphan_seconds=self.orphan_seconds,
            drain_seconds=self.drain_seconds,
        )

    def serve_url(self, service: str, namespace: str, cluster: str) -> str:
        """Where the Ray dashboard of one RayCluster answers."""
        return self.serve_url_template.format(service=service, namespace=namespace, cluster=cluster)

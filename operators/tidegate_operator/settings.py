"""Settings of the operator, read once at start from `TIDEGATE_*` variables (and `REDIS_URL`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from tidegate.replica_args import FROM_ENVIRONMENT, REDIS_VARIABLE, ReplicaSettings, without_password
from tidegate.settings import ProcessSettings, Seconds
from tidegate_operator.pod_template import RayDefaults

OWN_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SERVE_URL_TEMPLATE = "http://{service}.{namespace}.svc:8265"

SecretKey = Annotated[str, Field(pattern=r"^$|^[^/]+/[^/]+$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class OperatorSettings(ProcessSettings):
    """The settings of the operator."""

    redis_url: str = Field(min_length=1, description="The Redis of queue, registry and keys.")
    replica_redis_url: str = Field(
        "", description="The same Redis as replicas reach it; empty: as the operator does."
    )

    replica_redis_password_secret: SecretKey = Field(
        "",
        description="`SECRET/KEY` of its password in each namespace of Pools. Ray's pods mount it: what "
        "Serve stores and logs, and the manifests of pods, hold none.",
    )
    replica_redis_url_secret: SecretKey = Field(
        "", description="`SECRET/KEY` of the whole address instead, in each namespace of Pools."
    )

    # Names of models are global to the gateways, so one operator serves all namespaces.
    namespaces: Annotated[tuple[Name, ...], NoDecode] = Field(
        (), description="Namespaces with Models and Pools, separated by commas; empty: the operator's own."
    )
    pod_name: str = Field("tidegate-operator", description="Who holds the Lease, and who reports Events.")
    pod_namespace: str = Field(
        "", description="Where the Lease is; empty: the namespace of the service account."
    )
    lease_name: Name = Field("tidegate-operator", description="The Lease that decides which operator acts.")

    ray_image: str = Field(min_length=1, description="Image of Ray pods whose Pool names none.")
    ray_version: str = Field(
        pattern=r"^[0-9]+[.][0-9]+[.][0-9]+$", description="Ray's version in that image."
    )
    gcs_redis_address: str = Field(
        "", description="`HOST:PORT` of the Redis that keeps the state of Ray heads; empty: none is kept."
    )
    gcs_redis_password_secret: SecretKey = Field("", description="`SECRET/KEY` of its password.")
    serve_url_template: str = Field(
        SERVE_URL_TEMPLATE, description="Where the dashboard of a RayCluster answers."
    )

    # The kubelet and Prometheus ask from outside the pod.
    health_host: str = Field("0.0.0.0", description="Address of `/healthz` and `/metrics`.")  # noqa: S104
    health_port: int = Field(8080, ge=0, le=65_535, description="Port of `/healthz` and `/metrics`.")
    control_host: str = Field("0.0.0.0", description="Address of the control API.")  # noqa: S104
    control_port: int = Field(8090, ge=0, le=65_535, description="Port of the control API.")
    control_key_file: Path | None = Field(
        None,
        description="File with the control API's first admin key, as a mounted Secret has it; without one "
        "there is no control API.",
    )
    workers: int = Field(4, ge=1, le=64, description="How many Pools are reconciled at the same time.")
    resync_seconds: Seconds = Field(
        120.0, description="How often every pool is reconciled anew, for what no watch brings."
    )

    @field_validator("namespaces", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))

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
        """The namespace of the operator's pod; "default" outside a cluster."""
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
        url_secret = _secret_key(self.replica_redis_url_secret)
        return RayDefaults(
            image=self.ray_image,
            ray_version=self.ray_version,
            redis_address=self.gcs_redis_address,
            redis_password=_secret_key(self.gcs_redis_password_secret),
            queue_url="" if url_secret else without_password(self.queue_url),
            queue_url_secret=url_secret,
            queue_password_secret=_secret_key(self.replica_redis_password_secret),
        )

    @property
    def queue_url(self) -> str:
        """The address as replicas reach it, with the password where the operator has it."""
        return self.replica_redis_url or self.redis_url

    @property
    def replica_settings(self) -> ReplicaSettings:
        return ReplicaSettings(
            redis_url=f"{FROM_ENVIRONMENT}{REDIS_VARIABLE}",
            key_prefix=self.key_prefix,
            times=self.times,
        )

    def serve_url(self, service: str, namespace: str, cluster: str) -> str:
        """Return the address at which the Ray dashboard of one RayCluster answers."""
        return self.serve_url_template.format(service=service, namespace=namespace, cluster=cluster)


def _secret_key(given: str) -> tuple[str, str] | None:
    name, _, key = given.partition("/")
    return (name, key) if name else None

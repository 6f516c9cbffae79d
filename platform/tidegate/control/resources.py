"""The resources that users write: `Model` and `Pool`, `tidegate.dev/v1alpha1`.

The one definition. It checks local files now; what a cluster takes is generated from the same classes.
Every field acts; an unknown one is refused by name. Names on the wire are camelCase, only those are read.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

API_VERSION = "tidegate.dev/v1alpha1"
DEFAULT_POOL = "default"
MAX_REPLICAS = 64

ResourceName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        min_length=1,
        max_length=52,
        description="Lower-case letters, digits and '-' (a DNS-1123 label), at most 52 characters.",
    ),
]
ArgName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
ArgValue = bool | int | float | Annotated[str, Field(max_length=1024)]

_HF_URI = re.compile(r"^hf://[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,120})?$")


class Strict(BaseModel):
    """Base of every resource class: frozen, camelCase on the wire, unknown fields refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, allow_inf_nan=False, str_strip_whitespace=True
    )


class Metadata(Strict):
    name: ResourceName


class Source(Strict):
    uri: str = Field(
        min_length=1,
        max_length=2048,
        description="Where the checkpoint lies: a path (relative to the file that holds this resource), "
        "file:///path, or hf://owner/name@revision.",
    )

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        scheme, separator, _ = uri.partition("://")
        if not separator:
            return uri
        if scheme == "hf" and not _HF_URI.match(uri):
            raise ValueError("write hf://owner/name or hf://owner/name@revision")
        if scheme == "file" and not uri.startswith("file:///"):
            raise ValueError("write file:///absolute/path")
        if scheme not in ("hf", "file"):
            raise ValueError("use a path, file:///path or hf://owner/name@revision")
        return uri


class EngineChoice(Strict):
    name: Literal["transformers", "simulated"] = Field(
        default="transformers",
        description="transformers runs Hugging Face decoder checkpoints; simulated answers without a model.",
    )
    max_slots: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Requests that one replica runs at once; 0: as many as the KV cache memory holds.",
    )
    kv_cache_bytes: int = Field(
        default=0, ge=0, le=1 << 44, description="Memory for the KV cache; 0: derived from free memory."
    )
    args: dict[ArgName, ArgValue] = Field(
        default_factory=dict,
        max_length=32,
        description="Engine-specific arguments, checked by the engine when it loads.",
    )


class Resources(Strict):
    cpus: float = Field(
        default=0.1,
        ge=0,
        le=1024,
        description="CPU cores that Ray reserves per replica; a fraction packs several on a core.",
    )
    gpus: float = Field(
        default=0,
        ge=0,
        le=64,
        description="GPUs that Ray reserves per replica; a fraction shares one.",
    )

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("use a whole number above 1: only a single GPU can be shared")
        return gpus


class Scaling(Strict):
    min_replicas: int = Field(
        default=1,
        ge=0,
        le=MAX_REPLICAS,
        description="Replicas kept also without requests; 0 lets the model sleep and wake on a request.",
    )
    max_replicas: int = Field(
        default=1, ge=1, le=MAX_REPLICAS, description="Replicas that load may start at most."
    )
    target_in_flight: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Waiting and running requests per replica that scaling aims at; 0: the engine's slots.",
    )
    idle_seconds: float = Field(
        default=300.0,
        ge=0,
        le=86_400,
        description="Seconds without a request before the last replica stops (with minReplicas 0).",
    )
    scale_down_seconds: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="Seconds that fewer replicas must suffice before one of several stops.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"minReplicas ({self.min_replicas}) is above maxReplicas ({self.max_replicas}); "
                "raise maxReplicas or lower minReplicas"
            )
        return self


class QueueBounds(Strict):
    max_requests: int = Field(
        default=1000, ge=1, le=1_000_000, description="Requests waiting and running; more are refused (429)."
    )
    max_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=1024,
        le=1 << 40,
        description="Bytes of requests waiting and running; more are refused (429).",
    )
    max_wait_seconds: float = Field(
        default=300.0, ge=1, le=86_400, description="Longest wait of a request before it expires (504)."
    )


class ModelSpec(Strict):
    source: Source | None = Field(
        default=None, description="The checkpoint. Only the simulated engine needs none."
    )
    task: Literal["text-generation"] = Field(
        default="text-generation", description="What the model does: chat and text completions."
    )
    engine: EngineChoice = EngineChoice()
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of weights and arithmetic; auto: the checkpoint's own."
    )
    quantization: Literal["auto", "none", "gptq"] = Field(
        default="auto", description="auto: as the checkpoint says; none and gptq: insist on it."
    )
    context_length: int = Field(
        default=0, ge=0, le=1 << 24, description="Tokens of prompt and answer together; 0: the checkpoint's."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where resources.gpus is above 0, else cpu."
    )
    resources: Resources = Resources()
    scaling: Scaling = Scaling()
    queue: QueueBounds = QueueBounds()
    pool: ResourceName = Field(default=DEFAULT_POOL, description="The Pool whose machines run the replicas.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine.name != "simulated" and self.source is None:
            raise ValueError(f"source.uri is missing; the engine {self.engine.name} needs a checkpoint")
        if self.engine.name == "simulated" and self.quantization == "gptq":
            raise ValueError("quantization gptq needs the engine transformers")
        if self.device == "cuda" and self.resources.gpus == 0:
            raise ValueError("device cuda needs resources.gpus above 0")
        if self.device == "cpu" and self.resources.gpus > 0:
            raise ValueError("device cpu takes no resources.gpus; set it to 0 or the device to auto")
        return self


class Model(Strict):
    """One model that can be asked by its name."""

    api_version: Literal["tidegate.dev/v1alpha1"]
    kind: Literal["Model"]
    metadata: Metadata
    spec: ModelSpec

    @property
    def name(self) -> str:
        return self.metadata.name


class PoolSpec(Strict):
    max_live_revisions: int = Field(
        default=60, ge=1, le=200, description="Model revisions that may stand at once, old and new together."
    )
    max_unbuilt: int = Field(
        default=4,
        ge=1,
        le=4,
        description="Applications that Ray Serve builds at once; each takes a process and memory meanwhile.",
    )


class Pool(Strict):
    """The machines, here one Ray cluster, that run replicas of models."""

    api_version: Literal["tidegate.dev/v1alpha1"]
    kind: Literal["Pool"]
    metadata: Metadata
    spec: PoolSpec = PoolSpec()

    @property
    def name(self) -> str:
        return self.metadata.name

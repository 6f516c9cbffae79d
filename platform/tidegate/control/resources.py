"""The resources that users write: `Model` and `Pool`, `tidegate.dev/v1alpha1`.

The one definition. It checks local files, the operator reads with it what a cluster holds, and
`tidegate_operator.crd` makes the cluster's own schema of it. Every field acts; an unknown one is refused by
name. Names on the wire are camelCase, only those are read.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from tidegate.control.pool_schema import LocalReference, Pool, PoolSpec, WorkerGroup
from tidegate.control.rollout_schema import NO_ACCELERATOR, RolloutSpec, surge_missing
from tidegate.control.schema_types import (
    SERVICE_LABEL,
    BytesOrEmpty,
    PoolName,
    ResourceName,
    Rule,
    Strict,
    rules,
    size_bytes,
)
from tidegate.replica_args import CHAT_FORMATS, ENGINE_ARGS, EngineName, mistake_in_args, unknown_format
from tidegate.sources.schemes import KNOWN_SCHEMES, SCHEMES, mistake_in

__all__ = [
    "API_VERSION",
    "DEFAULT_POOL",
    "MAX_REPLICAS",
    "Model",
    "ModelSpec",
    "Pool",
    "PoolSpec",
    "Strict",
    "WorkerGroup",
]

API_VERSION = "tidegate.dev/v1alpha1"
DEFAULT_POOL = "default"
MAX_REPLICAS = 64
# The only task that the version before knew: its API server wrote it into every stored Model.
FIRST_TASK = "text-generation"
NO_ANSWERS = "rollout.probes are answered by text, which this task does not generate; leave them out"
NOTHING_TO_PARK = "scaling.zero Parked keeps weights, and the engine simulated has none; leave it out"
GENERATES_ONLY = "only the engine transformers does other tasks than to generate; leave task out"
MIN_RECHECK_SECONDS, MAX_RECHECK_SECONDS = 60, 30 * 86_400
MAX_CHAT_TEMPLATE = 1 << 16  # characters
RECHECK_REMEDY = f"use 0, or at least {MIN_RECHECK_SECONDS} seconds"

ArgName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
ArgValue = Annotated[
    bool | int | float | Annotated[str, Field(max_length=1024)],
    # Kubernetes has no type for "any plain value"; lists and mappings may only be empty here, and those the
    # operator refuses.
    WithJsonSchema(
        {
            "x-kubernetes-preserve-unknown-fields": True,
            "maxLength": 1024,
            "maxItems": 0,
            "maxProperties": 0,
            "description": "Text, a number, true or false.",
        }
    ),
]


class Metadata(Strict):
    name: ResourceName


class Source(Strict):
    uri: str = Field(
        min_length=1,
        max_length=2048,
        description="Where the checkpoint lies: hf://owner/name@revision, s3://bucket/prefix, "
        "gs://bucket/prefix, pvc://claim/path (a claim that the Pool mounts), file:///path or a path; "
        "locally a path is relative to the file that holds this resource, in a cluster it is absolute and "
        "one of the Ray pods' own.",
        json_schema_extra=rules(
            Rule("self.contains('://') || self.startsWith('/')", "write an absolute path, or a URI"),
            Rule(f"!self.contains('://') || self.matches('^({'|'.join(SCHEMES)})://')", KNOWN_SCHEMES),
            *(
                Rule(f"!self.startsWith('{name}://') || self.matches('{scheme.pattern}')", scheme.remedy)
                for name, scheme in SCHEMES.items()
            ),
        ),
    )
    secret_ref: LocalReference | None = Field(
        default=None,
        description="Cluster: a Secret whose keys the source needs in its environment: HF_TOKEN; "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL; or "
        "GOOGLE_SERVICE_ACCOUNT_KEY.",
    )
    recheck_seconds: int = Field(
        default=0,
        ge=0,
        le=MAX_RECHECK_SECONDS,
        description="How often the source is looked at again, in seconds: other content is another revision. "
        "0: only when asked.",
        json_schema_extra=rules(
            Rule(f"self == 0 || self >= {MIN_RECHECK_SECONDS}", RECHECK_REMEDY),
        ),
    )

    @field_validator("recheck_seconds")
    @classmethod
    def _not_too_often(cls, seconds: int) -> int:
        if 0 < seconds < MIN_RECHECK_SECONDS:
            raise ValueError(RECHECK_REMEDY)
        return seconds

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        if not uri.isprintable():
            raise ValueError("take the control characters out")
        if remedy := mistake_in(uri):
            raise ValueError(remedy)
        return uri


# The context in which a spec is read that is recorded: what an earlier version let pass is to be read.
STORED = object()


class EngineChoice(Strict):
    name: EngineName = Field(
        default="transformers",
        description="transformers runs Hugging Face checkpoints; vllm lets vLLM compute the tokens of "
        "those that generate, where its environment is installed; simulated answers without a model.",
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
        description="Arguments of the engine, which its guide lists; checked when the Model is read.",
    )

    @field_validator("args")
    @classmethod
    def _args_fit(cls, args: dict[str, ArgValue], info: ValidationInfo) -> dict[str, ArgValue]:
        wanted = ENGINE_ARGS.get(info.data.get("name", ""))
        if info.context is STORED:
            return args
        if wanted and (mistake := mistake_in_args(args, wanted)):
            raise ValueError(mistake)
        return args


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
        description="GPUs that Ray reserves per replica; a fraction shares one. In a cluster leave it 0: "
        "the share follows from gpuMemory.",
        json_schema_extra=rules(
            Rule(
                "self <= 1.0 || self == double(int(self))",
                "use a whole number above 1: only a single GPU can be shared",
            )
        ),
    )
    accelerator: str = Field(
        default="",
        pattern=f"^$|{SERVICE_LABEL}",
        max_length=30,
        description="Cluster: name of the Pool's group that runs the replicas; empty: the smallest group "
        "where one fits.",
    )
    gpu_memory: BytesOrEmpty = Field(
        default="",
        description="Cluster: GPU memory of one replica (a quantity: 10Gi), which makes its share of a GPU; "
        "empty: computed from the checkpoint.",
    )
    memory: BytesOrEmpty = Field(
        default="",
        description="Cluster: host memory that Ray reserves per replica (a quantity); empty: none.",
    )

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("use a whole number above 1: only a single GPU can be shared")
        return gpus

    @property
    def gpu_memory_bytes(self) -> int:
        return size_bytes(self.gpu_memory)

    @property
    def memory_bytes(self) -> int:
        return size_bytes(self.memory)


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
    zero: Literal["Empty", "Parked"] = Field(
        default="Empty",
        description="What stays of the model while it sleeps (with minReplicas 0). Empty: nothing. Parked: "
        "its weights, in the host memory of the node where its last replica ran, as far as there is room.",
    )

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.minReplicas <= self.maxReplicas",
                "minReplicas is above maxReplicas; raise maxReplicas or lower minReplicas",
                ".minReplicas",
            )
        )
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
        description="Bytes of requests waiting and running, and of what those that run have generated; more "
        "are refused (429), and the largest answers end.",
    )
    max_wait_seconds: float = Field(
        default=300.0, ge=1, le=86_400, description="Longest wait of a request before it expires (504)."
    )


class ModelSpec(Strict):
    source: Source | None = Field(
        default=None, description="The checkpoint. Only the simulated engine needs none."
    )
    task: Literal["auto", "generate", "embed", "score", "classify", "text-generation"] = Field(
        default="auto",
        description="What the model does. generate: chat and text completions; embed: vectors of texts; "
        "score: a number for a query and a document (reranking); classify: shares of labels; auto: what the "
        f"checkpoint's files say. {FIRST_TASK} is read as auto.",
    )
    engine: EngineChoice = Field(default=EngineChoice(), description="What runs the model.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of weights and arithmetic; auto: the checkpoint's own."
    )
    quantization: Literal["auto", "none", "gptq"] = Field(
        default="auto", description="auto: as the checkpoint says; none and gptq: insist on it."
    )
    context_length: int = Field(
        default=0,
        ge=0,
        le=1 << 24,
        description="Tokens of prompt and answer together, or of one input where nothing is generated; 0: "
        "the checkpoint's.",
    )
    chat_template: str = Field(
        default="",
        max_length=MAX_CHAT_TEMPLATE,
        description="How chat messages become a prompt: the name of a built-in format "
        f"({', '.join(CHAT_FORMATS)}), or the text of a template (Jinja, as in a tokenizer's chat_template); "
        "empty: the checkpoint's own, without which the model serves completions only.",
        json_schema_extra=rules(
            Rule(
                "self == '' || self.contains('{{') || self.contains('{%') || "
                f"self in [{', '.join(map(repr, CHAT_FORMATS))}]",
                f"there is no such chat format; use one of {', '.join(CHAT_FORMATS)}, or the text of a "
                "template (Jinja)",
            ),
        ),
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="auto: cuda where resources.gpus is above 0 or the Pool's group has GPUs, else cpu.",
    )
    resources: Resources = Field(default=Resources(), description="What one replica takes of its machine.")
    scaling: Scaling = Field(default=Scaling(), description="How many replicas, and when.")
    queue: QueueBounds = Field(
        default=QueueBounds(), description="What may wait for the model; more is refused."
    )
    rollout: RolloutSpec | None = Field(
        default=None,
        description="How a new revision takes the traffic over; without it, all at once when it has proved "
        "itself.",
    )
    pool: PoolName = Field(
        default=DEFAULT_POOL,
        description="The Pool whose machines run the replicas. In a cluster it cannot change.",
        json_schema_extra=rules(
            Rule(
                "self == oldSelf",
                "pool cannot change; delete the Model and create it anew in the other Pool",
            )
        ),
    )

    @field_validator("task")
    @classmethod
    def _first_task(cls, task: str) -> str:
        return "auto" if task == FIRST_TASK else task

    @field_validator("chat_template")
    @classmethod
    def _known_format(cls, chat_template: str) -> str:
        if remedy := unknown_format(chat_template):
            raise ValueError(remedy)
        return chat_template

    # The same as `_consistent`, for the API server.
    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.scaling.zero != 'Parked' || self.engine.name != 'simulated'",
                NOTHING_TO_PARK,
                ".scaling",
            ),
            Rule(
                "has(self.source) || self.engine.name == 'simulated'",
                "source.uri is missing; only the engine simulated needs no checkpoint",
                ".source",
            ),
            Rule(
                "self.quantization != 'gptq' || self.engine.name != 'simulated'",
                "quantization gptq needs the engine transformers or vllm",
                ".quantization",
            ),
            Rule(
                "self.engine.name == 'transformers' || !(self.task in ['embed', 'score', 'classify'])",
                GENERATES_ONLY,
                ".task",
            ),
            Rule(
                "self.chatTemplate == '' || self.engine.name != 'simulated'",
                "chatTemplate needs the engine transformers or vllm",
                ".chatTemplate",
            ),
            Rule(
                "self.device != 'cuda' || self.resources.gpus > 0.0 || self.resources.gpuMemory != '' || "
                "self.resources.accelerator != ''",
                "device cuda needs resources.gpus above 0, or resources.gpuMemory or resources.accelerator",
                ".device",
            ),
            Rule(
                "self.device != 'cpu' || (self.resources.gpus == 0.0 && self.resources.gpuMemory == '')",
                "device cpu takes no resources.gpus or resources.gpuMemory; remove them or use device auto",
                ".device",
            ),
            Rule(
                "!has(self.rollout) || (!has(self.rollout.maxSurgeAccelerators) && "
                "self.rollout.minAvailableAccelerators == 0.0) || (self.device != 'cpu' && "
                "(self.resources.gpus > 0.0 || self.resources.gpuMemory != '' || "
                "self.resources.accelerator != ''))",
                f"rollout counts accelerators, and {NO_ACCELERATOR}",
                ".rollout",
            ),
            Rule(
                "!has(self.rollout) || !has(self.rollout.probes) || self.rollout.probes.size() == 0 || "
                "!(self.task in ['embed', 'score', 'classify'])",
                NO_ANSWERS,
                ".rollout",
            ),
            Rule(
                "!has(self.rollout) || self.rollout.minAvailable <= self.scaling.maxReplicas",
                "rollout.minAvailable is above scaling.maxReplicas; lower it",
                ".rollout",
            ),
        )
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine.name != "simulated" and self.source is None:
            raise ValueError(f"source.uri is missing; the engine {self.engine.name} needs a checkpoint")
        if self.engine.name == "simulated" and self.scaling.zero == "Parked":
            raise ValueError(NOTHING_TO_PARK)
        if self.engine.name == "simulated" and self.quantization == "gptq":
            raise ValueError("quantization gptq needs the engine transformers or vllm")
        if self.engine.name != "transformers" and self.task in ("embed", "score", "classify"):
            raise ValueError(GENERATES_ONLY)
        if self.engine.name == "simulated" and self.chat_template:
            raise ValueError("chatTemplate needs the engine transformers or vllm")
        asked = self.resources
        if self.device == "cuda" and not (asked.gpus or asked.gpu_memory or asked.accelerator):
            raise ValueError(
                "device cuda needs resources.gpus above 0, or in a cluster resources.gpuMemory or "
                "resources.accelerator"
            )
        if self.device == "cpu" and (asked.gpus or asked.gpu_memory):
            raise ValueError(
                "device cpu takes no resources.gpus or resources.gpuMemory; remove them or use device auto"
            )
        if self.rollout is not None:
            takes_some = self.device != "cpu" and (asked.gpus or asked.gpu_memory or asked.accelerator)
            if self.rollout.counts_accelerators and not takes_some:
                raise ValueError(f"rollout counts accelerators, and {NO_ACCELERATOR}")
            if self.rollout.probes and self.task in ("embed", "score", "classify"):
                raise ValueError(NO_ANSWERS)
            if self.rollout.min_available > self.scaling.max_replicas:
                raise ValueError(
                    f"rollout.minAvailable ({self.rollout.min_available}) is above scaling.maxReplicas "
                    f"({self.scaling.max_replicas}); lower it"
                )
            if missing := surge_missing(self.rollout, self.scaling.max_replicas):
                raise ValueError(missing)
        return self


class Model(Strict):
    """One model that can be asked by its name."""

    api_version: Literal["tidegate.dev/v1alpha1"]
    kind: Literal["Model"]
    metadata: Metadata
    spec: ModelSpec = Field(description="What the Model should be.")

    @property
    def name(self) -> str:
        return self.metadata.name

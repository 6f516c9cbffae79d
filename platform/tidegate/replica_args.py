"""The arguments of a replica: its engine, where its queue is, and the times that a whole platform shares.

One home for each: hosts fill them in, Serve's config carries their encoding, and whoever needs them takes the
struct as it is. A field of `Times` that has a description is also a setting of every process, with that
description, those bounds and that default (`tidegate.settings`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct, field

from tidegate.errors import MOST_CHARACTERS, ConfigError, shortened

KEY_PREFIX = "tidegate"

Seconds = Annotated[float, Meta(gt=0, le=86_400)]


EngineName = Literal["transformers", "vllm", "simulated"]

FORMATS_FOLDER = Path(__file__).parent / "engines" / "transformers" / "formats"
CHAT_FORMATS = tuple(sorted(file.stem for file in FORMATS_FOLDER.glob("*.jinja")))  # built in

FROM_ENVIRONMENT = "env:"  # begins a `redis_url` that names a variable instead
SLOTS_UNTIL_KNOWN = 16  # of a revision that never reported how many its engine has
REDIS_VARIABLE = "TG_REDIS_URL"  # the one that hosts set for Ray's processes
NODE_FOLDER_VARIABLE = "TG_NODE_FOLDER"  # where its replicas leave files (`serving.node_files`)
PARKED_VARIABLE = "TIDEGATE_PARKED_BYTES"  # of the node's processes (`serving.parking_holder`)
REDIS_FOLDER_VARIABLE = "TG_REDIS_FOLDER"  # a mounted Secret with the files below
URL_FILE, PASSWORD_FILE = "url", "password"

# What Ray's processes of a node have in their environment where one of them waits there to become the next
# replica (`serving.spare`). Ray would give a replica a worker that has waited longer, so it keeps none of its
# own for more than 10 s.
PRELOAD_VARIABLE = "RAY_preload_python_modules"
PRELOAD_MODULE = "tidegate.serving.preload"
SPARE_VARIABLES = {
    PRELOAD_VARIABLE: PRELOAD_MODULE,
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "10000",
}

_URL = re.compile(
    r"(?P<scheme>[^/]*://)(?:(?P<user>[^/?#:]*)(?::(?P<password>[^/?#]*))?@)?(?P<rest>.*)", re.DOTALL
)


def unknown_format(chat_template: str) -> str:
    """Say what is wrong with a chat template that is neither a built-in format nor the text of one; empty:
    nothing. Every template has a tag, and no name has."""
    if not chat_template or chat_template in CHAT_FORMATS or "{{" in chat_template or "{%" in chat_template:
        return ""
    return (
        f"there is no chat format {shortened(chat_template, MOST_CHARACTERS // 4)!r}; use one of "
        f"{', '.join(CHAT_FORMATS)}, or the text of a template (Jinja)"
    )


def find_redis_url(given: str) -> str:
    """The URL that is given, or that of the variable named (`env:NAME`): Serve stores and logs its config, so
    no password may stand in it. A folder that the environment names may hold the URL or its password: it is
    read each time, because a Secret may change. Raises `ConfigError` where there is no such variable."""
    if not given.startswith(FROM_ENVIRONMENT):
        return given
    name = given.removeprefix(FROM_ENVIRONMENT)
    folder = os.environ.get(REDIS_FOLDER_VARIABLE, "")
    url = _held(folder, URL_FILE) or os.environ.get(name, "")
    if not url:
        raise ConfigError(
            f"redis_url: {given}: the process has no variable {name}; set it for Ray's processes"
        )
    return with_credentials(url, "", _held(folder, PASSWORD_FILE))


def with_credentials(url: str, username: str, password: str) -> str:
    """Return `url` with this user and password, as they are, in place of its own; an empty one leaves it."""
    parts = _URL.fullmatch(url)
    if parts is None or not (username or password):
        return url
    user = quote(username, safe="") if username else parts["user"] or ""
    secret = quote(password, safe="") if password else parts["password"] or ""
    return f"{parts['scheme']}{user}:{secret}@{parts['rest']}"


def without_password(url: str) -> str:
    parts = _URL.fullmatch(url)
    if parts is None or parts["password"] is None:
        return url
    return (
        f"{parts['scheme']}{parts['user']}@{parts['rest']}"
        if parts["user"]
        else parts["scheme"] + parts["rest"]
    )


def cut(secret: str) -> str:
    """Return a secret without the line break that editors and `echo` put at its end."""
    return secret.rstrip("\r\n")


def _held(folder: str, name: str) -> str:
    path = Path(folder, name)
    return cut(path.read_text(encoding="utf-8")) if folder and path.exists() else ""


class EngineSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """The spec names the engine of a revision and its bounds. `path` is a local checkpoint folder (empty:
    simulated)."""

    name: str  # an `EngineName`, or `create_engine` refuses it
    path: str = ""
    precision: str = "auto"  # auto | float32 | bfloat16 | float16
    quantization: str = "auto"  # auto | none | gptq
    device: str = "auto"  # auto | cpu | cuda
    context_length: int = 0  # 0: the checkpoint's own
    max_slots: int = 0  # 0: as many as KV memory holds (bounded by 256)
    kv_cache_bytes: int = 0  # 0: derived from free memory
    # All that a replica may take on its device, weights and KV cache and the rest; 0: what is free there.
    memory_cap_bytes: int = 0
    args: dict[str, Any] = field(default_factory=dict)  # engine-specific, validated by the engine
    chat_template: str = ""  # a name of `CHAT_FORMATS`, or a template's text; empty: the checkpoint's own
    task: str = ""  # generate | embed | score | classify; empty: generate


MOST_LOOKED_UP = 32  # tokens: they lie in `CONTEXT_SLACK`, and cost every row of the step


class TransformersArgs(Struct, frozen=True):
    """The arguments of the transformers engine (`EngineSpec.args`)."""

    # CPU threads of one model operation; 0: those that decode fastest when tried while requests run, up to
    # all cores that this process may use.
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    # Prompt tokens that join per step at most (one request always may): bounds how long others wait.
    prefill_tokens_per_step: Annotated[int, Meta(ge=1)] = 4096
    # Keep keys and values of what prompts begin with, so that the next prompt of the same tenant that begins
    # alike need not compute them.
    prefix_cache: bool = True
    # Memory for that, a part of the KV cache's; 0: up to a ninth of it.
    prefix_cache_bytes: Annotated[int, Meta(ge=0)] = 0
    # Keep keys and values in pages, not in an arena, where rows are padded to the longest. None: on a GPU, of
    # models that attend by the pages there. Only where layers keep nothing else and the self-check passes.
    kv_pages: bool | None = None
    # Tokens that a step may take of a request beyond its next one, proposed by what followed when its last
    # ones came up before (prompt lookup). The answers are the same, faster where they repeat what they have
    # seen; 0: off.
    prompt_lookup_num_tokens: Annotated[int, Meta(ge=0, le=MOST_LOOKED_UP)] = 0
    # Begin a step before the tokens of the one before have come to the host, while nobody joins and no row's
    # choice hangs on them. None: on a GPU, which else waits for the host.
    async_scheduling: bool | None = None
    # On a GPU: launch each operation of a decoding step instead of replaying the step as a captured graph.
    enforce_eager: bool = False
    # Share of the memory free after loading that the KV cache may take, where `kv_cache_bytes` is not set;
    # 0: 0.25 on CPU (at most 2 GiB there), 0.85 on CUDA.
    kv_cache_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    # On a CPU: unpack GPTQ weights of 4 bits into `precision` at load. Four times the memory; steps of more
    # than 8 rows are faster, those of fewer slower.
    unpacks_gptq: bool = False


class VllmArgs(Struct, frozen=True):
    """The arguments of the vLLM engine (`EngineSpec.args`). Their names are vLLM's own where it has them."""

    # CPU threads of one model operation; 0: all cores that this process may use.
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    # True: nothing is compiled and no CUDA graph captured. Starts sooner, answers slower.
    enforce_eager: bool = False
    # Tokens of one step at most, of prompts and answers together; 0: vLLM's own default.
    max_num_batched_tokens: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    # Whether prompts share the KV cache of what they begin with alike.
    enable_prefix_caching: bool = True
    # Share of a GPU's memory that all of the engine may take, where the platform caps it no lower.
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.85


# Of engines whose arguments are checked where a Model is read, not only where its replica loads.
ENGINE_ARGS: Mapping[str, type[Struct]] = {"transformers": TransformersArgs, "vllm": VllmArgs}
# What engines call an argument that is a field of the Model.
FIELDS_OF_A_MODEL = {
    "dtype": "precision",
    "torch_dtype": "precision",
    "quantization": "quantization",
    "device": "device",
    "max_model_len": "contextLength",
    "max_num_seqs": "engine.maxSlots",
    "kv_cache_memory_bytes": "engine.kvCacheBytes",
    "chat_template": "chatTemplate",
}


def mistake_in_args(args: Mapping[str, object], into: type[Struct]) -> str:
    """Say what is wrong with the arguments of an engine, which are the fields of `into`; empty: nothing."""
    known = [each.name for each in msgspec.structs.fields(into)]
    if unknown := sorted(set(args) - set(known)):
        instead = {name: f" (set spec.{field})" for name, field in FIELDS_OF_A_MODEL.items()}
        named = [shortened(name, MOST_CHARACTERS // 4) + instead.get(name, "") for name in unknown]
        return f"engine args have no {', '.join(named)}; known: {', '.join(known)}."
    for name, value in args.items():
        try:
            msgspec.convert({name: value}, into)
        except msgspec.ValidationError as error:
            amiss = str(error).partition(" - at ")[0]
            amiss = amiss.replace("Expected ", "must be ").replace(", got", ", not")
            return f"engine args: {name} is {shortened(repr(value), MOST_CHARACTERS // 4)}: it {amiss}."
    return ""


class Probe(Struct, frozen=True, forbid_unknown_fields=True):
    """A question that a replica must answer, greedily, before it takes requests: `prompt`, or the chat
    `messages`; `expect` must stand in the answer, or `pattern` (a regular expression) be found."""

    prompt: str = ""
    messages: list[dict[str, str]] = []
    expect: str = ""
    pattern: str = ""
    max_tokens: int = 32


class Times(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The times of queue and replicas. Gateways and replicas of one platform must have the same."""

    lease_seconds: Annotated[
        Seconds,
        Meta(description="How long after a replica's last sign of life its requests go to another one."),
    ] = 6.0
    result_ttl_seconds: Annotated[
        Seconds, Meta(description="How long a finished request's answer can still be read from the queue.")
    ] = 60.0
    orphan_seconds: Annotated[
        Seconds, Meta(description="How long a dead gateway's requests go on before they are cancelled.")
    ] = 120.0
    step_timeout_seconds: Annotated[
        Seconds, Meta(description="An engine without a step for so long is hung and restarted.")
    ] = 120.0
    drain_seconds: Annotated[
        Seconds, Meta(description="How long the requests of a deleted Model or a replaced replica may go on.")
    ] = 45.0
    beat_seconds: float = 2.0  # between two statistics of a replica
    sweep_interval_seconds: float = 1.0
    # So long without any sweep, Redis or everybody was away; then nobody is taken for dead for the grace.
    sweep_pause_seconds: float = 4.0
    sweep_grace_seconds: float = 5.0

    @property
    def expire_seconds(self) -> int:
        """`result_ttl_seconds` as Redis takes it."""
        return max(1, round(self.result_ttl_seconds))


DEFAULT_TIMES = Times()


class ReplicaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings tell every replica the same of its platform. They are fixed while the platform is up."""

    redis_url: str
    key_prefix: str = KEY_PREFIX
    times: Times = DEFAULT_TIMES
    log_dir: str = ""  # where replicas write replica-{model}.log; empty: only standard error, which Ray keeps


class ReplicaArgs(ReplicaSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of one replica, as `serving.app.build` gets them from Serve's config. `restarted` is when
    fresh replicas were asked for (unix seconds): Serve replaces those that have other arguments. `digest` is
    what must lie at the engine's `path` (`Checkpoint.digest` at this `commit`; empty: anything)."""

    model: str
    revision: str
    engine: EngineSpec
    restarted: float = 0.0
    probes: tuple[Probe, ...] = ()
    commit: str = ""
    digest: str = ""


class PolicyArgs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of a revision's autoscaling policy, each as in its `ReplicaArgs`."""

    redis_url: str
    key_prefix: str
    model: str
    revision: str


def parse_args(args: dict[str, Any], *, strict: bool = True) -> ReplicaArgs:
    """Read what Serve's config says or, not `strict`, what a command line says, where all is text. Raises
    `ConfigError` that names the field."""
    try:
        return msgspec.convert(args, ReplicaArgs, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"replica arguments: {error}") from error

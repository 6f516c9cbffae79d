"""Settings of the processes, read once at start from `TIDEGATE_*` variables (and `REDIS_URL`).

A wrong value, or a variable that no setting has, stops the start and names itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import platformdirs
from msgspec.structs import fields
from pydantic import BaseModel, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidegate.errors import ConfigError, FieldProblem
from tidegate.replica_args import DEFAULT_TIMES, KEY_PREFIX, Times, cut, with_credentials

PREFIX = "TIDEGATE_"
# Taken together, where Tidegate's own name of the first is not set.
PLAIN_VARIABLES = ("REDIS_URL", "REDIS_USERNAME", "REDIS_PASSWORD")
# Set by Tidegate for its own child processes or by build tooling; not settings of a process.
INTERNAL_VARIABLES = frozenset({"TIDEGATE_INSTANCE"})

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1 << 40)]

AnyModel = TypeVar("AnyModel", bound=BaseModel)
AnySettings = TypeVar("AnySettings", bound="ProcessSettings")


class ProcessSettings(BaseSettings):
    """The settings that all processes have in common. One frozen object is handed down; nothing else reads
    the environment. The description of a field goes to the reference page and to the chart."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", arbitrary_types_allowed=True
    )

    redis_url: str
    redis_username: str = Field("", description="Its user, in place of the one in the URL.")
    redis_password: str = Field(
        "",
        repr=False,
        description="Its password as it is, not percent-encoded, in place of the one in the URL; a line "
        "break at its end is cut.",
    )
    key_prefix: str = Field(
        KEY_PREFIX,
        pattern=r"^[a-z0-9-]{1,32}$",
        description="What every Redis key of this platform begins with; lower-case letters, digits, `-`.",
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto` is `console` on a terminal and `json` elsewhere."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    times: Times = DEFAULT_TIMES  # each of its described fields is a setting

    @field_validator("redis_url", "replica_redis_url", check_fields=False)
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        value = cut(value)
        if value and not re.match(r"(rediss?(\+sentinel)?|unix)://", value):
            raise ValueError(
                "use redis://host:port/db, rediss://, unix:///path.sock or redis+sentinel://host,host/master/db"
            )
        return value

    @field_validator("redis_username", "redis_password", "admin_key", check_fields=False)
    @classmethod
    def _one_line(cls, value: str) -> str:
        if re.search(r"[\x00-\x1f\x7f]", value := cut(value)):
            raise ValueError("it holds a line break or another control character; write it anew")
        return value


class Settings(ProcessSettings):
    """The settings of gateway, CLI and host."""

    home: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("tidegate", appauthor=False)),
        description="Folder of keys, logs, caches and the embedded queue's data; one platform per folder.",
    )
    redis_url: str = Field(
        "", description="A Redis or Valkey from 7.0 on, or its Sentinels; empty starts the embedded server."
    )

    spare_process: bool = Field(
        True,
        description="Keep a process waiting that has imported what a replica needs, so that a model wakes in "
        "one or two seconds instead of six to nine. It takes about 0.6 GB of memory.",
    )

    parked_bytes: int = Field(
        0,
        ge=0,
        description="Host memory that the weights of sleeping models may take (`scaling.zero: Parked`); 0: "
        "half of the machine's.",
    )

    host: str = Field("127.0.0.1", description="Address that the gateway listens on.")
    port: int = Field(
        8000, ge=0, le=65_535, description="Port that the gateway listens on; 0 takes a free one."
    )
    no_auth: bool = Field(False, description="Answer without keys. Allowed on a loopback address only.")
    admin_key_file: Path | None = Field(
        None,
        description="File with a key that the gateway lets in from its start on, as a mounted Secret has it.",
    )
    admin_url: str = Field(
        "",
        pattern=r"^(https?://[^/\s]+/?)?$",
        description="The control API that commands speak to, as in `https://host:8001`; empty: that of this "
        "machine, else of kubectl's current context.",
    )
    admin_key: str = Field(
        "", repr=False, description="The key for it, with the scope `admin`, or `read` to look only."
    )
    max_body_bytes: int = Field(
        8 * 1024 * 1024, ge=1024, le=1 << 30, description="Largest request body; above it 413."
    )

    bodies_max_bytes: Count = Field(
        128 * 1024 * 1024,
        description="Bytes of request bodies that a gateway reads at once, half of them one key's at most; "
        "above it 429. Bodies up to 64 KiB do not count.",
    )
    max_head_bytes: int = Field(
        32 * 1024, ge=4096, le=1 << 20, description="Largest request line and headers; above it 431."
    )
    max_connections: int = Field(
        8192,
        ge=16,
        le=1 << 20,
        description="Open connections of a gateway; fewer where its descriptors do not suffice. Above it "
        "those without a request make room, then 503.",
    )
    head_timeout_seconds: Seconds = Field(
        20.0, description="Time for the head of a request, the first of a connection too; then 408."
    )
    body_timeout_seconds: Seconds = Field(
        30.0, description="Time in which a further part of a request's body must come; then 408."
    )
    stall_timeout_seconds: Seconds = Field(
        60.0, description="After so long a client that takes nothing of its answer is left."
    )
    cors_origins: str = Field(
        "",
        pattern=r"^(\*|(https?://[^/,\s]+(,\s*https?://[^/,\s]+)*)?)$",
        description="Origins whose web pages may call, with commas between them, or `*`; empty allows none.",
    )

    total_max_requests: Count = Field(
        20_000, description="Requests waiting and running in all; above it 429."
    )
    total_max_bytes: Count = Field(
        512 * 1024 * 1024,
        description="Bytes of all requests waiting and running, and of what those that run have generated; "
        "above it 429, and the largest answers end.",
    )
    key_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="Share of a model's queue, in requests and in bytes, that one key may hold; above it "
        "429. With 1 a single key can fill it.",
    )
    tenant_max_requests: Count = Field(
        10_000, description="Requests waiting and running of one tenant; above it 429."
    )
    tenant_max_bytes: Count = Field(384 * 1024 * 1024, description="The same of one tenant's requests.")

    resume_seconds: float = Field(
        60.0,
        ge=20,
        le=86_400,
        description="How long a stream with event ids can be resumed: after its end, and while it runs and "
        "nobody reads it.",
    )
    store_seconds: float = Field(
        3600.0,
        ge=60,
        le=2_592_000,
        description="How long a stored response (`/v1/responses`) can be read after its end, and one in the "
        "background waits and runs.",
    )
    tenant_kept_bytes: Count = Field(
        64 * 1024 * 1024,
        description="Bytes of one tenant's calls that are kept to be read again (bodies, and answers that "
        "have ended); above it 429.",
    )
    total_kept_bytes: Count = Field(128 * 1024 * 1024, description="The same in all.")

    hold_status_seconds: Seconds = Field(
        5.0, description="How long a stream's status line waits for the first token or a refusal."
    )
    heartbeat_seconds: Seconds = Field(
        10.0, description="Time between comment heartbeats of a stream that has nothing to send."
    )
    shutdown_grace_seconds: float = Field(
        10.0, ge=1, le=3600, description="How long a stopping gateway lets open answers go on."
    )


def variables(kind: type[ProcessSettings]) -> dict[str, FieldInfo]:
    """Each setting of a process by its name, the times among them."""
    own = {name: info for name, info in kind.model_fields.items() if name != "times"}
    return own | CHECKED_TIMES.model_fields


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of gateway, CLI and host. Raises `ConfigError` as `read_settings` does."""
    return read_settings(Settings, environ)


def read_settings(kind: type[AnySettings], environ: Mapping[str, str] | None = None) -> AnySettings:
    """Read and check one process's settings. Raises `ConfigError` that names the variable, its value and the
    remedy."""
    environ = os.environ if environ is None else environ
    values = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(PREFIX) and name not in INTERNAL_VARIABLES and not _is_service_link(name, value)
    }
    if "redis_url" not in values and PLAIN_VARIABLES[0] in environ:
        values |= {name.lower(): environ[name] for name in PLAIN_VARIABLES if name in environ}
    known = variables(kind)
    problems = [
        FieldProblem(
            f"{PREFIX}{name.upper()}",
            _shown(name, value),
            "no such setting; known: " + ", ".join(sorted(known)),
        )
        for name, value in values.items()
        if name not in known
    ]
    problems += [
        FieldProblem(
            f"{PREFIX}{name.upper()}", _shown(name, values[name]), f"set {PREFIX}REDIS_URL beside it"
        )
        for name in ("redis_username", "redis_password")
        if values.get(name) and not values.get("redis_url")
    ]
    times = _checked(CHECKED_TIMES, values, problems)
    settings = _checked(kind, values, problems)
    if times is None or settings is None or problems:
        raise ConfigError("; ".join(map(str, problems)), problems)
    url = with_credentials(settings.redis_url, settings.redis_username, settings.redis_password)
    return settings.model_copy(update={"times": Times(**times.model_dump()), "redis_url": url})


_LINK_NAME = re.compile(
    r"TIDEGATE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*:\d+", re.DOTALL)


def _is_service_link(name: str, value: str) -> bool:
    """True where Kubernetes put this into a pod beside a Service whose name begins with `tidegate`."""
    if _LINK_NAME.fullmatch(name):
        return True
    return name.endswith("_PORT") and _LINK_ADDRESS.fullmatch(value) is not None


def _checked_times() -> type[BaseModel]:
    """Make a model of the described fields of `Times`, which Pydantic then checks as it does the others."""
    found: dict[str, Any] = {}
    for field in fields(Times):
        metas = getattr(field.type, "__metadata__", ())
        words = [meta.description for meta in metas if meta.description]
        bounds = {
            name: getattr(meta, name)
            for meta in metas
            for name in ("gt", "ge", "lt", "le")
            if getattr(meta, name) is not None
        }
        if words:
            found[field.name] = (field.type.__origin__, Field(field.default, description=words[0], **bounds))
    return create_model("CheckedTimes", **found)


CHECKED_TIMES = _checked_times()


def _checked(
    kind: type[AnyModel], values: Mapping[str, Any], problems: list[FieldProblem]
) -> AnyModel | None:
    """Make a model of `values`; where they are wrong, add to `problems` and return None."""
    try:
        return kind(**values)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
        return None


def _shown(name: str, value: Any) -> str:
    """Return a value for a message; of one that may hold a password, that there is one."""
    may_hold = re.search("password|secret|token|key$", name, re.I) or "@" in str(value)
    return "***" if may_hold and value else repr(value)


def _problem(item: ErrorDetails) -> FieldProblem:
    name = f"{PREFIX}{str(item['loc'][0]).upper()}"
    if item["type"] == "missing":  # its input would be all settings, secrets among them
        return FieldProblem(name, "missing", "set it")
    # Pydantic's message without the kind of error in front.
    return FieldProblem(name, _shown(name, item.get("input")), item["msg"].removeprefix("Value error, "))

"""Settings of the processes, read once at start from `TIDEGATE_*` variables (and `REDIS_URL`).

A wrong value, or a variable that no setting has, stops the start and names itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidegate.errors import ConfigError, FieldProblem

PREFIX = "TIDEGATE_"
# Set by Tidegate for its own child processes or by build tooling; not settings of a process.
INTERNAL_VARIABLES = frozenset({"TIDEGATE_INSTANCE"})

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1 << 40)]

AnySettings = TypeVar("AnySettings", bound=BaseSettings)


class Settings(BaseSettings):
    """One frozen object, handed down; nothing else reads the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("tidegate", appauthor=False)))
    redis_url: str = ""  # empty: the local host starts an embedded server
    key_prefix: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")] = "tidegate"

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    no_auth: bool = False
    admin_key_file: Path | None = None  # the gateway lets the key in that this file holds
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 8 * 1024 * 1024

    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    total_max_requests: Count = 20_000
    total_max_bytes: Count = 512 * 1024 * 1024
    tenant_max_requests: Count = 10_000
    tenant_max_bytes: Count = 512 * 1024 * 1024

    hold_status_seconds: Seconds = 5.0
    heartbeat_seconds: Seconds = 10.0
    shutdown_grace_seconds: Annotated[float, Field(ge=1, le=3600)] = 10.0  # for answers open at a stop
    lease_seconds: Seconds = 6.0
    result_ttl_seconds: Seconds = 60.0
    orphan_seconds: Seconds = 120.0  # how long a dead gateway's requests go on before they are cancelled
    step_timeout_seconds: Seconds = 120.0  # an engine without a step for so long is hung

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        if value and not re.match(r"(rediss?(\+sentinel)?|unix)://", value):
            raise ValueError(
                "use redis://host:port/db, rediss://, unix:///path.sock or redis+sentinel://host,host/master/db"
            )
        return value


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of gateway, CLI and host. Raises `ConfigError` as `read_settings` does."""
    return read_settings(Settings, environ)


def read_settings(kind: type[AnySettings], environ: Mapping[str, str] | None = None) -> AnySettings:
    """Read and check one process's settings. Raises `ConfigError` that names the variable, its value and the
    remedy."""
    environ = os.environ if environ is None else environ
    values = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(PREFIX) and name not in INTERNAL_VARIABLES
    }
    if "REDIS_URL" in environ and "redis_url" not in values:
        values["redis_url"] = environ["REDIS_URL"]
    known = set(kind.model_fields)
    problems = [
        FieldProblem(
            f"{PREFIX}{name.upper()}", repr(value), "no such setting; known: " + ", ".join(sorted(known))
        )
        for name, value in values.items()
        if name not in known
    ]
    try:
        settings = kind(**values) if not problems else None  # type: ignore[arg-type]
    except ValidationError as error:
        settings = None
        problems += [_problem(item) for item in error.errors()]
    if settings is None:
        raise ConfigError("; ".join(map(str, problems)), problems)
    return settings


def _problem(item: ErrorDetails) -> FieldProblem:
    name = f"{PREFIX}{str(item['loc'][0]).upper()}"
    if item["type"] == "missing":  # its input would be all settings, secrets among them
        return FieldProblem(name, "missing", "set it")
    # Pydantic's message without the kind of error in front.
    return FieldProblem(name, repr(item.get("input")), item["msg"].removeprefix("Value error, "))

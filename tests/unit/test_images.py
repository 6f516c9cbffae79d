"""The images' recipe agrees with what runs them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tidegate_operator.pod_template import USER_ID

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "platform" / "images" / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def stage(name: str) -> str:
    """The lines of one stage."""
    (text,) = re.findall(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", RECIPE, re.MULTILINE | re.DOTALL)
    return str(text)


def test_no_version_but_the_bases_is_written_here() -> None:
    assert len(re.findall(r"^ARG BASE=\S+:\S+$", RECIPE, re.MULTILINE)) == 1
    assert "==" not in RECIPE
    assert re.findall(r"^FROM (\S+)", RECIPE, re.MULTILINE).count("${BASE}") == 2


def test_every_image_runs_as_who_the_pods_say() -> None:
    for name, user in (("gateway", 65532), ("operator", 65532), ("ray", USER_ID)):
        assert f"USER {user}:{user}\n" in stage(name)


def test_gateway_and_operator_are_made_without_torch() -> None:
    extras = {
        name: re.findall(r"--extra (\S+)", stage(f"{name}-build")) for name in ("gateway", "operator", "ray")
    }
    known = PROJECT["project"]["optional-dependencies"]
    assert extras["gateway"] == []
    assert extras["operator"] == ["operator"]
    assert {"serving", "gptq"} <= set(extras["ray"]) <= set(known)
    light = [*PROJECT["project"]["dependencies"], *known["operator"]]
    assert not [name for name in light if re.match(r"(torch|ray|transformers|gptqmodel|tidegate)\b", name)]


def test_what_the_wheel_is_made_from_is_sent_to_the_builder() -> None:
    sent = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= set(sent)
    assert {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], "LICENSE"} <= set(sent)
    for path in sent:
        assert (ROOT / path).exists()

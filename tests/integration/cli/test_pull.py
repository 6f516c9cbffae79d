"""`tidegate pull` on checkpoints that lie on this machine, and on what cannot be fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.cli.command import assert_refused, tidegate
from tidegate import demo


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo.model_path("tide-demo"), tmp_path / "model"))


def test_a_whole_checkpoint_is_verified_and_its_folder_printed(checkpoint: Path) -> None:
    pulled = tidegate("pull", str(checkpoint))
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.strip() == str(checkpoint)
    assert "verify model.safetensors" in pulled.stderr
    assert "LlamaForCausalLM, bfloat16" in pulled.stderr


def test_json_holds_the_facts() -> None:
    pulled = tidegate("pull", demo.model_path("tide-demo-gptq").as_uri(), "-o", "json")
    facts = json.loads(pulled.stdout)
    assert facts["quantization"] == "gptq"
    assert facts["files"]["config.json"] > 0


def test_a_cut_file_is_named(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    assert_refused(tidegate("pull", str(checkpoint)), "SourceFormat", "model.safetensors")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert_refused(tidegate("pull", str(tmp_path / "none")), "SourceNotFound", str(tmp_path / "none"))


def test_offline_says_so_at_once(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert_refused(
        tidegate("pull", "hf://owner/name@main", environment=offline), "Offline", "hf://owner/name"
    )

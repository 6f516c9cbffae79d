"""Progress without a terminal: plain lines on stderr, nothing on stdout."""

from __future__ import annotations

import re

import pytest

from tidegate.cli.progress import Steps, Transfers
from tidegate.local.progress import Progress


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed = capsys.readouterr()
    assert printed.out == ""
    return [re.sub(r"^ *\d+\.\d s  ", "", line) for line in printed.err.splitlines()]


def test_a_step_is_told_when_it_begins_and_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as steps:
        steps.show(Progress("ray", "running", "Starting Ray."))
        steps.show(Progress("ray", "done", "Ray runs."))
    assert lines(capsys) == ["… Starting Ray.", "✓ Ray runs."]


def test_a_step_that_moves_on_is_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as steps:
        steps.show(Progress("model", "running", "Building.", "a"))
        steps.show(Progress("model", "running", "Loading.", "a"))
        steps.show(Progress("model", "failed", "OutOfMemory: no room.", "a"))
    assert lines(capsys) == ["… a: Building.", "✗ a: OutOfMemory: no room."]


def test_steps_of_several_models_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as steps:
        steps.show(Progress("model", "running", "Building.", "a"))
        steps.show(Progress("model", "running", "Building.", "b"))
        steps.show(Progress("model", "done", "Serving.", "b"))
        steps.show(Progress("model", "done", "Serving.", "a"))
    assert lines(capsys) == ["… a: Building.", "… b: Building.", "✓ b: Serving.", "✓ a: Serving."]


def test_a_file_is_told_once_when_it_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with Transfers() as transfers:
        transfers.moved("model.safetensors", 10, 2_000_000)
        transfers.moved("model.safetensors", 2_000_000, 2_000_000)
        transfers.moved("model.safetensors", 2_000_000, 2_000_000)
        transfers.moved("unknown size", 5, 0)
    assert lines(capsys) == ["  ✓ model.safetensors: 2.0 MB"]

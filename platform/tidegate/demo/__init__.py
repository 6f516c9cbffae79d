"""The demo models that Tidegate ships: a small Llama trained from scratch, and its GPTQ version.

Importing this package loads nothing heavy: the CLI and the gateway ask it for paths only.
"""

from pathlib import Path
from typing import Literal

DemoModel = Literal["tide-demo", "tide-demo-gptq"]


def model_path(name: DemoModel) -> Path:
    """The folder that holds the shipped checkpoint `name` (package data, read-only)."""
    return Path(__file__).parent / "weights" / name

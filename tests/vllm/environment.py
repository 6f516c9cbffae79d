"""The environment of vLLM that tests start it in: made once, outside the checkout, of pinned versions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from tests.clients.environments import CACHE, interpreter
from tidegate.engines.vllm.process import PYTHON_VARIABLE

PINS = Path(__file__).with_name("requirements.txt")
FOLDER = CACHE.with_name("vllm")


def vllm_python(environ: Mapping[str, str] = os.environ) -> Path:
    """The interpreter that is named, or of our own environment, which is made where it is missing: some
    seconds where the packages were fetched before. Raises `NotMade`."""
    if named := environ.get(PYTHON_VARIABLE):
        return Path(named)
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{FOLDER}.lock"):  # tests run in several processes
        return interpreter(FOLDER, PINS)

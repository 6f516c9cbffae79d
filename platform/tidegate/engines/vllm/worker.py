"""The process in which vLLM runs: vLLM's own interpreter starts this file, with the
descriptors of two sockets.

That interpreter has an environment of its own, with other versions than the platform's. So of the platform's
environment nothing is put on its path but this package itself, and of the package only what needs no more
than vLLM brings along (msgspec, torch, transformers, llguidance, numpy, psutil).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def find_tidegate() -> None:
    """Let this process import `tidegate`, and nothing that is installed beside it."""
    folder = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(
        "tidegate", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tidegate"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    find_tidegate()
    from tidegate.engines.vllm.stepping import main

    main(int(sys.argv[1]), int(sys.argv[2]))

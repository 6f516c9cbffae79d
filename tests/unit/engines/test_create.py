from __future__ import annotations

import subprocess
import sys

import pytest

from tidegate.engines.base import EngineLoadError
from tidegate.engines.create import create_engine
from tidegate.replica_args import EngineSpec


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(EngineLoadError, match="no engine 'warp'") as caught:
        create_engine(EngineSpec("warp"))
    assert caught.value.reason == "InvalidEngineArgs"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"stepms": 3}, "stepms"),
        ({"step_ms": "fast"}, "step_ms"),
        ({"step_ms": -1}, "step_ms"),
        ({"test_fault": {"marker": "x", "kind": "explode"}}, "kind"),
    ],
)
def test_a_wrong_engine_arg_is_refused_by_name(args: dict[str, object], named: str) -> None:
    with pytest.raises(EngineLoadError, match=named) as caught:
        create_engine(EngineSpec("simulated", args=args))
    assert caught.value.reason == "InvalidEngineArgs"


def test_the_simulated_engine_needs_no_model_library() -> None:
    code = (
        "import sys; from tidegate.engines.create import create_engine; "
        "from tidegate.replica_args import EngineSpec; create_engine(EngineSpec('simulated')).load(); "
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

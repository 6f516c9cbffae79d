import json
import subprocess
import sys

FORBIDDEN = {"ray", "torch", "transformers", "gptqmodel"}


def test_the_operator_loads_neither_ray_nor_a_model_library() -> None:
    code = "import json, sys, tidegate_operator.main; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(found.stdout))
    assert not FORBIDDEN & modules
    models = [name for name in modules if name.startswith("kubernetes.aio.client.models.")]
    assert len(models) < 50, "the client's model classes are loaded; they double the operator's memory"

"""The images `gateway` and `operator` as users build them. `ray`, with 6 GB of packages, is not built here.

The cluster's pods do not run them (`image.sh` says what they run): this is about the recipe.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "image_build.sh"
LARGEST_BYTES = 400 << 20  # what an image adds to its base
HEAVY = ("torch", "ray", "transformers", "gptqmodel", "numpy")


@pytest.fixture(scope="module")
def buildah() -> str:
    """The command that has the images, built from this checkout."""
    # It computes for minutes while the cluster beside it starts, where much has to be done in time.
    done = subprocess.run(["nice", str(SCRIPT)], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@contextmanager
def container(buildah: str, name: str) -> Iterator[str]:
    image = f"localhost/tidegate-test/{name}:{version()}"
    made = subprocess.run([buildah, "from", image], capture_output=True, text=True, check=True)
    try:
        yield made.stdout.strip()
    finally:
        subprocess.run([buildah, "rm", made.stdout.strip()], capture_output=True, check=True)


def version() -> str:
    from tidegate import __version__

    return __version__


def run(buildah: str, where: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [buildah, "run", where, "--", *command], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("name", "module", "missing"),
    [("gateway", "tidegate.gateway", "REDIS_URL"), ("operator", "tidegate_operator", "TIDEGATE_RAY_IMAGE")],
)
def test_an_image_runs_its_program_as_nobody_and_without_torch(
    buildah: str, name: str, module: str, missing: str
) -> None:
    with container(buildah, name) as where:
        code = (
            "import importlib.util, json, os, pathlib\n"
            f"found = [name for name in {HEAVY!r} if importlib.util.find_spec(name)]\n"
            "root = pathlib.Path('/opt/tidegate')\n"
            "size = sum(p.stat().st_size for p in root.rglob('*') if p.is_file() and not p.is_symlink())\n"
            "print(json.dumps({'user': os.getuid(), 'heavy': found, 'size': size,\n"
            "                  'writable': os.access(root, os.W_OK)}))"
        )
        said = run(buildah, where, "python", "-c", code)
        assert said.returncode == 0, said.stderr
        found = json.loads(said.stdout)
        assert found["user"] == 65532
        assert found["heavy"] == []
        assert found["size"] < LARGEST_BYTES
        assert found["writable"] is False
        # Its program starts, and names the first setting that it lacks.
        started = run(buildah, where, "python", "-m", module)
        assert started.returncode == 2
        assert missing in started.stderr
        shown = subprocess.run([buildah, "inspect", where], capture_output=True, text=True, check=True)
        assert json.loads(shown.stdout)["OCIv1"]["config"]["Cmd"] == ["python", "-m", module]


@pytest.mark.timeout(1000)
def test_the_hooks_programs_are_in_the_operators_image(buildah: str) -> None:
    with container(buildah, "operator") as where:
        for module in ("tidegate_operator.uninstall", "tidegate_operator.seed"):
            said = run(buildah, where, "python", "-m", module)
            assert "usage:" in said.stderr


@pytest.mark.timeout(1000)
def test_the_gateways_image_has_the_command(buildah: str) -> None:
    """For whoever has no Python: it needs only the address and a key of the control API."""
    with container(buildah, "gateway") as where:
        assert run(buildah, where, "tidegate", "rollout", "status", "--help").returncode == 0

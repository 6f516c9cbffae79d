"""What Helm makes of the chart: runs it, and looks into what it wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[3] / "helm" / "tidegate"
VALUES = Path(__file__).parent / "values"
VALUE_SETS = sorted(path.stem for path in VALUES.glob("*.yaml"))
RELEASE, NAMESPACE = "tidegate", "system"
KINDS_OF_CRDS = (
    "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy",
    "monitoring.coreos.com/v1",
    "gateway.networking.k8s.io/v1",
    "ray.io/v1/RayCluster",
)

Object = dict[str, Any]


def find_helm() -> Path | None:
    """TIDEGATE_HELM, the PATH, or what the tests' own cluster has built (`tests/cluster/build.sh`)."""
    if named := os.environ.get("TIDEGATE_HELM"):
        return Path(named)
    if found := shutil.which("helm"):
        return Path(found)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("TIDEGATE_CLUSTER_CACHE") or Path(home) / "tidegate" / "cluster")
    built = sorted(cache.glob("bin-*/helm"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else None


@dataclass(frozen=True)
class Helm:
    path: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Without a cluster and without this machine's Helm settings."""
        with tempfile.TemporaryDirectory(prefix="tidegate-helm-") as home:
            kept = {
                name: value for name, value in os.environ.items() if not name.startswith(("HELM_", "KUBE"))
            }
            own = {"HOME": home, "XDG_CACHE_HOME": home, "XDG_CONFIG_HOME": home, "XDG_DATA_HOME": home}
            return subprocess.run(
                [str(self.path), *arguments],
                env=kept | own,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

    def template(self, *arguments: str, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
        kinds = [f"--api-versions={kind}" for kind in KINDS_OF_CRDS]
        return self.run("template", RELEASE, str(chart), f"--namespace={NAMESPACE}", *kinds, *arguments)

    def objects(self, values: str, *arguments: str) -> list[Object]:
        done = self.template(f"--values={VALUES / values}.yaml", *arguments)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]


def pod_templates(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """(kind/name, the pod template) of everything that makes pods."""
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield f"{item['kind']}/{item['metadata']['name']}", item["spec"]["template"]
        elif item["kind"] == "Pod":
            yield f"Pod/{item['metadata']['name']}", item


def one(objects: Sequence[Object], kind: str, name: str, namespace: str = NAMESPACE) -> Object:
    (found,) = [
        item
        for item in objects
        if item["kind"] == kind
        and item["metadata"]["name"] == name
        and item["metadata"].get("namespace", NAMESPACE) == namespace
    ]
    return found


def environment(container: Object, secrets: dict[str, str] | None = None) -> dict[str, str]:
    """As the kubelet makes it: `$(NAME)` stands for what came before. `secrets` are values by Secret/key."""
    found: dict[str, str] = {}
    for variable in container["env"]:
        if "value" in variable:
            text = str(variable["value"])
            for name, value in found.items():
                text = text.replace(f"$({name})", value)
        elif "secretKeyRef" in variable["valueFrom"]:
            source = variable["valueFrom"]["secretKeyRef"]
            text = (secrets or {}).get(f"{source['name']}/{source['key']}", "s3cret")
        else:
            text = "from-the-pod"
        found[variable["name"]] = text
    return found

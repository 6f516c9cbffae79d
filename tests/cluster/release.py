"""The chart as a person installs it in the test cluster, and the few things that the tests do to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.cluster.cluster import CHART, Cluster, CommandFailed, Resource

SAMPLES = CHART.parent / "samples"
NAME = "tidegate"
NAMESPACE = "tidegate"
DEFINITIONS = ("models.tidegate.dev", "pools.tidegate.dev")
MODEL = "models.tidegate.dev"
POOL = "pools.tidegate.dev"
HEAD = "ray.io/node-type=head"
WORKER = "ray.io/node-type=worker"
GATEWAY = "app.kubernetes.io/component=gateway"
OPERATOR = "app.kubernetes.io/component=operator"

# What Kubernetes itself puts into every namespace, and notes about what was there.
NOT_OURS = ("configmap/kube-root-ca.crt", "serviceaccount/default")
NOTES = ("event/", "event.events.k8s.io/")


def resource(kind: str, name: str, spec: dict[str, Any]) -> Resource:
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }


@dataclass(frozen=True)
class Release:
    cluster: Cluster
    name: str = NAME
    namespace: str = NAMESPACE

    # ---- coming and going -----------------------------------------------------

    def install(self, *options: str) -> None:
        self.cluster.helm(
            *("install", self.name, str(CHART), "-n", self.namespace, "--create-namespace"),
            *("--wait", "--timeout", "4m", *options),
        )

    def upgrade(self, *options: str) -> None:
        self.cluster.helm(
            *("upgrade", self.name, str(CHART), "-n", self.namespace),
            *("--wait", "--timeout", "4m", *options),
        )

    def uninstall(self) -> None:
        self.cluster.helm("uninstall", self.name, "-n", self.namespace, "--wait", "--timeout", "5m")

    def is_installed(self) -> bool:
        return bool(json.loads(self.cluster.helm("list", "-n", self.namespace, "-o", "json")))

    def remove_all(self) -> None:
        """Also what an earlier run, or a person, has left."""
        if self.is_installed():
            self.uninstall()
        for name in DEFINITIONS:
            self.cluster.kubectl("delete", "crd", name, "--ignore-not-found")
        self.cluster.kubectl("delete", "namespace", self.namespace, "--ignore-not-found", timeout=180)

    def leftovers(self) -> list[str]:
        """Everything in the release's namespace, and everything outside that carries its name."""
        kinds = self.cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
        inside = self.cluster.kubectl(
            *("get", ",".join(kinds), "-n", self.namespace, "--ignore-not-found", "-o", "name")
        ).split()
        kinds = self.cluster.kubectl(
            "api-resources", "--namespaced=false", "--verbs=list", "-o", "name"
        ).split()
        selector = f"app.kubernetes.io/instance={self.name}"
        outside = self.cluster.kubectl(
            *("get", ",".join(kinds), "-l", selector, "--ignore-not-found", "-o", "name")
        ).split()
        definitions = [
            f"definition {name}" for name in DEFINITIONS if self.cluster.get("crd", name) is not None
        ]
        ours = [name for name in inside if name not in NOT_OURS and not name.startswith(NOTES)]
        return sorted([*ours, *outside, *definitions])

    # ---- asking ---------------------------------------------------------------

    @property
    def address(self) -> str:
        return self.cluster.address(f"{self.name}-gateway", self.namespace)

    @property
    def key(self) -> str:
        return self.cluster.secret(f"{self.name}-admin-key", "key", self.namespace)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=self.key, max_retries=0)

    def ask(self, model: str, question: str, *, max_tokens: int = 256) -> httpx.Response:
        """One answer, whole; waits as long as the gateway does."""
        return httpx.post(
            f"{self.address}/v1/chat/completions",
            headers={"Authorization": f"Bearer {self.key}"},
            json={
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "seed": 7,
            },
            timeout=300,
            trust_env=False,
        )

    def answer(self, model: str, question: str, *, max_tokens: int = 256) -> str:
        response = self.ask(model, question, max_tokens=max_tokens)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    # ---- Models and Pools -----------------------------------------------------

    def apply(self, *resources: Resource | Path) -> None:
        self.cluster.apply(*resources, namespace=self.namespace)

    def change(self, model: str, spec: dict[str, Any]) -> int:
        """Merge `spec` into a Model's; the generation that this makes."""
        patch = json.dumps({"spec": spec})
        text = self.cluster.kubectl(
            *("patch", MODEL, model, "-n", self.namespace, "--type=merge", "-p", patch, "-o", "json")
        )
        return int(json.loads(text)["metadata"]["generation"])

    def status(self, model: str) -> dict[str, Any]:
        found = self.cluster.get(MODEL, model, self.namespace) or {}
        status: dict[str, Any] = found.get("status") or {}
        return status

    def wait_for(
        self, model: str, condition: str, *, status: str = "True", reason: str = "", timeout: float = 180
    ) -> Resource:
        return self.cluster.wait_for_condition(
            MODEL, model, condition, self.namespace, status=status, reason=reason, timeout=timeout
        )

    def wait_until_told(self, model: str, generation: int, timeout: float = 120) -> dict[str, Any]:
        """The Model's status, as soon as it is of this generation and nothing is left to do."""

        def is_told() -> dict[str, Any] | None:
            status = self.status(model)
            progressing = next(
                (item["status"] for item in status.get("conditions", ()) if item["type"] == "Progressing"), ""
            )
            if status.get("observedGeneration", 0) < generation or progressing != "False":
                return None
            return status

        return self.cluster.wait_for(f"{model} settles on generation {generation}", is_told, timeout)

    def wait_for_pool(self, pool: str = "default", timeout: float = 180) -> Resource:
        return self.cluster.wait_for_condition(POOL, pool, "Ready", self.namespace, timeout=timeout)

    # ---- pods -----------------------------------------------------------------

    def pods(self, selector: str) -> list[Resource]:
        """Those that nobody has deleted."""
        found = self.cluster.get_all("pods", self.namespace, selector)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def kill(self, *pods: str) -> None:
        """A second for its goodbye, however much it asks for; returns when its processes are gone."""
        self.cluster.kubectl("delete", "pod", *pods, "-n", self.namespace, "--now")

    def wait_for_others(self, selector: str, before: Sequence[Resource], timeout: float = 180) -> None:
        """Until as many pods as `before` are ready, and one of them is new."""
        known = {pod["metadata"]["uid"] for pod in before}

        def has_others() -> bool:
            found = [pod for pod in self.pods(selector) if is_ready(pod)]
            return len(found) >= len(before) and any(pod["metadata"]["uid"] not in known for pod in found)

        self.cluster.wait_for(f"another pod {selector}", has_others, timeout)

    def leader(self) -> str:
        """The operator's pod that holds the Lease; empty where none does."""
        lease = self.cluster.get("lease", f"{self.name}-operator", self.namespace) or {}
        holder = str(lease.get("spec", {}).get("holderIdentity") or "")
        names = [pod["metadata"]["name"] for pod in self.cluster.get_all("pods", self.namespace, OPERATOR)]
        return next((name for name in names if holder.startswith(name)), "")

    def events(self, model: str) -> list[tuple[str, str]]:
        """(type, reason) of the Events about a Model."""
        found = self.cluster.get_all("events.events.k8s.io", self.namespace)
        return [
            (item["type"], item["reason"])
            for item in found
            if item.get("regarding", {}).get("name") == model and item["regarding"]["kind"] == "Model"
        ]


def is_ready(pod: Resource) -> bool:
    conditions = pod.get("status", {}).get("conditions", ())
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def is_refused(cluster: Cluster, *arguments: str) -> str:
    """What kubectl says to a command that must fail."""
    try:
        cluster.kubectl(*arguments)
    except CommandFailed as problem:
        return str(problem)
    raise AssertionError(f"kubectl {' '.join(arguments)} was not refused")

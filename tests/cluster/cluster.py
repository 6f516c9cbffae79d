"""A running test cluster: what the tests do with kubectl, helm and the API, and how they wait for it."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "helm" / "tidegate"

# One call of kubectl costs a tenth of a second of a core that the cluster wants too.
POLL_SECONDS = 0.5
GPU_RESOURCE = "nvidia.com/gpu"

T = TypeVar("T")
Resource = dict[str, Any]


class NotRunning(Exception):
    """There is no cluster; the message says how to start one."""


class CommandFailed(AssertionError):
    """kubectl or helm ended with an error, which is the message."""


@dataclass(frozen=True)
class Facts:
    """What up.sh wrote about the cluster that it started."""

    parts: str
    kubeconfig: Path
    programs: Path
    logs: Path
    node: str
    node_address: str
    registry: str
    tag: str
    valkey_image: str
    kuberay_version: str


@dataclass(frozen=True)
class Cluster:
    facts: Facts

    @classmethod
    def running(cls, parts: str = "all") -> Cluster:
        """The cluster that up.sh started. Raises `NotRunning`."""
        file = state_folder(parts) / "facts.json"
        if not file.exists():
            raise NotRunning(
                f"no cluster runs ({file} is missing): `make test-cluster` starts one for all its tests, "
                f"{HERE / 'up.sh'} one that stays"
            )
        found = json.loads(file.read_text(encoding="utf-8"))
        for name in ("kubeconfig", "programs", "logs"):
            found[name] = Path(found[name])
        return cls(Facts(**found))

    @property
    def environment(self) -> dict[str, str]:
        """For programs that find kubectl, helm and the cluster through the environment."""
        return {
            **os.environ,
            "KUBECONFIG": str(self.facts.kubeconfig),
            "PATH": f"{self.facts.programs}{os.pathsep}{os.environ['PATH']}",
        }

    def api(self) -> httpx.Client:
        """The API server itself, as the administrator, where kubectl costs too much or hides something."""
        kubeconfig = yaml.safe_load(self.facts.kubeconfig.read_text(encoding="utf-8"))
        keys = self.facts.kubeconfig.parent / "live" / "pki"
        context = ssl.create_default_context(cafile=keys / "ca.crt")
        context.load_cert_chain(keys / "admin.crt", keys / "admin.key")
        return httpx.Client(base_url=kubeconfig["clusters"][0]["cluster"]["server"], verify=context)

    # ---- doing ----------------------------------------------------------------

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> str:
        """Standard output. Raises `CommandFailed` with kubectl's own words."""
        return self._run("kubectl", arguments, stdin, timeout)

    def helm(self, *arguments: str, timeout: float = 600) -> str:
        return self._run("helm", arguments, None, timeout)

    def apply(self, *resources: Resource | Path, namespace: str = "default") -> None:
        """Server-side apply, as one field manager that forces: a test may repeat and change it."""
        stdin = "\n---\n".join(
            each.read_text(encoding="utf-8") if isinstance(each, Path) else manifest(each)
            for each in resources
        )
        command = ("apply", "--server-side", "--force-conflicts", "-n", namespace, "-f", "-")
        self.kubectl(*command, stdin=stdin)

    def delete(self, kind: str, name: str, namespace: str = "default", *, wait: bool = True) -> None:
        self.kubectl(
            "delete", kind, name, "-n", namespace, "--ignore-not-found", f"--wait={str(wait).lower()}"
        )

    @contextmanager
    def offering_gpus(self, count: int) -> Iterator[None]:
        """The node says that it has so many GPUs, as a device plugin would; it has none."""

        def offer(capacity: str | None) -> None:
            told = {GPU_RESOURCE: capacity}
            patch = json.dumps({"status": {"capacity": told, "allocatable": told}})
            self.kubectl(
                "patch", "node", self.facts.node, "--subresource=status", "--type=merge", "-p", patch
            )

        def is_offered() -> bool:
            node = self.get("node", self.facts.node)
            return node is not None and node["status"]["allocatable"].get(GPU_RESOURCE) == str(count)

        offer(str(count))
        try:
            self.wait_for("the GPUs can be asked for", is_offered, timeout=60)
            yield
        finally:
            offer(None)

    # ---- seeing ---------------------------------------------------------------

    def get(self, kind: str, name: str, namespace: str = "default") -> Resource | None:
        """One resource, or None where there is none of this name."""
        text = self.kubectl("get", kind, name, "-n", namespace, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text else None

    def get_all(self, kind: str, namespace: str = "default", selector: str = "") -> list[Resource]:
        text = self.kubectl("get", kind, "-n", namespace, "-l", selector, "-o", "json")
        items: list[Resource] = json.loads(text)["items"]
        return items

    def condition(self, kind: str, name: str, wanted: str, namespace: str = "default") -> Resource:
        """One condition of a resource; empty while there is none."""
        status = (self.get(kind, name, namespace) or {}).get("status", {})
        return next((each for each in status.get("conditions", []) if each["type"] == wanted), {})

    def address(self, service: str, namespace: str = "default", port: int | None = None) -> str:
        """A Service's URL, as the machine itself reaches it."""
        found = self.get("service", service, namespace)
        assert found is not None, f"there is no Service {service} in {namespace}"
        spec = found["spec"]
        return f"http://{spec['clusterIP']}:{port or spec['ports'][0]['port']}"

    def secret(self, name: str, key: str, namespace: str = "default") -> str:
        template = f'{{{{index .data "{key}" | base64decode}}}}'
        return self.kubectl("get", "secret", name, "-n", namespace, "-o", f"go-template={template}")

    def logs(self, pod: str, namespace: str = "default", *arguments: str) -> str:
        return self.kubectl("logs", pod, "-n", namespace, "--all-containers", "--prefix", *arguments)

    # ---- waiting --------------------------------------------------------------

    def wait_for(self, what: str, predicate: Callable[[], T | None], timeout: float = 120) -> T:
        """The first truthy value of `predicate`; a refused call counts as no value yet.

        Fails the test after `timeout` seconds with `what` and the last refusal.
        """
        end = time.monotonic() + timeout
        refusal: CommandFailed | None = None
        while True:
            try:
                if value := predicate():
                    return value
            except CommandFailed as problem:
                refusal = problem
            if time.monotonic() > end:
                raise AssertionError(
                    f"not within {timeout:.0f} s: {what}" + (f" ({refusal})" if refusal else "")
                )
            time.sleep(POLL_SECONDS)

    def wait_for_condition(
        self,
        kind: str,
        name: str,
        wanted: str,
        namespace: str = "default",
        *,
        status: str = "True",
        reason: str = "",
        timeout: float = 120,
    ) -> Resource:
        """The condition, as soon as it has this status (and reason). A failure shows what it was instead."""
        seen: Resource = {}

        def holds() -> Resource | None:
            seen.clear()
            seen.update(self.condition(kind, name, wanted, namespace))
            return seen if seen.get("status") == status and reason in ("", seen["reason"]) else None

        try:
            return dict(self.wait_for(f"{kind}/{name} {wanted}={status} {reason}", holds, timeout))
        except AssertionError as problem:
            raise AssertionError(f"{problem}; it is {seen or 'not there'}") from None

    def wait_until_gone(self, kind: str, name: str, namespace: str = "default", timeout: float = 120) -> None:
        self.wait_for(f"{kind}/{name} is gone", lambda: self.get(kind, name, namespace) is None, timeout)

    # ---- telling --------------------------------------------------------------

    def story(self, namespaces: Iterable[str]) -> str:
        """What a person would look at after a failure: resources, events and the ends of the logs."""
        parts = []
        for namespace in namespaces:
            parts.append(
                self._told("get", "models,pools,rayclusters,pods,jobs", "-n", namespace, "-o", "wide")
            )
            parts.append(self._told("get", "models,pools", "-n", namespace, "-o", "yaml"))
            parts.append(self._told("get", "events", "-n", namespace, "--sort-by=.lastTimestamp"))
            for pod in self._told("get", "pods", "-n", namespace, "-o", "name").split():
                if pod.startswith("pod/"):
                    options = ("--all-containers", "--prefix", "--tail=60")
                    parts.append(f"==== {pod}\n" + self._told("logs", pod, "-n", namespace, *options))
        return "\n\n".join(parts)

    def _told(self, *arguments: str) -> str:
        try:
            return self.kubectl(*arguments, timeout=20)
        except (CommandFailed, subprocess.TimeoutExpired) as problem:
            return str(problem)

    def _run(self, program: str, arguments: Iterable[str], stdin: str | None, timeout: float) -> str:
        command = [str(self.facts.programs / program), *arguments]
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise CommandFailed(
                f"{program} {' '.join(command[1:])}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout


def manifest(*resources: Resource) -> str:
    """A stream of documents for kubectl, as JSON: PyYAML leaves text like `12e3` without quotes."""
    return "".join(f"---\n{json.dumps(each)}\n" for each in resources)


def state_folder(parts: str = "all") -> Path:
    folder = os.environ.get("TIDEGATE_CLUSTER_STATE", "/tmp/tidegate-cluster")
    return Path(folder if parts == "all" else f"{folder}-{parts}")


def start(parts: str) -> Cluster:
    """Start these parts of a cluster; `stop` ends them. They stand beside a whole cluster."""
    subprocess.run([str(HERE / "up.sh")], env={**os.environ, "TIDEGATE_CLUSTER_PARTS": parts}, check=True)
    return Cluster.running(parts)


def stop(parts: str) -> None:
    subprocess.run([str(HERE / "down.sh")], env={**os.environ, "TIDEGATE_CLUSTER_PARTS": parts}, check=True)

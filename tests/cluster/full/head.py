"""A Ray head of the test cluster from outside: what its Serve holds, and what it takes of its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.cluster.cluster import Resource
from tidegate.control.observed import ApplicationState
from tidegate.serve_api import parse_state

CONTAINER = "ray-head"
DASHBOARD_PORT = 8265
CGROUPS = Path("/sys/fs/cgroup")  # the node is this machine


@dataclass(frozen=True)
class Head:
    """`token` opens its dashboard."""

    pod: Resource
    token: str

    @property
    def uid(self) -> str:
        return str(self.pod["metadata"]["uid"])

    @property
    def has_started(self) -> bool:
        return "running" in self._container.get("state", {})

    @property
    def restarts(self) -> int:
        return int(self._container["restartCount"])

    def applications(self) -> Mapping[str, ApplicationState]:
        """What Serve holds; nothing while it does not answer."""
        url = f"http://{self.pod['status']['podIP']}:{DASHBOARD_PORT}/api/serve/applications/"
        try:
            headers = {"Authorization": f"Bearer {self.token}"}
            response = httpx.get(url, headers=headers, timeout=10, trust_env=False)
        except httpx.HTTPError:
            return {}
        return parse_state(response.json()).applications if response.is_success else {}

    def memory_bytes(self) -> int:
        """What it cannot give back: the kernel's caches of files are not counted."""
        stat = _numbers(self._cgroup() / "memory.stat")
        if "total_rss" in stat:  # cgroup v1
            return stat["total_rss"] + stat["total_shmem"]
        return stat["anon"] + stat["shmem"]

    def limit_bytes(self) -> int:
        folder = self._cgroup()
        old, new = folder / "memory.limit_in_bytes", folder / "memory.max"
        return int((old if old.exists() else new).read_text(encoding="ascii"))

    def oom_kills(self) -> int:
        folder = self._cgroup()
        old, new = folder / "memory.oom_control", folder / "memory.events"
        return _numbers(old if old.exists() else new)["oom_kill"]

    @property
    def _container(self) -> Resource:
        found = self.pod.get("status", {}).get("containerStatuses", ())
        return next((item for item in found if item["name"] == CONTAINER), {})

    def _cgroup(self) -> Path:
        container = self._container["containerID"].removeprefix("containerd://")
        for place in ("memory/kubepods", "kubepods"):  # cgroup v1, v2
            for folder in (CGROUPS / place).glob(f"**/pod{self.uid}/{container}"):
                return folder
        raise AssertionError(f"no cgroup of the container {container} of the pod {self.uid}")


def _numbers(file: Path) -> dict[str, int]:
    lines = file.read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}

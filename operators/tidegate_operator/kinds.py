"""The table of kinds has a row for each that the operator reads or writes. Pure.

A watched kind needs `get`, `list` and `watch` in the chart's Role as well; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tidegate.control.resources import API_VERSION

Kind = Literal[
    "Model",
    "Pool",
    "RayCluster",
    "Job",
    "ControllerRevision",
    "Pod",
    "Event",
    "CoreEvent",
    "Node",
    "Deployment",
    "Lease",
    "Secret",
    "ConfigMap",
]

# On everything that the operator makes, so that listings and watches are short in a busy namespace.
OURS = "app.kubernetes.io/managed-by=tidegate-operator"


@dataclass(frozen=True, slots=True)
class Resource:
    """The place where the API server serves a kind, and what of it the cache holds."""

    api_version: str
    plural: str
    is_watched: bool = False
    selector: str = ""  # labels of the objects that are watched; empty: all
    is_optional: bool = False  # its definition is another product's and may come later
    is_namespaced: bool = True

    @property
    def group(self) -> str:
        """Empty for the core group."""
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"
        inside = f"namespaces/{namespace}" if self.is_namespaced else ""
        return "/".join(part for part in (root, inside, self.plural, name, subresource) if part)


RESOURCES: Mapping[Kind, Resource] = {
    "Model": Resource(API_VERSION, "models", is_watched=True),
    "Pool": Resource(API_VERSION, "pools", is_watched=True),
    "RayCluster": Resource("ray.io/v1", "rayclusters", is_watched=True, selector=OURS, is_optional=True),
    "Job": Resource("batch/v1", "jobs", is_watched=True, selector=OURS),
    "ControllerRevision": Resource("apps/v1", "controllerrevisions", is_watched=True, selector=OURS),
    "Pod": Resource("v1", "pods", is_watched=True, selector=OURS),
    "Event": Resource("events.k8s.io/v1", "events"),  # to be written
    "CoreEvent": Resource("v1", "events"),  # to be read: only here can a field selector name a pod
    "Node": Resource("v1", "nodes", is_namespaced=False),
    "Deployment": Resource("apps/v1", "deployments"),  # `uninstall` stops the operator's own
    "Lease": Resource("coordination.k8s.io/v1", "leases"),  # `uninstall` removes it
    # Tokens of Ray clusters are read, by name; `uninstall` reads Helm's records.
    "Secret": Resource("v1", "secrets"),
    "ConfigMap": Resource("v1", "configmaps"),
}
WATCHED: tuple[Kind, ...] = tuple(kind for kind, resource in RESOURCES.items() if resource.is_watched)

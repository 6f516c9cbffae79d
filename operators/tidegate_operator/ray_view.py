"""A pool's Ray clusters as one round finds them, and what that means for its Pool and Models. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tidegate.control.conditions import condition
from tidegate.control.observed import ServeState
from tidegate.control.reasons import READY, Reason
from tidegate.messages.registry import Condition
from tidegate_operator import ray_state
from tidegate_operator.cache import Body, labels
from tidegate_operator.pod_template import GENERATION_LABEL
from tidegate_operator.upgrade import Clusters

SILENT_SECONDS = 30.0  # a RayCluster of which KubeRay has said nothing for so long is not cared for
NO_KUBERAY = (
    "The cluster does not know ray.io/v1 RayClusters; install KubeRay 1.5.1 to 1.7. Tidegate looks again by "
    "itself."
)


@dataclass(frozen=True, slots=True)
class ServeView:
    """The answer of one cluster's Serve. `state` is None while it does not answer, and `silence` says why.
    `problem` and `rejected` are what it said of the last config (`ServeWriter`)."""

    state: ServeState | None
    silence: str = ""
    problem: tuple[str, str] | None = None
    rejected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RayView:
    """`views` are what each cluster's Serve says, by the cluster's name; `pods` are the active one's."""

    choice: Clusters
    views: Mapping[str, ServeView]
    pods: Sequence[Body]
    generation: str
    has_kuberay: bool

    @property
    def states(self) -> Mapping[str, ServeState | None]:
        return {name: view.state for name, view in self.views.items()}

    @property
    def view(self) -> ServeView:
        """The active cluster's Serve."""
        if self.choice.active is None:
            return ServeView(None)
        return self.views.get(name_of(self.choice.active), ServeView(None))


def serve_problem(ray: RayView, now: float) -> tuple[str, str] | None:
    """Return why Serve takes no config; None also while a cluster is on its way up."""
    if not ray.has_kuberay:
        return Reason.KubeRayMissing, NO_KUBERAY
    active = ray.choice.active
    if active is None or ray.view.state is not None:
        return ray.view.problem
    if ray_state.head_is_ready(ray.pods):
        return Reason.ServeUnavailable, ray.view.silence
    if ray_state.is_ignored(active, SILENT_SECONDS, now):
        return Reason.KubeRayMissing, _ignored(active)
    return None


def pool_ready(ray: RayView, now: float) -> Condition:
    """Return the Pool's condition `Ready`."""
    choice, active = ray.choice, ray.choice.active
    if not ray.has_kuberay:
        return condition(READY, "False", Reason.KubeRayMissing, NO_KUBERAY)
    if active is None and choice.retiring:
        return condition(READY, "False", Reason.ClusterRecreating)
    if active is None:
        return condition(READY, "False", Reason.ClusterStarting)
    if ray.view.state is None:
        reason, message = serve_problem(ray, now) or (Reason.ClusterStarting, "")
        return condition(READY, "False", reason, message)
    message = ""
    if choice.retiring:
        names = ", ".join(map(name_of, choice.retiring))
        message = f"The Ray cluster {name_of(active)} takes over from {names}."
    elif choice.wanted is not active:
        message = f"The Ray cluster {name_of(active)} serves; one of generation {ray.generation} comes up."
    return condition(READY, "True", Reason.ClusterReady, message)


def pool_numbers(ray: RayView, revisions: int | None) -> Mapping[str, object]:
    """Return the plain fields of the Pool's status."""
    active = ray.choice.active
    ready, wanted = ray_state.workers(active)
    return {
        "rayCluster": name_of(active) if active is not None else "",
        "generation": labels(active).get(GENERATION_LABEL, "") if active is not None else "",
        "workers": ready,
        "wantedWorkers": wanted,
        "revisions": revisions,
        "rayVersion": ray_state.ray_version(active),
        "kubeRay": ray_state.kuberay_version(ray.pods),
    }


def name_of(body: Body) -> str:
    return str(body["metadata"]["name"])


def _ignored(cluster: Body) -> str:
    return (
        f"KubeRay has not acted on the RayCluster {name_of(cluster)}; check that its operator runs and "
        f"watches the namespace {cluster['metadata']['namespace']}."
    )

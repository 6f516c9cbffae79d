"""Who may talk to whom by a set of NetworkPolicies, as Kubernetes defines it. No addresses: a rule with only
ports or ipBlocks is the outside's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Policy = dict[str, Any]
OUTSIDE = "outside"


@dataclass(frozen=True)
class Endpoint:
    namespace: str
    labels: tuple[tuple[str, str], ...] = ()
    port_names: tuple[tuple[str, int], ...] = ()

    @property
    def is_outside(self) -> bool:
        return self.namespace == OUTSIDE


def endpoint(namespace: str, labels: dict[str, str] | None = None, **port_names: int) -> Endpoint:
    return Endpoint(namespace, tuple((labels or {}).items()), tuple(port_names.items()))


def is_allowed(policies: Sequence[Policy], source: Endpoint, target: Endpoint, port: int) -> bool:
    return _passes(policies, source, target, target, port, "Egress") and _passes(
        policies, target, source, target, port, "Ingress"
    )


def _passes(
    policies: Sequence[Policy],
    subject: Endpoint,
    other: Endpoint,
    target: Endpoint,
    port: int,
    direction: Literal["Ingress", "Egress"],
) -> bool:
    """Whether `subject`'s own side lets the connection be. Nothing that selects it: everything may pass."""
    if subject.is_outside:
        return True
    selecting = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == subject.namespace
        and direction in policy["spec"]["policyTypes"]
        and _matches(policy["spec"]["podSelector"], dict(subject.labels))
    ]
    if not selecting:
        return True
    peers, rules = ("from", "ingress") if direction == "Ingress" else ("to", "egress")
    return any(
        _port_matches(rule.get("ports"), target, port)
        and _peer_matches(rule.get(peers), other, policy["metadata"]["namespace"])
        for policy in selecting
        for rule in policy["spec"].get(rules) or []
    )


def _port_matches(ports: list[dict[str, Any]] | None, target: Endpoint, port: int) -> bool:
    if not ports:
        return True
    return any(dict(target.port_names).get(item["port"], item["port"]) == port for item in ports)


def _peer_matches(peers: list[dict[str, Any]] | None, other: Endpoint, own_namespace: str) -> bool:
    if not peers:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            if other.is_outside:
                return True
            continue
        if other.is_outside:
            continue
        if "namespaceSelector" in peer:
            in_namespace = _matches(
                peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}
            )
        else:
            in_namespace = other.namespace == own_namespace
        if in_namespace and _matches(peer.get("podSelector", {}), dict(other.labels)):
            return True
    return False


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        value = labels.get(expression["key"])
        if expression["operator"] == "Exists" and value is None:
            return False
        if expression["operator"] == "In" and value not in expression["values"]:
            return False
        assert expression["operator"] in ("Exists", "In")
    return True

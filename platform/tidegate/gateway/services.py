"""Every route needs these parts; they are made once at start and handed down."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.gateway.grammar_pool import GrammarPool
from tidegate.gateway.intake import Intake
from tidegate.gateway.metrics import GatewayMetrics
from tidegate.gateway.ports import KeptCalls, KeyRing, ModelRegistry, RequestQueue
from tidegate.gateway.stream import OpenCalls
from tidegate.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    gateway_id: str
    queue: RequestQueue
    kept: KeptCalls
    keys: KeyRing
    registry: ModelRegistry
    metrics: GatewayMetrics
    calls: OpenCalls
    intake: Intake
    grammars: GrammarPool


def make_services(
    settings: Settings,
    gateway_id: str,
    queue: RequestQueue,
    kept: KeptCalls,
    keys: KeyRing,
    registry: ModelRegistry,
) -> Services:
    metrics = GatewayMetrics()
    calls = OpenCalls(queue, metrics, heartbeat_seconds=settings.heartbeat_seconds)
    # Less would refuse each body of the largest size.
    intake = Intake(max(settings.bodies_max_bytes, 2 * settings.max_body_bytes))
    metrics.open_requests.set_function(lambda: len(calls))
    return Services(settings, gateway_id, queue, kept, keys, registry, metrics, calls, intake, GrammarPool())

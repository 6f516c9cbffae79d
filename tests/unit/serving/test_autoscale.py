from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.serving import autoscale
from tidegate.serving.autoscale import Decision, QueueDepthPolicy, desired_replicas
from tidegate.serving.queue_watch import Sighting


def decide(**changes: Any) -> Decision:
    values: dict[str, Any] = {
        "waiting": 0,
        "running": 0,
        "replicas": 1,
        "target_in_flight": 8,
        "is_active": False,
        "minimum": 0,
        "maximum": 10,
    }
    return desired_replicas(**(values | changes))


@pytest.mark.parametrize(
    ("situation", "decision"),
    [
        ({"replicas": 0, "waiting": 1}, Decision(1, "WakeUp")),
        ({"replicas": 0, "waiting": 100}, Decision(10, "WakeUp")),
        ({"replicas": 0}, Decision(0, "Steady")),
        ({"replicas": 0, "is_active": True}, Decision(0, "Steady")),
        ({"waiting": 9, "running": 8}, Decision(3, "ScaleUp")),
        ({"running": 8}, Decision(1, "Steady")),
        ({"replicas": 3, "running": 9}, Decision(2, "ScaleDown")),
        ({}, Decision(0, "Idle")),
        ({"is_active": True}, Decision(1, "Active")),
        ({"minimum": 1}, Decision(1, "Steady")),
        ({"replicas": 4, "minimum": 2}, Decision(2, "ScaleDown")),
        ({"waiting": 3, "target_in_flight": 2.5}, Decision(2, "ScaleUp")),
    ],
)
def test_situations(situation: dict[str, Any], decision: Decision) -> None:
    assert decide(**situation) == decision


def test_a_target_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="target_in_flight"):
        decide(target_in_flight=0)


@given(
    waiting=st.integers(0, 10_000),
    running=st.integers(0, 10_000),
    replicas=st.integers(0, 50),
    target=st.floats(0.1, 500),
    active=st.booleans(),
    low=st.integers(0, 10),
    extra=st.integers(0, 40),
)
def test_bounds_hold_and_load_is_never_left_without_a_replica(
    waiting: int, running: int, replicas: int, target: float, active: bool, low: int, extra: int
) -> None:
    found = decide(
        waiting=waiting,
        running=running,
        replicas=replicas,
        target_in_flight=target,
        is_active=active,
        minimum=low,
        maximum=low + extra,
    )
    assert low <= found.replicas <= low + extra
    if waiting + running and low + extra:
        assert found.replicas >= 1
    enough = found.replicas * target >= waiting + running
    assert enough or found.replicas == low + extra


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 50))
def test_more_load_never_means_fewer_replicas(load: int, more: int, replicas: int) -> None:
    assert decide(waiting=load, replicas=replicas).replicas <= (
        decide(waiting=load + more, replicas=replicas).replicas
    )


@dataclass
class FakeWatch:
    sighting: Sighting | None = None

    def latest(self, queue: tuple[str, str]) -> Sighting | None:
        assert queue == ("m", "r")
        return self.sighting


@dataclass
class Config:
    target: float = 0.5
    upscale_delay_s: float = 0.0

    def get_target_ongoing_requests(self) -> float:
        return self.target


@dataclass
class Context:
    """The part of Serve's AutoscalingContext that the policy reads."""

    target_num_replicas: int = 1
    capacity_adjusted_min_replicas: int = 0
    capacity_adjusted_max_replicas: int = 10
    config: Config = field(default_factory=Config)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> FakeWatch:
    watch = FakeWatch()
    monkeypatch.setattr(autoscale, "shared_watch", lambda url, prefix: watch)
    return watch


def sighting(**changes: Any) -> Sighting:
    values: dict[str, Any] = {
        "at": time.monotonic(),
        "waiting": 0,
        "running": 0,
        "slots": 4,
        "tokens_total": 0,
    }
    return Sighting(**(values | changes))


def make_policy() -> QueueDepthPolicy:
    return QueueDepthPolicy(redis_url="redis://nowhere", key_prefix="p", model="m", revision="r")


def test_without_an_answer_of_redis_the_number_stays(watch: FakeWatch) -> None:
    policy = make_policy()
    assert policy(Context(target_num_replicas=3)) == (3, {"reason": "QueueUnknown"})
    watch.sighting = sighting(at=time.monotonic() - 60, waiting=50)
    assert policy(Context(target_num_replicas=2))[0] == 2


def test_a_target_below_one_means_the_engines_slots(watch: FakeWatch) -> None:
    watch.sighting = sighting(waiting=9)
    assert make_policy()(Context())[0] == 3
    assert make_policy()(Context(config=Config(target=9)))[0] == 1


def test_what_is_held_does_not_grow_and_keeps_what_works(watch: FakeWatch) -> None:
    watch.sighting = sighting(waiting=9)
    held = Config(upscale_delay_s=1e9)
    assert make_policy()(Context(target_num_replicas=0, config=held))[0] == 0
    assert make_policy()(Context(target_num_replicas=2, config=held))[0] == 2
    watch.sighting = sighting()
    assert make_policy()(Context(target_num_replicas=2, config=held))[0] == 0


def test_requests_too_short_to_be_seen_keep_the_last_replica(watch: FakeWatch) -> None:
    policy = make_policy()
    watch.sighting = sighting(tokens_total=100)
    assert policy(Context())[0] == 0
    watch.sighting = sighting(tokens_total=140)
    assert policy(Context())[0] == 1
    assert policy(Context())[0] == 0
    watch.sighting = sighting(tokens_total=0)  # the replica left
    assert policy(Context())[0] == 0


PICKLE = """
import sys
from ray.serve.config import AutoscalingPolicy
policy = AutoscalingPolicy(policy_function="tidegate.serving.autoscale:QueueDepthPolicy")
sys.stdout.buffer.write(policy.get_serialized_policy_def())
"""
UNPICKLE = """
import pickle, sys
policy = pickle.load(sys.stdin.buffer)
from tidegate.serving import autoscale, queue_watch
shared = policy.__init__.__globals__["shared_watch"]
print(policy is autoscale.QueueDepthPolicy, shared is queue_watch.shared_watch)
"""


def test_the_policy_survives_serves_way_of_shipping_it() -> None:
    """Serve pickles the policy's module by value; the watch must stay the one of the imported module, or
    each policy would poll for itself."""
    pickled = subprocess.run([sys.executable, "-c", PICKLE], capture_output=True, check=True).stdout
    told = subprocess.run([sys.executable, "-c", UNPICKLE], input=pickled, capture_output=True, check=True)
    assert told.stdout.split() == [b"False", b"True"]

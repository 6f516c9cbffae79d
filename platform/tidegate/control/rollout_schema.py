"""`spec.rollout`: how a new revision of a model takes the traffic over.

A model without it does what it always did: the new revision takes everything once it has proved itself.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self

import msgspec
from pydantic import ConfigDict, Field, field_validator, model_validator

from tidegate import replica_args
from tidegate.control.evidence import ALLOWED_SLOWDOWN, needed_requests
from tidegate.control.schema_types import Rule, Strict, rules

NO_ACCELERATOR = "a replica takes none; give maxSurge and minAvailable, in replicas, or resources.gpus"
MAX_STEPS = 20
MAX_HOLD_SECONDS = 30 * 86_400.0

Hold = Annotated[float, Field(ge=0, le=MAX_HOLD_SECONDS)]
Accelerators = Annotated[float, Field(ge=0, le=4096)]


class Step(Strict):
    """One step of a rollout: it ends once it was held long enough, enough requests ended well, and, with
    `pause`, a person says so."""

    weight: int = Field(
        ge=1, le=100, description="Share of the requests that the new revision takes, of 100."
    )
    hold_seconds: Hold = Field(default=60.0, description="Seconds that the step is held at least.")
    pause: bool = Field(
        default=False, description="Wait for a person after that (tidegate rollout resume MODEL)."
    )


DEFAULT_STEPS = (Step(weight=15), Step(weight=50), Step(weight=100))


class Shadow(Strict):
    """A step before the first: requests run on the new revision as well, and its answers are thrown away."""

    share: int = Field(default=100, ge=1, le=100, description="Share of the requests that run twice, of 100.")
    requests: int = Field(
        default=59,
        ge=0,
        le=1_000_000,
        description="Shadowed requests that must have ended well; 0: the time alone counts.",
    )
    hold_seconds: Hold = Field(default=30.0, description="Seconds that the step is held at least.")


class ProbeMessage(Strict):
    role: Literal["system", "user", "assistant"] = Field(description="Who says it.")
    content: str = Field(min_length=1, max_length=16_384, description="What is said.")


class Probe(Strict):
    """A question that each new revision must answer, greedily, before it gets traffic."""

    prompt: str = Field(default="", max_length=16_384, description="Text to go on with; or give messages.")
    messages: tuple[ProbeMessage, ...] = Field(
        default=(), max_length=16, description="A chat to answer; or give prompt."
    )
    expect: str = Field(
        default="", max_length=16_384, description="The answer must contain this text; or give pattern."
    )
    pattern: str = Field(
        default="",
        max_length=1024,
        description="A regular expression (Python's) must be found in the answer; or give expect.",
    )
    max_tokens: int = Field(default=32, ge=1, le=4096, description="Tokens of the answer at most.")

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "(has(self.prompt) && self.prompt != '') != (has(self.messages) && self.messages.size() > 0)",
                "give prompt or messages, one of them",
            ),
            Rule(
                "(has(self.expect) && self.expect != '') != (has(self.pattern) && self.pattern != '')",
                "give expect or pattern, one of them",
            ),
        )
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("give prompt or messages, one of them")
        if bool(self.expect) == bool(self.pattern):
            raise ValueError("give expect or pattern, one of them")
        return self


class RolloutLimits(Strict):
    """What the new revision must keep to whatever the old one does; also a Model's first revision."""

    error_rate: float | None = Field(
        default=None,
        ge=0.0001,
        le=0.99,
        description="Share of requests that may fail by our fault (0.01: one in 100).",
    )
    first_token_seconds: float | None = Field(
        default=None,
        ge=0.001,
        le=3600,
        description="Seconds to the first token that 95 % of requests must keep.",
    )
    between_tokens_seconds: float | None = Field(
        default=None,
        ge=0.001,
        le=3600,
        description="Mean seconds between tokens that 95 % of requests must keep.",
    )


class RolloutSpec(Strict):
    """How a new revision takes the traffic over, and what makes it give it back."""

    strategy: Literal["Canary", "BlueGreen", "Recreate"] = Field(
        default="Canary",
        description="Canary: step by step. BlueGreen: at once, when as many replicas are ready. Recreate: "
        "the old revision stops first and requests wait, for a Pool without room for both.",
    )
    steps: tuple[Step, ...] = Field(
        default=(),
        max_length=MAX_STEPS,
        description="Steps with growing weights, the last of them 100; without any: 15, 50, 100 of 60 "
        "seconds each, or the one step 100 where the strategy is not Canary.",
        json_schema_extra=rules(
            Rule(
                "self.size() == 0 || self[self.size() - 1].weight == 100",
                "the last step's weight must be 100; add it",
            ),
            Rule(
                "self.map(step, step.weight).isSorted() && "
                "self.all(step, self.exists_one(other, other.weight == step.weight))",
                "weights of steps must grow; put them in order",
            ),
        ),
    )
    shadow: Shadow | None = Field(
        default=None, description="Run requests on the new revision as well before it gets any."
    )
    probes: tuple[Probe, ...] = Field(
        default=(), max_length=16, description="Questions that each replica answers before it takes requests."
    )
    max_surge: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Replicas above scaling.maxReplicas that both revisions may have together; without it, "
        "and without maxSurgeAccelerators, the Pool's room is the bound.",
    )
    max_surge_accelerators: Accelerators | None = Field(
        default=None,
        description="In the place of maxSurge: accelerators (GPUs; 0.5 is half of one, in steps of 0.01) "
        "that both revisions may take together above what scaling.maxReplicas replicas of the larger one "
        "take.",
    )
    min_available: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Replicas that the old revision keeps at least until the rollout is complete.",
    )
    min_available_accelerators: Accelerators = Field(
        default=0.0,
        description="In the place of minAvailable: accelerators that the old revision's replicas keep "
        "together at least, rounded up to whole replicas.",
    )
    stable_scales_down: bool = Field(
        default=False,
        description="The old revision gives up replicas as its share shrinks; otherwise it keeps what it "
        "had, and an abort needs no replica to start.",
    )
    margin: float = Field(
        default=0.05,
        ge=0.0001,
        le=0.5,
        description="Error rate above the old revision's that enough good requests must exclude before a "
        "step ends, and that at 100 % is allowed above what it was before: 0.05 asks for 59 of them where "
        "none fails, 0.02 for 149, 0.01 for 299, and for more with each that fails.",
    )
    min_requests: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Requests that must have ended well on the new revision, in place of what margin asks "
        "for; 0: the rollout goes by the clock alone.",
    )
    allowed_slowdown: float = Field(
        default=ALLOWED_SLOWDOWN,
        ge=1,
        le=100,
        description="How many times as long as the old revision's the times to the first token and between "
        "tokens may be; what is at most 1.4 times as much may pass as well.",
    )
    limits: RolloutLimits = Field(
        default=RolloutLimits(), description="What the new revision must keep to whatever the old one does."
    )
    abort_scale_down_seconds: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="Seconds that the replicas of an aborted revision stay, for a look at them.",
    )
    history_limit: int = Field(
        default=10, ge=1, le=100, description="Revisions that are remembered, for undo and history."
    )

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.strategy == 'Canary' || !has(self.steps) || self.steps.size() <= 1",
                "steps are for the strategy Canary; leave them out, or keep one of weight 100",
                ".steps",
            ),
            Rule(
                "self.strategy != 'Recreate' || self.minAvailable == 0",
                "strategy Recreate stops the old revision first; leave minAvailable 0",
                ".minAvailable",
            ),
            Rule(
                "self.strategy != 'Recreate' || self.minAvailableAccelerators == 0.0",
                "strategy Recreate stops the old revision first; leave minAvailableAccelerators 0",
                ".minAvailableAccelerators",
            ),
            Rule(
                "!has(self.maxSurge) || !has(self.maxSurgeAccelerators)",
                "give maxSurge or maxSurgeAccelerators, one of them",
                ".maxSurgeAccelerators",
            ),
            Rule(
                "self.minAvailable == 0 || self.minAvailableAccelerators == 0.0",
                "give minAvailable or minAvailableAccelerators, one of them",
                ".minAvailableAccelerators",
            ),
            Rule(
                "self.strategy != 'Recreate' || !has(self.shadow)",
                "strategy Recreate has no two revisions at a time; leave shadow out",
                ".shadow",
            ),
        )
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        weights = [step.weight for step in self.steps]
        if weights and weights[-1] != 100:
            raise ValueError(f"steps ends with the weight {weights[-1]}; add a last step of 100")
        if weights != sorted(set(weights)):
            raise ValueError(f"steps has the weights {weights}; put them in order, each once")
        if self.strategy != "Canary" and len(weights) > 1:
            raise ValueError(
                f"steps are for the strategy Canary, not {self.strategy}; leave them out, or keep one of 100"
            )
        if self.strategy == "Recreate" and (self.min_available or self.min_available_accelerators):
            field = "minAvailable" if self.min_available else "minAvailableAccelerators"
            raise ValueError(f"strategy Recreate stops the old revision first; leave {field} 0")
        if self.max_surge is not None and self.max_surge_accelerators is not None:
            raise ValueError("give maxSurge or maxSurgeAccelerators, one of them")
        if self.min_available and self.min_available_accelerators:
            raise ValueError("give minAvailable or minAvailableAccelerators, one of them")
        if self.strategy == "Recreate" and self.shadow is not None:
            raise ValueError("strategy Recreate has no two revisions at a time; leave shadow out")
        return self

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps that are taken."""
        return self.steps or (DEFAULT_STEPS if self.strategy == "Canary" else DEFAULT_STEPS[-1:])

    @property
    def asked(self) -> list[replica_args.Probe]:
        """The probes as replicas are told them."""
        return [msgspec.convert(probe.model_dump(), replica_args.Probe) for probe in self.probes]

    @property
    def has_surge(self) -> bool:
        """Tell whether a number bounds what both revisions have together."""
        return self.max_surge is not None or self.max_surge_accelerators is not None

    @property
    def counts_accelerators(self) -> bool:
        return self.max_surge_accelerators is not None or self.min_available_accelerators > 0

    @property
    def has_limits(self) -> bool:
        return self.limits != RolloutLimits()

    @property
    def least_requests(self) -> int:
        if self.min_requests is not None:
            return self.min_requests
        return needed_requests(self.margin)


def needed_replicas(size: int, weight: int) -> int:
    """Return how many of a model's `size` replicas the share `weight` (of 100) needs; one at least."""
    return max(1, math.ceil(size * weight / 100)) if weight else 0


def stable_replicas(spec: RolloutSpec, size: int, weight: int) -> int:
    """Return how many replicas the old revision keeps of `size` while the new one has `weight` of 100."""
    if spec.strategy == "Recreate":
        return 0
    left = needed_replicas(size, 100 - weight) if spec.stable_scales_down else size
    return max(left, spec.min_available)


def peaks(spec: RolloutSpec, size: int) -> list[tuple[int, int]]:
    """Return how many replicas the old and the new revision have at the most crowded moment of each step: its
    are ready before it begins."""
    before = [0, *(step.weight for step in spec.all_steps[:-1])]
    return [
        (stable_replicas(spec, size, weight), needed_replicas(size, step.weight))
        for weight, step in zip(before, spec.all_steps, strict=True)
    ]


def peak_replicas(spec: RolloutSpec, size: int) -> int:
    """Return the most replicas that both revisions have at a time."""
    return max(map(sum, peaks(spec, size)))


def surge_missing(spec: RolloutSpec, max_replicas: int) -> str:
    """Return why the rollout of a model of so many replicas cannot keep to `maxSurge`, with the sum; empty:
    it can."""
    if spec.max_surge is None:
        return ""
    size = max(range(1, max_replicas + 1), key=lambda count: peak_replicas(spec, count))
    peak, most = peak_replicas(spec, size), max_replicas + spec.max_surge
    if peak <= most:
        return ""
    least = peak - max_replicas
    return (
        f"rollout.maxSurge is {spec.max_surge}: with scaling.maxReplicas {max_replicas} both revisions may "
        f"have {most} replicas together, and the rollout of {size} needs {peak}; raise maxSurge to {least}, "
        "use stableScalesDown with more and smaller steps, or strategy Recreate"
    )

"""The gateway's metrics. Children with labels are looked up once per model and outcome, then kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from tidegate import telemetry
from tidegate.messages.queue import QueueHealth, QueueState

# Of a call that was given a revision. `error`: ours (a status of 500 or more).
RevisionOutcome = Literal["ok", "error", "refused", "left"]
UNKNOWN_MODEL = "-"  # names that clients invent never become labels


@dataclass(slots=True)
class _ModelMetrics:
    first_token: Histogram
    duration: Histogram
    per_token: Histogram
    prompt_tokens: Counter
    generation_tokens: Counter
    vllm_first_token: Histogram
    vllm_duration: Histogram
    vllm_prompt_tokens: Counter
    vllm_generation_tokens: Counter


@dataclass(slots=True)
class _RevisionMetrics:
    first_token: Histogram
    per_token: Histogram
    requests: dict[RevisionOutcome, Counter]


class GatewayMetrics:
    """One per gateway process, with a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            telemetry.REQUESTS,
            "HTTP calls for generation that ended",
            ["model", "outcome"],
            registry=registry,
        )
        self._first_token = Histogram(
            telemetry.TIME_TO_FIRST_TOKEN,
            "Seconds from the call to its first segment (streams)",
            ["gen_ai_request_model"],
            buckets=telemetry.FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._duration = Histogram(
            telemetry.REQUEST_DURATION,
            "Seconds from the call to the end of its answer",
            ["gen_ai_request_model"],
            buckets=telemetry.DURATION_BUCKETS,
            registry=registry,
        )
        self._per_token = Histogram(
            telemetry.TIME_PER_OUTPUT_TOKEN,
            "Seconds per generated token after the first segment (streams of one choice)",
            ["gen_ai_request_model"],
            buckets=telemetry.PER_TOKEN_BUCKETS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            telemetry.PROMPT_TOKENS, "Prompt tokens of answered calls", ["model"], registry=registry
        )
        self._generation_tokens = Counter(
            telemetry.GENERATION_TOKENS, "Generated tokens of answered calls", ["model"], registry=registry
        )
        self.segments = Counter(telemetry.SEGMENTS, "Segments received from the queue", registry=registry)
        self.replays = Counter(
            telemetry.REPLAYS, "Logs read again after a gap or a reconnect", registry=registry
        )
        self.open_requests = Gauge(
            telemetry.OPEN_REQUESTS, "Sequences that clients wait for", registry=registry
        )
        self.waiting = Gauge(
            telemetry.REQUESTS_WAITING,
            "Requests waiting in the queue",
            ["model", "revision"],
            registry=registry,
        )
        self.running = Gauge(
            telemetry.REQUESTS_RUNNING,
            "Requests leased to replicas",
            ["model", "revision"],
            registry=registry,
        )
        self.replicas = Gauge(
            telemetry.MODEL_REPLICAS, "Replicas of a model", ["model", "state"], registry=registry
        )
        self._queue_state = Gauge(
            telemetry.QUEUE_STATE, "1 for what the queue's Redis is", ["state"], registry=registry
        )
        self._queue_may_evict = Gauge(
            telemetry.QUEUE_MAY_EVICT, "1 where its maxmemory-policy is not noeviction", registry=registry
        )
        # vLLM's well-known names, for dashboards and scalers that look for them.
        label = ["model_name"]
        self._vllm_waiting = Gauge(
            "vllm:num_requests_waiting", "Requests waiting in the queue", label, registry=registry
        )
        self._vllm_running = Gauge(
            "vllm:num_requests_running", "Requests leased to replicas", label, registry=registry
        )
        self._vllm_first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from the call to its first segment (streams)",
            label,
            buckets=telemetry.FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._vllm_duration = Histogram(
            "vllm:e2e_request_latency_seconds",
            "Seconds from the call to the end of its answer",
            label,
            buckets=telemetry.DURATION_BUCKETS,
            registry=registry,
        )
        self._vllm_prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens of answered calls", label, registry=registry
        )
        self._vllm_generation_tokens = Counter(
            "vllm:generation_tokens", "Generated tokens of answered calls", label, registry=registry
        )
        self._vllm_success = Counter(
            "vllm:request_success",
            "Sequences that ended well",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        label = ["model", "revision"]
        self._revision_requests = Counter(
            telemetry.REVISION_REQUESTS,
            "HTTP calls for generation that ended, by the revision they were given",
            [*label, "outcome"],
            registry=registry,
        )
        self._revision_first_token = Histogram(
            telemetry.REVISION_FIRST_TOKEN,
            "Seconds from the call to its first segment (streams)",
            label,
            buckets=telemetry.FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._revision_per_token = Histogram(
            telemetry.REVISION_PER_TOKEN,
            "Seconds per generated token after the first segment (streams of one choice)",
            label,
            buckets=telemetry.PER_TOKEN_BUCKETS,
            registry=registry,
        )
        self._revisions: dict[tuple[str, str], _RevisionMetrics] = {}
        self._models: dict[str, _ModelMetrics] = {}
        self._outcomes: dict[tuple[str, str], Counter] = {}

    def ended(self, model: str, outcome: str) -> None:
        """Count a call. `outcome` is "ok", "left" or the reason of a refusal or failure."""
        counter = self._outcomes.get((model, outcome))
        if counter is None:
            counter = self._outcomes[(model, outcome)] = self._requests.labels(model, outcome)
        counter.inc()

    def ended_on(self, model: str, revision: str, outcome: RevisionOutcome) -> None:
        """Count a call that was given a revision."""
        metrics = self._revisions.get((model, revision)) or self._revision(model, revision)
        metrics.requests[outcome].inc()

    def keep_revisions(self, listed: Collection[tuple[str, str]]) -> None:
        """Forget all (model, revision) but these: models change, and labels must not add up for ever."""
        for model, revision in [each for each in self._revisions if each not in listed]:
            for outcome in get_args(RevisionOutcome):
                self._revision_requests.remove(model, revision, outcome)
            self._revision_first_token.remove(model, revision)
            self._revision_per_token.remove(model, revision)
            del self._revisions[model, revision]

    def answered(
        self,
        model: str,
        revision: str,
        *,
        duration_seconds: float,
        first_token_seconds: float | None,
        prompt_tokens: int,
        generation_tokens: int,
        finish_reasons: Sequence[str],
    ) -> None:
        """Record a call that succeeded. `first_token_seconds` is None where the answer was not streamed."""
        metrics = self._models.get(model) or self._model(model)
        metrics.duration.observe(duration_seconds)
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.generation_tokens.inc(generation_tokens)
        metrics.vllm_duration.observe(duration_seconds)
        metrics.vllm_prompt_tokens.inc(prompt_tokens)
        metrics.vllm_generation_tokens.inc(generation_tokens)
        for reason in finish_reasons:
            self._vllm_success.labels(model, reason).inc()
        if first_token_seconds is None:
            return
        of_revision = self._revisions.get((model, revision)) or self._revision(model, revision)
        metrics.first_token.observe(first_token_seconds)
        of_revision.first_token.observe(first_token_seconds)
        metrics.vllm_first_token.observe(first_token_seconds)
        if len(finish_reasons) == 1 and generation_tokens > 1:
            per_token_seconds = (duration_seconds - first_token_seconds) / (generation_tokens - 1)
            metrics.per_token.observe(per_token_seconds)
            of_revision.per_token.observe(per_token_seconds)

    def queue_health(self, health: QueueHealth) -> None:
        for state in get_args(QueueState):
            self._queue_state.labels(state).set(state == health.state)
        self._queue_may_evict.set(bool(health.eviction))

    def clear_queues(self) -> None:
        for gauge in (self.waiting, self.running, self._vllm_waiting, self._vllm_running):
            gauge.clear()

    def queue(self, model: str, revision: str, *, waiting: int, running: int) -> None:
        """Show one queue. vLLM's names have no revision: they sum over a model's."""
        self.waiting.labels(model, revision).set(waiting)
        self.running.labels(model, revision).set(running)
        self._vllm_waiting.labels(model).inc(waiting)
        self._vllm_running.labels(model).inc(running)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _model(self, model: str) -> _ModelMetrics:
        metrics = self._models[model] = _ModelMetrics(
            self._first_token.labels(model),
            self._duration.labels(model),
            self._per_token.labels(model),
            self._prompt_tokens.labels(model),
            self._generation_tokens.labels(model),
            self._vllm_first_token.labels(model),
            self._vllm_duration.labels(model),
            self._vllm_prompt_tokens.labels(model),
            self._vllm_generation_tokens.labels(model),
        )
        return metrics

    def _revision(self, model: str, revision: str) -> _RevisionMetrics:
        metrics = self._revisions[model, revision] = _RevisionMetrics(
            self._revision_first_token.labels(model, revision),
            self._revision_per_token.labels(model, revision),
            {
                outcome: self._revision_requests.labels(model, revision, outcome)
                for outcome in get_args(RevisionOutcome)
            },
        )
        return metrics

"""A replica asks this of an engine.

An engine owns batching. It is driven by exactly one thread (the replica's engine thread), which calls
`load` once and then, in a loop, `add` and `abort` for what has arrived and `step` while `has_work`.
None of these is called concurrently with another, so engines hold no locks. Two methods run elsewhere:
`prepare` on the event loop, for many requests at once, and `health` on any thread. So does `own_metrics`
of those that have it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import msgspec

from tidegate.messages.work import Finish, Generate, Request, Scores, Segment, Tokens, Vectors


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Says what loading found. `notes` go to the model's status: fallbacks, unexpected weights; `seconds` of
    its parts to the replica's log."""

    weights_bytes: int
    kv_bytes_per_token: int
    slots: int
    context_length: int
    precision: str
    device: str
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


# How PyTorch, CUDA's libraries and the system say it where the type of the error does not.
_NO_MEMORY = re.compile(r"allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)


class EngineLoadError(Exception):
    """Loading or self-check failed. `reason` is CamelCase: WeightsMissing, WeightsWrong, UnsupportedModel,
    OutOfMemory, SelfCheckFailed, TokenizerMissing, TokenizerWrong, InvalidEngineArgs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class StepOutput(msgspec.Struct, frozen=True):
    """Holds what one step (or an `add` that failed at once) adds to one request. A struct, as one is made for
    each token: a frozen dataclass takes ten times as long to make.

    With `finish` the engine has forgotten the request and its slot is free. So it has where it
    `is_given_back`, for want of room: that is not its end but goes on from its log, there or elsewhere.
    """

    request_id: str
    output: Tokens
    prompt_tokens: int
    finish: Finish | None
    result: Vectors | Scores | None = None  # with the finish alone
    is_given_back: bool = False  # without a finish, and with nothing new


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that may run: its prompt is tokens, and leaves room in the context for `limit` more."""

    request: Request
    prompt: Sequence[int]  # token ids; only their number counts where an engine makes its tokens up
    limit: int
    bad_words: Sequence[Sequence[int]] = ()  # the last token of each may not come after the others
    grammar: str = ""  # llguidance's, that the answer follows: the sampling's, or one that the replica made
    begun: str = ""  # of the answer, what the prompt of a chat has already written
    # Of a task that generates nothing, in the place of `prompt`: token ids of each input, and of pairs which
    # text each is of (0, 1).
    inputs: Sequence[Sequence[int]] = ()
    types: Sequence[Sequence[int]] = ()

    @property
    def work(self) -> Generate:
        assert isinstance(self.request.work, Generate)
        return self.request.work


class Engine(Protocol):
    gives_back: bool  # what is added beyond `free_slots` and finds no room

    def load(self) -> LoadReport:
        """Load and prove the model. Slow. Raises `EngineLoadError`."""
        ...

    def free_slots(self) -> int:
        """Count the requests that `add` would take now, as far as their length can be told before: what turns
        out to have no room waits, or is given back."""
        ...

    async def prepare(self, request: Request) -> Prepared | Tokens | Finish:
        """Render and tokenize the prompt, after `load`. Depends on nothing that a step changes, never holds
        the event loop or the engine thread up, and ends within a bound of time, whatever was sent.

        Returns a `Finish` where the request itself cannot run (reason "error", code `InvalidPrompt`,
        `ContextLengthExceeded`, ...), and `Tokens` where they are the whole answer, to which no step adds.
        Never raises for a bad request.
        """
        ...

    def add(self, prepared: Prepared, log: list[Segment]) -> StepOutput | None:
        """Take a request into the batch; it starts with the next `step`.

        `log` is what earlier attempts emitted: generation continues after its last token as if never
        interrupted (sampling noise, penalties, stop buffer, partial characters). Returns a finished
        `StepOutput` where the log already completes it; None where it was taken.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request and free its slot. Unknown ids are ignored."""
        ...

    def has_work(self) -> bool: ...

    def step(self) -> list[StepOutput]:
        """Advance every running request by one iteration. Blocks for one step.

        Raises only where the engine itself is broken (then the replica hands its requests over and
        restarts); an error of one request becomes its finished output.
        """
        ...

    def health(self) -> str | None:
        """Return None, or a sentence that says what is broken. Thread-safe, instant."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class HasMetrics(Protocol):
    """An engine that keeps metrics under names of its own."""

    def own_metrics(self, labels: Mapping[str, str]) -> bytes:
        """Return them with these labels, as encoded families (`messages.engine_metrics`); empty where there
        are none now. On any thread but the event loop's: it may take seconds."""
        ...


def is_out_of_memory(error: BaseException) -> bool:
    """Tell memory that ran out, on the host or a device, from other errors. Names no type of a library, so
    that a replica without it needs no import."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    return isinstance(error, (RuntimeError, OSError)) and bool(_NO_MEMORY.search(str(error)))

"""The border between the gateway's request path and its dialects.

A dialect is one endpoint: what clients send there, what it asks of a model, and how it writes what comes
back. The request path (`generation`) knows no dialect:

    bytes ──Dialect.read──> Call ──Call.asks──> requests … segments ──Events, Call.answer──> bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import msgspec

from tidegate.gateway.bodies import RequestBody
from tidegate.gateway.constraints import Constraint
from tidegate.gateway.dialects.wire import Wire
from tidegate.messages.work import Finish, Segment, Work


@dataclass(slots=True)
class AnswerHead:
    """The call's whole answer and each of its events begin with this."""

    call_id: str
    created: int  # unix seconds
    model: str
    revision: str
    context_length: int = 0  # 0: not known
    ended: int = 0  # unix seconds, of an answer that is read again; 0: it ends now, or later


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """Token counts, the engine's own. The prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | msgspec.UnsetType = msgspec.UNSET  # known at the end

    @property
    def cached_tokens(self) -> int:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else 0


class Ask(NamedTuple):
    """The work of one sequence, and the tokens (input and output) charged for it at admission."""

    work: Work
    cost: int


class Events(Protocol):
    """Writes one streamed answer."""

    def render(self, index: int, segment: Segment) -> bytes:
        """The events of one segment of the choice `index`; may be empty."""
        ...

    def end(self, usage: Usage) -> bytes:
        """End the stream; every choice has ended."""
        ...


class Call(Protocol):
    """A body that was read and checked."""

    model: str  # empty: the only one that there is
    n: int  # neighbouring sequences that share one prompt
    is_streamed: bool
    user: str  # whom the body names; empty: nobody

    @property
    def prompt_field(self) -> str:
        """Named where a replica refuses the prompt."""
        ...

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must follow; the request path checks it, and says `follow` before `asks`."""
        ...

    def follow(self, grammar: str) -> None: ...

    @property
    def schemas(self) -> Sequence[Constraint]:
        """What else must be enforceable: the arguments of strict tools."""
        ...

    def asks(self, random_seed: int) -> list[Ask]:
        """One for each sequence, in the order of the answer's choices. Asked once: the prompts go with it."""
        ...

    def events(self, head: AnswerHead) -> Events: ...

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        """The whole answer as one JSON object. The last segment of each choice holds its finish."""
        ...


class Free:
    """A call whose answer has a form of its own."""

    __slots__ = ()
    constraint = None
    schemas: Sequence[Constraint] = ()

    def follow(self, grammar: str) -> NoReturn:
        raise AssertionError(f"no grammar was asked for: {grammar}")


class Dialect(Protocol):
    """One endpoint. `dialects.DIALECTS` lists them all."""

    path: str
    task: str  # of the models that it asks; empty: of any
    id_prefix: str  # of the ids of its calls
    may_stream: bool
    wire: Wire  # of its protocol
    # Its part of the OpenAPI document.
    operation_id: str
    summary: str
    answer_description: str

    @property
    def body(self) -> type[RequestBody]: ...

    @property
    def answer(self) -> Any:
        """A struct, or a list of one."""
        ...

    def read(self, raw: bytes) -> Call:
        """Raises `InvalidRequest`."""
        ...


def count_usage(finishes: Sequence[Finish | None], n: int) -> Usage:
    """Sum over the sequences of a call: `n` neighbouring ones share one prompt, which counts once. What one
    of them computed was not cached, though the others then found it."""
    prompts = [[finish for finish in finishes[i : i + n] if finish] for i in range(0, len(finishes), n)]
    prompt = sum(max((finish.prompt_tokens for finish in one), default=0) for one in prompts)
    cached = sum(min((finish.cached_tokens for finish in one), default=0) for one in prompts)
    completion = sum(finish.completion_tokens for finish in finishes if finish)
    return Usage(prompt, completion, prompt + completion, PromptDetails(cached))

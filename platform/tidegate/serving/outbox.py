"""The outbox carries segments from the engine to the queue.

Who runs where: everything on the event loop. `put` is called for each output of an engine step, `send` once
after them. One task writes, one batch at a time; what arrives while a batch is in flight gathers and leaves
as the next batch, so a slow Redis makes batches larger and never more numerous.

What always holds.
- At most one unsent segment per request: later output is merged into it. A segment has its number from the
  moment it is made, and a batch once sent is never changed, so repeating it after an outage is safe.
- Segments of a request leave in order, because batches do.
- What gathers is bounded: past `MOST_UNSENT_TOKENS` the outbox asks for stepping to be paused, and lets it
  go on when half of them have left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tidegate.engines.base import StepOutput
from tidegate.errors import QueueUnavailable
from tidegate.messages.codec import encode_segment
from tidegate.messages.work import Finish, Segment, Tokens, Vectors
from tidegate.serving.measure import Measure
from tidegate.serving.ports import LeaseQueue
from tidegate.tasks import end_tasks

log = logging.getLogger(__name__)

MOST_UNSENT_TOKENS = 32_768
TOKEN_BYTES = 64  # about what one takes in a segment: vectors count by it
FIRST_RETRY_SECONDS = 0.05
LONGEST_RETRY_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Held:
    """A leased request, held from its claim until its finish is written, or until it is given up."""

    id: str
    attempt: int
    seq: int  # of the next segment
    measure: Measure
    preparing: asyncio.Task[None] | None = None
    ticket: int = 0  # of the order that handed it to the engine; 0: the engine never saw it
    is_finished: bool = False  # the engine is done with it
    is_returned: bool = False  # the engine gave it back: so the queue gets it

    @property
    def is_in_engine(self) -> bool:
        """True where a failure of the engine may be its fault."""
        return bool(self.ticket) and not self.is_returned


class Outbox:
    def __init__(
        self,
        queue: LeaseQueue,
        written: Callable[[list[tuple[int, Segment]], list[str]], None],
        pause: Callable[[bool], None],
    ) -> None:
        """`written(batch, lost)` is called after each batch, `lost` being the ids whose lease is no longer
        ours; `pause` with whether the engine should stand still."""
        self._queue = queue
        self._written = written
        self._pause = pause
        self._unsent: dict[str, tuple[int, Segment]] = {}
        self._ends: dict[str, str] = {}  # of the unsent ones that finish: what their end counts as
        self._unsent_tokens = 0
        self._is_paused = False
        self._sender: asyncio.Task[None] | None = None
        self._retry_now = asyncio.Event()

    def put(self, held: Held, output: StepOutput, ends: str = "") -> None:
        """Add one output; `send` makes it leave. `ends`: what a last one counts as (`LeaseQueue.emit`)."""
        if ends:
            self._ends[held.id] = ends
        earlier = self._unsent.get(held.id)
        if earlier is None:
            seq = held.seq
            held.seq = seq + 1
            prompt_tokens = 0 if seq else output.prompt_tokens
            segment = Segment(held.id, seq, output.finish, output.output, prompt_tokens, output.result)
        else:
            segment = merged(earlier[1], output)
        self._unsent[held.id] = (held.attempt, segment)
        self._unsent_tokens += tokens_of(output)

    def send(self) -> None:
        """Start a batch unless one is in flight (it is followed by the next one)."""
        if self._sender is None:
            if self._unsent:
                self._sender = asyncio.get_running_loop().create_task(self._send_all())
        elif self._unsent_tokens > MOST_UNSENT_TOKENS and not self._is_paused:
            self._is_paused = True
            self._pause(True)

    def drop(self, request_id: str) -> None:
        """Forget what is unsent of a request that is given up. What is in flight comes back as lost."""
        if (unsent := self._unsent.pop(request_id, None)) is not None:
            self._unsent_tokens -= tokens_of(unsent[1])
        self._ends.pop(request_id, None)

    def retry_now(self) -> None:
        """Try again at once: Redis is back."""
        self._retry_now.set()

    async def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything has left; False where that takes longer than `timeout_seconds`."""
        self.send()
        if self._sender is None:
            return True
        await asyncio.wait({self._sender}, timeout=timeout_seconds)
        return self._sender is None

    async def close(self) -> None:
        """Give up what is still unsent."""
        await end_tasks(self._sender)

    async def _send_all(self) -> None:
        try:
            while self._unsent:
                batch = list(self._unsent.values())
                ends, self._ends = self._ends, {}
                self._unsent = {}
                self._unsent_tokens = 0
                # First tokens go ahead of the rest in a write of their own: someone waits for each of them,
                # and behind a full batch they would wait for all of its segments to be written and rendered.
                first = [item for item in batch if not item[1].seq]
                if first and len(first) < len(batch):
                    rest = [item for item in batch if item[1].seq]
                    first_lost, rest_lost = await asyncio.gather(
                        self._emit(first, ends), self._emit(rest, ends)
                    )
                    lost = first_lost + rest_lost
                else:
                    lost = await self._emit(batch, ends)
                self._written(batch, lost)  # which may drop what is unsent
                if self._is_paused and self._unsent_tokens <= MOST_UNSENT_TOKENS // 2:
                    self._is_paused = False
                    self._pause(False)
        finally:
            self._sender = None

    async def _emit(self, batch: list[tuple[int, Segment]], ends: Mapping[str, str]) -> list[str]:
        """Write a batch, however long Redis is away."""
        wait_seconds = FIRST_RETRY_SECONDS
        given_up: list[str] = []
        while True:
            self._retry_now.clear()
            try:
                return await self._queue.emit(batch, ends) + given_up
            except QueueUnavailable as error:
                log.warning("segments wait for Redis: %s", error.message)
            except Exception:
                # Anything else would end the replica's output for good; leases and the watchdog of others
                # decide what becomes of these requests if this does not pass.
                log.exception("segments could not be written; they are tried again")
                batch, spoiled = without_spoiled(batch)
                given_up += spoiled
                ends = {**ends, **dict.fromkeys(spoiled, "error")}
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._retry_now.wait()
            except TimeoutError:
                wait_seconds = min(LONGEST_RETRY_SECONDS, wait_seconds * 2)


def without_spoiled(batch: list[tuple[int, Segment]]) -> tuple[list[tuple[int, Segment]], list[str]]:
    """Put an error in place of each segment that can never be encoded; returns their ids beside."""
    sound, spoiled = [], []
    for attempt, segment in batch:
        try:
            encode_segment(segment)
        except Exception as error:
            spoiled.append(segment.request_id)
            finish = Finish("error", "EngineError", f"The answer cannot be sent ({type(error).__name__}).")
            segment = Segment(segment.request_id, segment.seq, finish, prompt_tokens=segment.prompt_tokens)
        sound.append((attempt, segment))
    return sound, spoiled


def tokens_of(output: StepOutput | Segment) -> int:
    """Return its size, in tokens."""
    vectors = len(output.result.values) // TOKEN_BYTES if isinstance(output.result, Vectors) else 0
    return len(output.output.token_ids) + vectors


def merged(segment: Segment, output: StepOutput) -> Segment:
    """Put the next output of the same request behind `segment`."""
    old, new = segment.output, output.output
    logprobs = old.logprobs + new.logprobs if new.logprobs else old.logprobs
    both = Tokens(
        old.token_ids + new.token_ids,
        old.text + new.text,
        logprobs,
        old.prompt_ids or new.prompt_ids,
        old.prompt_logprobs or new.prompt_logprobs,
        old.reasoning + new.reasoning,
        old.calls + new.calls if new.calls else old.calls,
        old.cached_tokens or new.cached_tokens,
    )
    return Segment(segment.request_id, segment.seq, output.finish, both, segment.prompt_tokens, output.result)

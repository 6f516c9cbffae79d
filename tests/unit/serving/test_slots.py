"""Claims, preparations, hand-overs, deliveries and aborts in any order; the engine's deliveries are late."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.integration.serving.rig import a_request
from tidegate.messages.work import Claim, Segment, Tokens
from tidegate.serving.slots import Slots, tokens_left


def test_room_is_what_was_free_less_what_the_engine_has_not_seen() -> None:
    slots = Slots(3, 3)
    slots.hand_over(1, 10)
    slots.hand_over(2, 10)
    assert slots.room() == 1
    slots.deliver(1, free=2)
    assert slots.room() == 1
    slots.deliver(2, free=1)
    assert slots.room() == 1


def test_a_request_holds_its_slot_while_it_is_prepared() -> None:
    slots = Slots(2, 2)
    slots.begin()
    slots.begin()
    assert slots.room() == 0
    slots.prepared()  # refused, or given up
    assert slots.room() == 1
    slots.prepared()
    slots.hand_over(1, 10)
    assert slots.room() == 1
    slots.deliver(1, free=1)
    assert slots.room() == 1


def test_a_request_before_its_last_token_makes_room_once() -> None:
    slots = Slots(1, 1)
    slots.hand_over(1, 3)
    slots.deliver(1, free=0)
    slots.generate(1, 1)
    assert slots.room() == 0
    slots.generate(1, 1)
    assert slots.room() == 1
    slots.end(1)
    slots.end(1)
    slots.deliver(1, free=1)
    assert slots.room() == 1


def test_requests_for_one_token_fill_the_slots_twice_and_not_without_end() -> None:
    slots = Slots(4, 4)
    ticket = 0
    while (room := slots.room()) > 0:
        for _ in range(room):
            ticket += 1
            slots.hand_over(ticket, 1)
    assert ticket == 8


@given(st.one_of(st.none(), st.integers(0, 50)), st.lists(st.integers(0, 5)))
def test_tokens_left_are_those_that_no_attempt_has_emitted(most: int | None, lengths: list[int]) -> None:
    log = [Segment("r", seq, None, Tokens([7] * length)) for seq, length in enumerate(lengths)]
    left = tokens_left(Claim(a_request(max_tokens=most), 1, log))
    assert left == (float("inf") if most is None else most - sum(lengths))


@dataclass
class Running:
    """One request as the engine has it. It may end earlier than its limit (a stop string)."""

    limit: float
    ends_at: int
    done: int = 0


@dataclass
class LateEngine:
    """An engine behind its thread: orders are carried out at its next turn, what that gave is delivered
    later. `turn` returns nothing; deliveries wait in `out`."""

    slots: int
    inbox: list[tuple[int, Running | None, int]] = field(default_factory=list)  # ticket, request, aborted
    waiting: dict[int, Running] = field(default_factory=dict)
    running: dict[int, Running] = field(default_factory=dict)
    out: deque[tuple[list[tuple[int, bool]], int, int]] = field(default_factory=deque)
    orders: int = 0

    def order(self, request: Running | None, aborted: int = 0) -> int:
        self.orders += 1
        self.inbox.append((self.orders, request, aborted))
        return self.orders

    def turn(self, may_step: bool) -> None:
        orders, self.inbox = self.inbox, []
        for ticket, request, aborted in orders:
            if request is not None:
                self.waiting[ticket] = request
            else:
                self.waiting.pop(aborted, None)
                self.running.pop(aborted, None)
        for ticket in list(self.waiting):
            if len(self.running) < self.slots:
                self.running[ticket] = self.waiting.pop(ticket)
        outputs = []
        for ticket, request in list(self.running.items()) if may_step else []:
            request.done += 1
            is_over = request.done >= min(request.limit, request.ends_at)
            outputs.append((ticket, is_over))
            if is_over:
                del self.running[ticket]
        free = self.slots - len(self.running) - len(self.waiting)
        done = self.orders  # all that was ordered has been carried out
        self.out.append((outputs, free, done))


class Replica(RuleBasedStateMachine):
    @initialize(total=st.integers(1, 5))
    def start(self, total: int) -> None:
        self.total = total
        self.slots = Slots(total, total)
        self.engine = LateEngine(total)
        self.held: dict[int, float] = {}  # the model: tokens left, as far as deliveries told
        self.preparing: list[tuple[float, int]] = []

    def hand_over(self, limit: float, ends_at: int) -> None:
        ticket = self.engine.order(Running(limit, ends_at))
        self.slots.hand_over(ticket, limit)
        self.held[ticket] = limit

    @rule(
        wanted=st.integers(1, 6),
        limit=st.one_of(st.just(float("inf")), st.integers(0, 2), st.integers(1, 9)),
        ends_at=st.integers(1, 12),
    )
    def claim(self, wanted: int, limit: float, ends_at: int) -> None:
        for _ in range(min(wanted, self.slots.room())):
            self.slots.begin()
            self.preparing.append((limit, ends_at))

    @rule(data=st.data(), is_refused=st.booleans())
    def prepared(self, data: st.DataObject, is_refused: bool) -> None:
        """A preparation is over, in any order; what is refused or given up is never handed over."""
        if self.preparing:
            one = self.preparing.pop(data.draw(st.integers(0, len(self.preparing) - 1)))
            self.slots.prepared()
            if not is_refused:
                self.hand_over(*one)

    @rule(may_step=st.booleans())
    def turn(self, may_step: bool) -> None:
        self.engine.turn(may_step)

    @rule()
    def deliver(self) -> None:
        if not self.engine.out:
            return
        outputs, free, done = self.engine.out.popleft()
        self.slots.deliver(done, free)
        for ticket, is_over in outputs:
            if ticket not in self.held:
                continue  # given up meanwhile
            if is_over:
                del self.held[ticket]
                self.slots.end(ticket)
            else:
                self.held[ticket] -= 1
                self.slots.generate(ticket, 1)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.held:
            ticket = data.draw(st.sampled_from(sorted(self.held)))
            self.engine.order(None, aborted=ticket)
            del self.held[ticket]
            self.slots.end(ticket)

    def ending(self) -> int:
        return sum(left <= 1 for left in self.held.values())

    @invariant()
    def binds_late(self) -> None:
        claimed = len(self.held) + len(self.preparing)
        assert claimed <= self.total + min(self.ending(), self.total)
        assert claimed + max(0, self.slots.room()) <= self.total + min(self.ending(), self.total)

    @invariant()
    def no_slot_is_forgotten(self) -> None:
        """Once all is carried out and delivered, room is exactly what is free and what frees next."""
        engine = self.engine
        if not engine.inbox and not engine.out:
            assert set(self.held) == set(engine.running) | set(engine.waiting)
            claimed = len(self.held) + len(self.preparing)
            assert self.slots.room() == self.total - claimed + min(self.ending(), self.total)

    def teardown(self) -> None:
        """Whatever happened, all that is held comes to its end and every slot is free again."""
        if not hasattr(self, "engine"):
            return
        while self.preparing:
            self.slots.prepared()
            self.hand_over(*self.preparing.pop())
        self.engine.turn(may_step=True)
        while self.engine.out:
            self.deliver()
            if self.held:
                self.engine.turn(may_step=True)
        assert self.slots.room() == self.total


TestReplica = Replica.TestCase
TestReplica.settings = settings(deadline=None, max_examples=100, stateful_step_count=50)


def test_what_is_there_follows_from_the_engines_room() -> None:
    slots = Slots(256, 256)
    assert slots.present(0) == 256
    slots.begin()
    assert slots.present(1) == 256
    slots.prepared()
    slots.hand_over(1, 100)
    slots.deliver(1, 9)  # it is so long that only nine more of its kind would find room
    assert slots.present(1) == 10
    slots.hand_over(2, 100)
    assert slots.present(2) == 10
    slots.deliver(2, -1)  # one of them waits for room
    assert slots.present(2) == 1

"""The hand-over against loss, repetition, reordering, crashes and restarts at every step: never two copies, never none.

Two hosts and a network that may do anything, driven by the tables of `model.handover` and nothing else. Every act is a
step of its own, so that a crash comes between any two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from migrated.model.handover import (
    NEXT,
    OWNING,
    SOURCE,
    TARGET,
    Act,
    Event,
    Hold,
    Source,
    Target,
    answer_to,
    source_step,
    target_step,
)

#: What a message of one side is to the other.
HEARD = {
    Act.SEND_COMMIT: Event.COMMIT,
    Act.SEND_WITHDRAWN: Event.WITHDRAWN,
    Act.SEND_READY: Event.READY,
    Act.SEND_ACTIVE: Event.ACTIVE,
    Act.SEND_REFUSED: Event.REFUSED,
}
MAY_RECEIVE = frozenset({Hold.NONE, Hold.PARTIAL, Hold.MOVED, Hold.PREPARED})
#: Id and epoch.
Offer = tuple[str, int]
NO_OFFER: Offer = ("", 0)
#: To whom, what, of which hand-over, and the memory that comes with it.
Message = tuple[int, Event, Offer, int]
WRITES = {
    Act.WRITE_RELEASED: Hold.RELEASED,
    Act.WRITE_MOVED: Hold.MOVED,
    Act.WRITE_OWNER: Hold.OWNER,
    Act.WRITE_PREPARED: Hold.PREPARED,
    Act.WRITE_PARTIAL: Hold.PARTIAL,
}


@dataclass
class Host:
    """A host: what is on its disk, what its workload does and holds, and what only its daemon knows."""

    hold: Hold
    offer: Offer = NO_OFFER
    """On disk: the hand-over that the record is about."""
    epoch: int = 0
    taken: set[str] = field(default_factory=set)
    running: bool = False
    memory: int = 0
    dead: bool = False
    source: Source = Source.RUNNING
    target: Target = Target.EMPTY
    current: Offer = NO_OFFER
    """The hand-over that this host is the source of."""
    present: Offer = NO_OFFER
    """The offer that it is the destination of."""
    loaded: int = -1
    todo: list[tuple[Act, Offer]] = field(default_factory=list)

    def revive(self) -> None:
        """Forget what only the daemon knew; the record says how far each side was."""
        self.todo, self.present, self.loaded = [], NO_OFFER, -1
        self.source = {Hold.RELEASED: Source.RELEASED, Hold.MOVED: Source.MOVED}.get(self.hold, Source.RUNNING)
        self.target = {Hold.PREPARED: Target.PREPARED, Hold.OWNER: Target.OWNER}.get(self.hold, Target.EMPTY)
        self.current = self.offer if self.hold is Hold.RELEASED else NO_OFFER


class TwoHosts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hosts = [Host(Hold.OWNER, running=True), Host(Hold.NONE)]
        self.network: list[Message] = []
        self.seen: list[Message] = []
        self.offers = 0
        self.acknowledged = 0
        """The last write that a client of the machine was told of."""

    # -- what happens ------------------------------------------------------------------------------------------

    @rule(data=st.data(), steps=st.integers(1, 12))
    def go_on(self, data: st.DataObject, steps: int) -> None:
        """Let a few things happen that are to happen, in any order."""
        for _ in range(steps):
            if not (possible := [step for side in (0, 1) for step in self.possible(side)]):
                return
            data.draw(st.sampled_from(possible), label="step")()
            self.never_two_copies()
            self.one_owner_at_most()
            self.what_runs_has_every_acknowledged_write()

    def possible(self, side: int) -> list[Callable[[], None]]:
        host = self.hosts[side]
        if host.dead:
            return []
        if host.todo:
            return [lambda: self.perform(side, *host.todo.pop(0))]
        mine = [message for message in self.network if message[0] == side]
        steps: list[Callable[[], None]] = [partial(self.arrive, message) for message in mine]
        if host.running and host.source is Source.RUNNING:
            steps.append(lambda: self.stop(side) if host.current != NO_OFFER else self.offer(side))
        return steps

    def arrive(self, message: Message) -> None:
        self.network.remove(message)
        self.receive(message)

    def offer(self, side: int) -> None:
        host = self.hosts[side]
        self.write(side)
        self.offers += 1
        host.current = (f"offer-{self.offers}", host.epoch + 1)
        self.network.append((1 - side, Event.OFFERED, host.current, 0))

    def stop(self, side: int) -> None:
        host = self.hosts[side]
        host.running = False
        self.to_source(host, Event.SENT)
        self.network.append((1 - side, Event.COMPLETE, host.current, host.memory))

    @rule(side=st.integers(0, 1))
    def write(self, side: int) -> None:
        host = self.hosts[side]
        if host.running and not host.dead:
            self.acknowledged += 1
            host.memory = self.acknowledged

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        self.receive(data.draw(st.sampled_from(self.network)))

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """Say again what was said at any time before."""
        self.receive(data.draw(st.sampled_from(self.seen)))

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @rule(side=st.integers(0, 1))
    def lost(self, side: int) -> None:
        host = self.hosts[side]
        if not (host.todo or host.dead):
            self.to_source(host, Event.LOST)
            self.to_target(host, Event.LOST)

    @rule(side=st.integers(0, 1))
    def crash(self, side: int) -> None:
        """The daemon ends and is started again; its workload goes on doing what it did."""
        host = self.hosts[side]
        if not host.dead:
            host.revive()
            self.to_source(host, Event.RESTARTED)
            self.to_target(host, Event.RESTARTED)

    @precondition(lambda self: self.offers > 2)
    @rule(side=st.integers(0, 1))
    def fence(self, side: int) -> None:
        """An operator switches the other host off for good, says so, and lives with what is lost."""
        host, other = self.hosts[side], self.hosts[1 - side]
        if host.dead or other.dead or host.todo:
            return
        if host.source is Source.RELEASED or (host.target is Target.PREPARED and host.loaded >= 0):
            other.dead, other.running = True, False
            self.to_source(host, Event.PEER_FENCED)
            self.to_target(host, Event.PEER_FENCED)
            while host.todo:
                self.perform(side, *host.todo.pop(0))
            assert host.hold is Hold.OWNER
            host.running = True
            self.acknowledged = host.memory

    # -- how it goes on ----------------------------------------------------------------------------------------

    def to_source(self, host: Host, event: Event) -> None:
        if event is Event.RESTARTED and host.hold not in (Hold.OWNER, Hold.RELEASED):
            return
        host.source, acts = source_step(host.source, event)
        host.todo += [(act, host.current) for act in acts]
        if host.source is Source.RUNNING and event is not Event.SENT:
            host.current = NO_OFFER

    def to_target(self, host: Host, event: Event) -> None:
        if event is Event.RESTARTED and host.hold is Hold.OWNER:
            return  # the same as to the source
        host.target, acts = target_step(host.target, event)
        host.todo += [(act, host.present) for act in acts]

    def receive(self, message: Message) -> None:
        side, event, offer, memory = message
        self.seen = [*self.seen, message][-20:]
        host = self.hosts[side]
        if host.dead or host.todo:
            return  # a connection to nobody; a daemon takes one thing after the other
        match event:
            case Event.OFFERED if host.hold in MAY_RECEIVE and offer[0] != host.present[0]:
                self.to_target(host, Event.OFFERED)
                if host.target is Target.LOADING:
                    host.present, host.loaded = (offer[0], max(offer[1], host.epoch + 1)), -1
                    host.hold = Hold.PARTIAL if host.hold is Hold.NONE else host.hold
            case Event.COMPLETE if offer[0] == host.present[0] and host.target is Target.LOADING:
                host.loaded = memory
                self.to_target(host, event)
            case Event.COMMIT:
                awaited = offer == host.present and host.target is not Target.EMPTY
                answer = answer_to(taken=offer[0] in host.taken, awaited=awaited)
                if answer is None:
                    self.to_target(host, event)
                else:
                    host.todo.append((answer, offer))
            case Event.WITHDRAWN if offer[0] == host.present[0]:
                self.to_target(host, event)
            case Event.READY | Event.ACTIVE | Event.REFUSED if offer[0] == host.current[0]:
                if event is Event.READY and host.source is Source.STOPPED:
                    host.current = offer
                self.to_source(host, event)

    def perform(self, side: int, act: Act, offer: Offer) -> None:
        host = self.hosts[side]
        if act in HEARD:
            self.network.append((1 - side, HEARD[act], offer, 0))
        elif act is Act.RUN:
            assert host.hold in OWNING, "the record says who runs"
            host.running = True
        else:
            hold = WRITES[act]
            assert hold in NEXT[host.hold] or hold is host.hold, (host.hold, hold)
            host.hold, host.offer, host.epoch = hold, offer, max(host.epoch, offer[1])
            if act is Act.WRITE_OWNER and host.target is Target.OWNER and host.loaded >= 0:
                host.memory, host.loaded = host.loaded, -1
                host.taken.add(offer[0])
                host.source, host.current = Source.RUNNING, NO_OFFER
            elif act is Act.WRITE_MOVED:
                host.target = Target.EMPTY
            elif act is Act.WRITE_PARTIAL and host.target is Target.EMPTY:
                host.present = NO_OFFER

    # -- what holds --------------------------------------------------------------------------------------------

    @invariant()
    def never_two_copies(self) -> None:
        assert not all(host.running for host in self.hosts)

    @invariant()
    def one_owner_at_most(self) -> None:
        assert [host.hold for host in self.hosts if not host.dead].count(Hold.OWNER) <= 1

    @invariant()
    def what_runs_has_every_acknowledged_write(self) -> None:
        for host in self.hosts:
            assert not host.running or host.memory == self.acknowledged

    def teardown(self) -> None:
        """Once nothing goes wrong any more, somebody runs it, and no human had to ask for it."""
        if any(host.dead for host in self.hosts):
            return
        for _ in range(200):
            for side, host in enumerate(self.hosts):
                while host.todo:
                    self.perform(side, *host.todo.pop(0))
            self.never_two_copies()
            self.what_runs_has_every_acknowledged_write()
            if self.network:
                self.receive(self.network.pop(0))
            elif self.settled:
                return
            else:
                for host in self.hosts:
                    self.to_source(host, Event.LOST)
        assert self.settled, self.hosts

    @property
    def settled(self) -> bool:
        running = [host.running for host in self.hosts].count(True)
        return running == 1 and all(not host.todo and host.hold is not Hold.RELEASED for host in self.hosts)


TestTwoHosts = pytest.mark.limit(300)(TwoHosts.TestCase)
TestTwoHosts.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("pair", SOURCE)
def test_a_source_that_let_go_starts_only_at_a_refusal_or_an_operators_word(pair: tuple[Source, Event]) -> None:
    state, event = pair
    _, acts = source_step(state, event)
    if state is Source.RELEASED:
        allowed = event in (Event.REFUSED, Event.PEER_FENCED)
        assert (Act.WRITE_OWNER in acts) is allowed
        assert Act.RUN not in acts or event is Event.REFUSED


@pytest.mark.parametrize("pair", TARGET)
def test_a_destination_starts_at_a_commit_and_says_so_afterwards(pair: tuple[Target, Event]) -> None:
    state, event = pair
    _, acts = target_step(state, event)
    if Act.RUN in acts and event is not Event.RESTARTED:
        assert event is Event.COMMIT
        assert acts == (Act.WRITE_OWNER, Act.RUN, Act.SEND_ACTIVE)


def test_what_is_in_no_table_changes_nothing() -> None:
    assert source_step(Source.MOVED, Event.READY) == (Source.MOVED, ())
    assert target_step(Target.OWNER, Event.LOST) == (Target.OWNER, ())


def test_a_commit_of_another_life() -> None:
    assert answer_to(taken=True, awaited=False) is Act.SEND_ACTIVE
    assert answer_to(taken=False, awaited=False) is Act.SEND_REFUSED
    assert answer_to(taken=False, awaited=True) is None


def test_a_source_that_comes_anew_is_never_turned_away_for_what_it_took_back() -> None:
    assert target_step(Target.PREPARED, Event.OFFERED) == (Target.LOADING, (Act.WRITE_PARTIAL,))

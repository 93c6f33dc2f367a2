"""Who may run the machine: what a host's record may say, and the steps by which a machine changes hosts.

The rule of the file: tables, and nothing that waits, writes or sends. Whoever drives them does what they say in the
order they say it: a record is on the disk before the message or the start that stands behind it.

    source                                          destination
    ------                                          -----------
    offer (migration id, epoch)  ------------->     loads
    stops, sends the rest        ------------->     everything here: record "prepared"
                                 <-------------     ready
    record "released"
    commit                       ------------->     record "owner", runs
    record "moved"               <-------------     active

At most one side runs: the source runs until it has written "released", and never again by itself, unless the
destination says "refused": then it never ran that offer, and never will. An offer is made once; its id says which
commit belongs to it, so that one that comes twice, late or from another life changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Hold(StrEnum):
    """What a host's record says about the machine."""

    NONE = "none"
    PARTIAL = "partial"
    PREPARED = "prepared"
    INCOMPLETE = "incomplete"
    OWNER = "owner"
    RELEASED = "released"
    MOVED = "moved"
    ACCEPTED = "accepted"


#: Which record may follow which.
NEXT: Mapping[Hold, frozenset[Hold]] = {
    Hold.NONE: frozenset({Hold.OWNER, Hold.PARTIAL}),
    Hold.PARTIAL: frozenset({Hold.OWNER, Hold.INCOMPLETE, Hold.ACCEPTED, Hold.NONE, Hold.PARTIAL, Hold.PREPARED}),
    Hold.PREPARED: frozenset({Hold.OWNER, Hold.INCOMPLETE, Hold.PARTIAL}),
    Hold.INCOMPLETE: frozenset({Hold.OWNER, Hold.NONE}),
    Hold.OWNER: frozenset({Hold.RELEASED, Hold.MOVED, Hold.PARTIAL}),
    Hold.RELEASED: frozenset({Hold.MOVED, Hold.OWNER}),
    Hold.MOVED: frozenset({Hold.OWNER, Hold.INCOMPLETE, Hold.ACCEPTED, Hold.PREPARED}),
    Hold.ACCEPTED: frozenset({Hold.OWNER, Hold.MOVED}),
}

#: The machine is here.
OWNING = frozenset({Hold.OWNER, Hold.INCOMPLETE})


class Event(StrEnum):
    """What happens to one side; answers and commits are those of this hand-over, by its id."""

    # to the source
    SENT = "the machine stands still, and everything is sent"
    READY = "ready"
    ACTIVE = "active"
    REFUSED = "refused"
    # to the destination
    OFFERED = "offered"
    COMPLETE = "everything is here"
    COMMIT = "commit"
    WITHDRAWN = "the source keeps it, and says so"
    # to either
    LOST = "the connection, or the patience, is at its end"
    RESTARTED = "the daemon was started again"
    PEER_FENCED = "an operator: the other host does not run it, and never will"
    PEER_RUNS = "an operator: the other host runs it"


class Act(StrEnum):
    """What a side does about it."""

    WRITE_RELEASED = "write released"
    WRITE_MOVED = "write moved"
    WRITE_OWNER = "write owner"
    WRITE_PREPARED = "write prepared"
    WRITE_PARTIAL = "write partial"
    SEND_COMMIT = "send commit"
    SEND_WITHDRAWN = "send withdrawn"
    SEND_READY = "send ready"
    SEND_ACTIVE = "send active"
    SEND_REFUSED = "send refused"
    RUN = "run"


class Source(StrEnum):
    """How far the source is."""

    RUNNING = "running"
    STOPPED = "stopped"
    RELEASED = "released"
    MOVED = "moved"


class Target(StrEnum):
    """How far the destination is."""

    EMPTY = "empty"
    LOADING = "loading"
    PREPARED = "prepared"
    OWNER = "owner"


_E, _A, _S, _T = Event, Act, Source, Target

#: What is not in a table changes nothing.
SOURCE: Mapping[tuple[Source, Event], tuple[Source, tuple[Act, ...]]] = {
    (_S.RUNNING, _E.SENT): (_S.STOPPED, ()),
    (_S.RUNNING, _E.RESTARTED): (_S.RUNNING, (_A.RUN,)),
    (_S.STOPPED, _E.READY): (_S.RELEASED, (_A.WRITE_RELEASED, _A.SEND_COMMIT)),
    (_S.STOPPED, _E.REFUSED): (_S.RUNNING, (_A.RUN,)),
    # So that the destination does not wait for nothing; if the word gets lost, the next offer says so.
    (_S.STOPPED, _E.LOST): (_S.RUNNING, (_A.RUN, _A.SEND_WITHDRAWN)),
    (_S.STOPPED, _E.RESTARTED): (_S.RUNNING, (_A.RUN,)),
    (_S.RELEASED, _E.ACTIVE): (_S.MOVED, (_A.WRITE_MOVED,)),
    (_S.RELEASED, _E.REFUSED): (_S.RUNNING, (_A.WRITE_OWNER, _A.RUN)),
    # On another connection, as often as it takes.
    (_S.RELEASED, _E.LOST): (_S.RELEASED, (_A.SEND_COMMIT,)),
    (_S.RELEASED, _E.RESTARTED): (_S.RELEASED, (_A.SEND_COMMIT,)),
    # Not for this answer any more: by the same word it asks whether all memory has arrived.
    (_S.MOVED, _E.LOST): (_S.MOVED, (_A.SEND_COMMIT,)),
    # An operator starts it himself.
    (_S.RELEASED, _E.PEER_FENCED): (_S.RUNNING, (_A.WRITE_OWNER,)),
    (_S.RELEASED, _E.PEER_RUNS): (_S.MOVED, (_A.WRITE_MOVED,)),
}

TARGET: Mapping[tuple[Target, Event], tuple[Target, tuple[Act, ...]]] = {
    (_T.EMPTY, _E.OFFERED): (_T.LOADING, ()),
    (_T.EMPTY, _E.COMMIT): (_T.EMPTY, (_A.SEND_REFUSED,)),
    (_T.LOADING, _E.COMPLETE): (_T.PREPARED, (_A.WRITE_PREPARED, _A.SEND_READY)),
    (_T.LOADING, _E.LOST): (_T.EMPTY, ()),
    (_T.LOADING, _E.WITHDRAWN): (_T.EMPTY, ()),
    (_T.LOADING, _E.RESTARTED): (_T.EMPTY, ()),
    # Nobody was told that it is ready: what says so does not come from the source.
    (_T.LOADING, _E.COMMIT): (_T.EMPTY, (_A.SEND_REFUSED,)),
    (_T.PREPARED, _E.COMMIT): (_T.OWNER, (_A.WRITE_OWNER, _A.RUN, _A.SEND_ACTIVE)),
    # It holds what it has: the source may have let go, and be on its way with another connection.
    (_T.PREPARED, _E.LOST): (_T.PREPARED, ()),
    # The source would not come with another offer if it had let go of this one.
    (_T.PREPARED, _E.OFFERED): (_T.LOADING, (_A.WRITE_PARTIAL,)),
    (_T.PREPARED, _E.WITHDRAWN): (_T.EMPTY, (_A.WRITE_PARTIAL,)),
    # What was loaded went with the process; it was never started, and the source still has all of it.
    (_T.PREPARED, _E.RESTARTED): (_T.EMPTY, (_A.WRITE_PARTIAL,)),
    (_T.PREPARED, _E.PEER_FENCED): (_T.OWNER, (_A.WRITE_OWNER,)),
    (_T.PREPARED, _E.PEER_RUNS): (_T.EMPTY, (_A.WRITE_PARTIAL,)),
    (_T.OWNER, _E.COMMIT): (_T.OWNER, (_A.SEND_ACTIVE,)),
    (_T.OWNER, _E.RESTARTED): (_T.OWNER, (_A.RUN,)),
}


def source_step(state: Source, event: Event) -> tuple[Source, tuple[Act, ...]]:
    """Return where the source is behind ``event``, and what it has to do, in this order."""
    return SOURCE.get((state, event), (state, ()))


def target_step(state: Target, event: Event) -> tuple[Target, tuple[Act, ...]]:
    """Return where the destination is behind ``event``, and what it has to do, in this order."""
    return TARGET.get((state, event), (state, ()))


def answer_to(*, taken: bool, awaited: bool) -> Act | None:
    """Return what a commit is answered with, or None where the table says: it is the one that is waited for.

    ``taken``: its migration was taken over here, whenever that was; ``awaited``: it is about the offer that is here, by
    id and by epoch. No epoch is ever given twice, so a stream that is replayed from its beginning finds no commit.
    """
    if taken:
        return Act.SEND_ACTIVE
    return None if awaited else Act.SEND_REFUSED

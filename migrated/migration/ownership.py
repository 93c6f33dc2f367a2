"""Who may run the machine: the one rule, as a record that survives the daemon.

The rule of the file: the record is written before the act it allows. A destination may start once it has read the last
byte it needs, so the source writes ``released`` before that byte; with an answer it becomes ``moved``, or ``owner``
again when the destination says that it did not start. Without an answer it stays ``released``: nobody may guess.

    record      | may run here | how it ends
    ------------+--------------+---------------------------------------------------------------
    none        | once asked   | `cont` makes it owner; the first section of an arriving machine makes it partial
    partial     | no           | a whole machine: owner; one whose memory follows: incomplete; let go: none;
                |              | another attempt: partial
    incomplete  | it does      | postcopy: its memory still comes from the source; all has arrived: owner
    owner       | yes          | the last byte goes out: released; an arrived machine that cannot start goes back:
                |              | moved; a snapshot overwrites it: partial
    released    | no           | answer: moved or owner; no answer: an operator's `resolve`
    moved       | no           | the machine comes back: owner
    accepted    | no           | a QEMU source was told SHUT 0; its orderly close: owner; else `resolve`

The epoch only grows, by one with each change of owner. The run state beside it is an owner's: a machine that an
operator stopped stays stopped when the daemon restarts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from migrated.errors import CommandError, ConfigError
from migrated.model.runstate import RESTING, RunState
from migrated.savevm.ports import RecordStore


class Hold(StrEnum):
    """What this host's record says about the machine."""

    NONE = "none"
    PARTIAL = "partial"
    INCOMPLETE = "incomplete"
    OWNER = "owner"
    RELEASED = "released"
    MOVED = "moved"
    ACCEPTED = "accepted"


#: Which record may follow which; the one place that knows.
NEXT: Mapping[Hold, frozenset[Hold]] = {
    Hold.NONE: frozenset({Hold.OWNER, Hold.PARTIAL}),
    Hold.PARTIAL: frozenset({Hold.OWNER, Hold.INCOMPLETE, Hold.ACCEPTED, Hold.NONE, Hold.PARTIAL}),
    Hold.INCOMPLETE: frozenset({Hold.OWNER, Hold.NONE}),
    Hold.OWNER: frozenset({Hold.RELEASED, Hold.MOVED, Hold.PARTIAL}),
    Hold.RELEASED: frozenset({Hold.MOVED, Hold.OWNER}),
    Hold.MOVED: frozenset({Hold.OWNER, Hold.INCOMPLETE, Hold.ACCEPTED}),
    Hold.ACCEPTED: frozenset({Hold.OWNER, Hold.MOVED}),
}

#: The machine is here.
OWNING = frozenset({Hold.OWNER, Hold.INCOMPLETE})

#: (what is known, what to do next)
ADVICE: Mapping[Hold, tuple[str, str]] = {
    Hold.NONE: ("no machine has run here yet", "wait for a migration, or `cont` to start the machine on this host"),
    Hold.PARTIAL: (
        "an arriving machine was loaded only in part",
        (
            "migrate it again; or, to begin afresh, end the workload here, let go of its memory (`migratectl release`)"
            " and start it anew"
        ),
    ),
    Hold.INCOMPLETE: (
        "the machine is this host's, and a part of its memory is still at {peer}",
        (
            "let the migration come to its end (`migratectl status` says whether it waits for something). Where this"
            " daemon was started anew in the middle, the machine stands still for good: end the workload, then"
            " `migratectl release`"
        ),
    ),
    Hold.OWNER: ("this host owns the machine", "nothing"),
    Hold.RELEASED: (
        "the outcome is unknown: the last byte went to {peer} and no answer came back; the machine may run there",
        (
            "ask the other host (`migratectl status` there); then `migratectl resolve --peer-is-running`, or, only when"
            " it does not run there and never will, `migratectl resolve --peer-is-fenced`"
        ),
    ),
    Hold.MOVED: ("the machine runs at {peer}", "migrate it back from there; its memory here is out of date"),
    Hold.ACCEPTED: (
        "the outcome is unknown: the machine is here complete, but {peer} did not confirm that it let go",
        "ask the source; then `migratectl resolve --peer-is-fenced` to run it here, or `--peer-is-running`",
    ),
}

#: The same of a machine that moved to where nobody runs it by itself, by the scheme of the peer's address.
STORED: Mapping[str, tuple[str, str]] = {
    "file": (
        "the machine was saved to {peer}",
        "load it where it is to run, and only once: `migratectl incoming` there; its memory here is out of date",
    ),
    "exec": (
        "the machine was handed to {peer}",
        "load what the command made of it where it is to run, and only once; its memory here is out of date",
    ),
    "fd": (
        "the machine was written to {peer}",
        "look for it where that descriptor led; its memory here is out of date",
    ),
}

#: The same of a machine that came in part, and not from another host.
STORED_IN_PART: Mapping[str, tuple[str, str]] = {
    "snapshot": (
        "{peer} was loaded only in part, over the machine that was here",
        (
            "load it, or another snapshot, again (`migratectl snapshot load`); or, to begin afresh, end the workload"
            " here, let go of its memory (`migratectl release`) and start it anew"
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Record:
    """What is on disk."""

    hold: Hold = Hold.NONE
    epoch: int = 0
    peer: str = ""
    migration_id: str = ""
    run_state: RunState = RunState.RUNNING
    """What an owner's machine does: it runs, or rests for a reason of its own (``paused``, ``shutdown``, ...)."""


class Ownership:
    """The machine's record on this host, and the questions it answers."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self.record = _parse(store.read())

    @property
    def may_run(self) -> bool:
        """True when this host's record says that it owns the machine."""
        return self.record.hold in OWNING

    @property
    def outcome_unknown(self) -> bool:
        return self.record.hold in (Hold.RELEASED, Hold.ACCEPTED)

    async def become(
        self, hold: Hold, *, peer: str = "", migration_id: str = "", run_state: RunState | None = None
    ) -> None:
        """Write a new record and return when it would survive a crash. Raises OSError when it cannot be written.

        ``run_state`` is what an owner's machine does from now on; without it, it does what it did.
        """
        now = self.record
        if hold is now.hold and hold in OWNING:
            if run_state not in (None, now.run_state):
                await self._write(replace(now, run_state=run_state))
            return
        if hold not in NEXT[now.hold]:
            raise CommandError(f"the record says {now.hold.value}, it cannot become {hold.value}: {self.text()}")
        new = replace(now, hold=hold, peer=peer, migration_id=migration_id, run_state=run_state or now.run_state)
        if hold in OWNING and now.hold not in (Hold.RELEASED, Hold.INCOMPLETE):
            new = replace(new, epoch=now.epoch + 1)
        if hold is Hold.MOVED:
            # A fact that is known stays known in this process even if it cannot be written; on disk `released` stays.
            self.record = new
        await self._write(new)

    async def _write(self, new: Record) -> None:
        try:
            await self._store.write(asdict(new) | {"hold": new.hold.value, "run_state": new.run_state.value})
        except asyncio.CancelledError:
            self.record = new  # a cancelled write has been made all the same (`RecordStore`)
            raise
        self.record = new

    def require_may_start(self) -> None:
        """Raise CommandError, with the reason and the next step, where `cont` may not start the machine."""
        if self.record.hold not in (Hold.NONE, Hold.OWNER):
            raise CommandError(f"{self.text()}. Next: {self.next_step()}", error_id="not-owner")

    def require_may_receive(self) -> None:
        """Raise CommandError where an arriving machine would be a second owner's."""
        if self.record.hold in OWNING or self.outcome_unknown:
            raise CommandError(f"this host cannot take a machine in: {self.text()}", error_id="machine-here")

    def text(self) -> str:
        """Say in one sentence what is known."""
        return self._advice[0].format(peer=self.record.peer or "the other host")

    def next_step(self) -> str:
        """Say what an operator may do."""
        return self._advice[1]

    @property
    def _advice(self) -> tuple[str, str]:
        advice = ADVICE[self.record.hold]
        scheme, colon, _ = self.record.peer.partition(":")
        stored = {Hold.MOVED: STORED, Hold.PARTIAL: STORED_IN_PART}.get(self.record.hold, {})
        return stored.get(scheme, advice) if colon else advice

    def as_dict(self) -> dict[str, object]:
        """Return the answer to ``x-migrated-query-ownership``."""
        return {
            "record": self.record.hold.value,
            "epoch": self.record.epoch,
            "peer": self.record.peer,
            "migration-id": self.record.migration_id,
            "text": self.text(),
            "next-step": self.next_step(),
        }


def _parse(raw: Mapping[str, Any] | None) -> Record:
    if raw is None:
        return Record()
    try:
        run_state = RunState(raw.get("run_state", RunState.RUNNING))
        if run_state not in RESTING | {RunState.RUNNING}:
            raise ValueError(f"'{run_state}' is not what an owner's machine does")
        peer, migration_id = str(raw.get("peer", "")), str(raw.get("migration_id", ""))
        return Record(Hold(raw["hold"]), int(raw["epoch"]), peer, migration_id, run_state)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            "ownership record", "hold", f"cannot be understood ({error}); move it away only if you know who runs it"
        ) from error

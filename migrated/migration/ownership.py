"""Who may run the machine: the one rule, as a record that survives the daemon.

The rule of the file: the record is written before the act it allows. Which record may follow which, and by which steps
a machine changes hosts, is in `model.handover`; here is what is kept, and what an operator is told.

    record      | may run here | how it ends
    ------------+--------------+---------------------------------------------------------------
    none        | once asked   | `cont` makes it owner; the first section of an arriving machine makes it partial
    partial     | no           | everything is here: prepared; let go: none; another attempt: partial
    prepared    | no           | the source's commit makes it owner, or, by postcopy, incomplete; the source keeps the
                |              | machine, or this daemon is started again: partial
    incomplete  | it does      | postcopy: its memory still comes from the source; all has arrived: owner
    owner       | yes          | the machine is handed over: released; an arrived machine that cannot start goes back:
                |              | moved; a snapshot overwrites it: partial
    released    | no           | answer: moved or owner; until there is one it is asked for, on any connection; or an
                |              | operator's `resolve`
    moved       | no           | the machine comes back: owner
    accepted    | no           | a QEMU source was told SHUT 0; its orderly close: owner; else `resolve`

The epoch only grows, by one with each hand-over, and is the same at both ends of one. The run state beside it is an
owner's: a machine that an operator stopped stays stopped when the daemon restarts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from migrated.errors import CommandError, ConfigError
from migrated.model.handover import NEXT, OWNING, Hold
from migrated.model.runstate import RESTING, RunState
from migrated.savevm.ports import RecordStore

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
    Hold.PREPARED: (
        "everything of the machine is here, and {peer} has not said that it lets go of it",
        (
            "nothing: the source says so, or keeps it, as soon as it can be reached. Only when that host is lost for"
            " good: `migratectl resolve --peer-is-fenced` runs the machine here"
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

#: The same of a machine whose new host is asked for its answer until it gives one.
ASKED: tuple[str, str] = (
    "the outcome is unknown: the machine was handed to {peer}, and the answer is missing; it may run there",
    (
        "nothing, where that host can be reached again: this one keeps asking, and then knows. Only when that host is"
        " lost for good: `migratectl resolve --peer-is-fenced` takes the machine back as it was handed over, without"
        " what it may have done there since"
    ),
)

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
        "{peer} was loaded only in part",
        (
            "load it, or another snapshot, again (`migratectl snapshot load`); or, to begin afresh, end the workload"
            " here, let go of its memory (`migratectl release`) and start it anew"
        ),
    ),
}


#: A commit that is said again comes soon, or not at all.
TAKEN_MAX = 16
_OF_ONE_EPOCH = frozenset({Hold.PREPARED, Hold.INCOMPLETE, Hold.RELEASED})


@dataclass(frozen=True, slots=True)
class Record:
    """What is on disk."""

    hold: Hold = Hold.NONE
    epoch: int = 0
    peer: str = ""
    migration_id: str = ""
    address: str = ""
    """Where the peer of a hand-over is asked for its answer, as it was dialled."""
    taken: tuple[str, ...] = ()
    """Migrations that made this host the owner, the last ones."""
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
        self,
        hold: Hold,
        *,
        peer: str = "",
        migration_id: str = "",
        run_state: RunState | None = None,
        epoch: int | None = None,
        address: str = "",
    ) -> None:
        """Write a new record and return when it would survive a crash. Raises OSError when it cannot be written.

        ``run_state`` is what an owner's machine does from now on; without it, it does what it did. ``epoch`` is that
        of a hand-over; without it, an owner that was none begins a new one.
        """
        now = self.record
        if hold is now.hold and hold in OWNING:
            if run_state not in (None, now.run_state):
                await self._write(replace(now, run_state=run_state))
            return
        if hold not in NEXT[now.hold]:
            raise CommandError(f"the record says {now.hold.value}, it cannot become {hold.value}: {self.text()}")
        if epoch is None:
            epoch = now.epoch + (hold in OWNING and now.hold not in _OF_ONE_EPOCH)
        new = Record(hold, epoch, peer, migration_id, address, now.taken, run_state or now.run_state)
        if hold in OWNING and migration_id and now.hold is not Hold.RELEASED and migration_id not in now.taken:
            new = replace(new, taken=(*now.taken, migration_id)[-TAKEN_MAX:])
        if now.hold is Hold.OWNER and hold is Hold.MOVED:
            new = replace(new, taken=tuple(one for one in now.taken if one != migration_id))  # given back
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
        if self.record.hold is Hold.RELEASED and self.record.address:
            return ASKED
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
        taken = tuple(str(one) for one in raw.get("taken", ()))
        address = str(raw.get("address", ""))
        return Record(Hold(raw["hold"]), int(raw["epoch"]), peer, migration_id, address, taken, run_state)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            "ownership record", "hold", f"cannot be understood ({error}); move it away only if you know who runs it"
        ) from error

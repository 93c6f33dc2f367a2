"""MigrationStatus, and the only place that says which status may follow which.

The rule of the file: two tables (one per role) and one compare-and-swap. Names and moves are QEMU's: 7.2's, and those
of later versions that use the same names (postcopy-device, postcopy-recover-setup, device without a pause).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import StrEnum

from migrated.errors import LocalProtocolError


class MigrationStatus(StrEnum):
    """Status of a migration, spelt as QEMU spells it."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


_S = MigrationStatus
Table = Mapping[MigrationStatus, frozenset[MigrationStatus]]

#: Ended; the next migration starts from here as from none.
ENDED = frozenset({_S.CANCELLED, _S.COMPLETED, _S.FAILED})
#: Neither ended nor not begun: a second migrate is refused.
RUNNING = frozenset(MigrationStatus) - ENDED - {_S.NONE}

#: The machine runs at the destination, or is about to, and its memory is at the source: nothing is cancelled any more.
POSTCOPY = frozenset(
    {
        _S.POSTCOPY_DEVICE,
        _S.POSTCOPY_ACTIVE,
        _S.POSTCOPY_PAUSED,
        _S.POSTCOPY_RECOVER_SETUP,
        _S.POSTCOPY_RECOVER,
    }
)
#: Statuses in which ``migrate-pause`` has something to pause.
PAUSABLE = frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_RECOVER})


def is_running(status: MigrationStatus) -> bool:
    """Say whether a migration in this status refuses a second one."""
    return status in RUNNING


def _table(moves: Mapping[MigrationStatus, set[MigrationStatus]], start: set[MigrationStatus]) -> Table:
    ends = {status: frozenset({_S.NONE} | start) for status in ENDED}
    return {_S.NONE: frozenset(start), **ends, **{status: frozenset(to) for status, to in moves.items()}}


_STOP = {_S.FAILED, _S.CANCELLING}

OUTGOING: Table = _table(
    {
        # completed straight from setup: snapshots
        _S.SETUP: {_S.ACTIVE, _S.WAIT_UNPLUG, _S.COMPLETED} | _STOP,
        _S.WAIT_UNPLUG: {_S.ACTIVE} | _STOP,
        _S.ACTIVE: {_S.PRE_SWITCHOVER, _S.DEVICE, _S.POSTCOPY_ACTIVE, _S.COMPLETED, _S.COLO} | _STOP,
        _S.PRE_SWITCHOVER: {_S.DEVICE, _S.POSTCOPY_ACTIVE} | _STOP,
        _S.DEVICE: {_S.POSTCOPY_DEVICE, _S.POSTCOPY_ACTIVE, _S.COMPLETED, _S.COLO} | _STOP,
        _S.POSTCOPY_DEVICE: {_S.POSTCOPY_ACTIVE} | _STOP,
        _S.POSTCOPY_ACTIVE: {_S.POSTCOPY_PAUSED, _S.COMPLETED} | _STOP,
        _S.POSTCOPY_PAUSED: {_S.POSTCOPY_RECOVER_SETUP, _S.POSTCOPY_RECOVER} | _STOP,
        _S.POSTCOPY_RECOVER_SETUP: {_S.POSTCOPY_RECOVER, _S.POSTCOPY_PAUSED} | _STOP,
        _S.POSTCOPY_RECOVER: {_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED} | _STOP,
        _S.COLO: {_S.COMPLETED} | _STOP,
        # failed: ours, for an outcome that became unknown while cancelling
        _S.CANCELLING: {_S.CANCELLED, _S.FAILED},
    },
    start={_S.SETUP},
)

INCOMING: Table = _table(
    {
        _S.SETUP: {_S.ACTIVE, _S.FAILED},
        # none: ours, for a source that only asked whether it could come
        _S.ACTIVE: {_S.POSTCOPY_DEVICE, _S.POSTCOPY_ACTIVE, _S.COMPLETED, _S.COLO, _S.FAILED, _S.NONE},
        _S.POSTCOPY_DEVICE: {_S.POSTCOPY_ACTIVE, _S.FAILED},
        _S.POSTCOPY_ACTIVE: {_S.POSTCOPY_PAUSED, _S.COMPLETED, _S.FAILED},
        _S.POSTCOPY_PAUSED: {_S.POSTCOPY_RECOVER_SETUP, _S.POSTCOPY_RECOVER, _S.FAILED},
        _S.POSTCOPY_RECOVER_SETUP: {_S.POSTCOPY_RECOVER, _S.POSTCOPY_PAUSED, _S.FAILED},
        _S.POSTCOPY_RECOVER: {_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.FAILED},
        _S.COLO: {_S.COMPLETED, _S.FAILED},
    },
    # 7.2 goes from none to active at the connection, later versions through setup while they listen.
    start={_S.SETUP, _S.ACTIVE},
)

#: Statuses that swallow whatever a job still wants to say: somebody ended the migration first.
_ABSORBING = ENDED | {_S.CANCELLING}


class StatusCell:
    """One migration's status; ``on_change`` is called with every new one."""

    def __init__(self, table: Table, on_change: Callable[[MigrationStatus], None]) -> None:
        self._table = table
        self._on_change = on_change
        self._value = MigrationStatus.NONE

    @property
    def value(self) -> MigrationStatus:
        return self._value

    def advance(self, to: MigrationStatus, *, expected: Collection[MigrationStatus] | None = None) -> bool:
        """Swap to ``to`` and return True, or return False because somebody else moved first.

        False: the present status is not in ``expected``, is ``to`` already, or has ended or is cancelling and ``to``
        does not follow from it. Any other move the table does not have raises LocalProtocolError.
        """
        if self._value is to or (expected is not None and self._value not in expected):
            return False
        if to not in self._table.get(self._value, frozenset()):
            if self._value in _ABSORBING:
                return False
            raise LocalProtocolError(f"invalid migration status transition: '{self._value}' -> '{to}'")
        self._value = to
        self._on_change(to)
        return True

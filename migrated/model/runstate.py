"""Run states of a machine and the moves between them.

The rule of the file: a table. Names are QEMU 7.2's (they travel in ``globalstate`` and show in ``query-status``); the
moves are QEMU's plus those of a daemon that outlives its machine (marked).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from migrated.errors import LocalProtocolError


class RunState(StrEnum):
    """What the machine is doing, spelt as QEMU spells it."""

    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    COLO = "colo"


_R = RunState

#: Stopped states a machine may be in for a reason of its own. They travel in ``globalstate``, so a machine may arrive
#: in each of them, be migrated from it, and come back to it when that migration fails.
RESTING = frozenset(
    {
        _R.DEBUG, _R.INTERNAL_ERROR, _R.IO_ERROR, _R.PAUSED, _R.POSTMIGRATE, _R.PRELAUNCH, _R.SHUTDOWN, _R.SUSPENDED,
        _R.WATCHDOG, _R.GUEST_PANICKED,
    }
)  # fmt: skip

#: What every resting machine may do next: run, be migrated, be saved or reverted to a snapshot, be reset, be paused,
#: and (ours: the daemon outlives its machine) make room for one that arrives.
_FROM_REST = frozenset(
    {_R.RUNNING, _R.FINISH_MIGRATE, _R.SAVE_VM, _R.RESTORE_VM, _R.PRELAUNCH, _R.PAUSED, _R.INMIGRATE}
)

TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    **dict.fromkeys(RESTING, _FROM_REST),
    _R.PAUSED: _FROM_REST | {_R.POSTMIGRATE, _R.COLO},
    _R.RUNNING: RESTING - {_R.POSTMIGRATE, _R.PRELAUNCH} | {_R.FINISH_MIGRATE, _R.SAVE_VM, _R.RESTORE_VM, _R.COLO},
    # Ours: a migration that did not arrive leaves an empty machine (prelaunch) or one that waits on (no move at all).
    # A snapshot may be loaded where no machine is yet.
    _R.INMIGRATE: RESTING | {_R.RUNNING, _R.FINISH_MIGRATE, _R.RESTORE_VM, _R.COLO},
    _R.FINISH_MIGRATE: RESTING | {_R.RUNNING, _R.COLO},
    _R.SAVE_VM: RESTING | {_R.RUNNING},
    # Ours: a snapshot that was loaded only in part leaves an empty machine that waits.
    _R.RESTORE_VM: RESTING | {_R.RUNNING, _R.INMIGRATE},
    _R.COLO: frozenset({_R.RUNNING, _R.PRELAUNCH, _R.SHUTDOWN}),
}


def check_transition(current: RunState, to: RunState) -> None:
    """Raise LocalProtocolError unless the machine may go from ``current`` to ``to``; staying is always allowed."""
    if current is not to and to not in TRANSITIONS[current]:
        raise LocalProtocolError(f"invalid runstate transition: '{current}' -> '{to}'")

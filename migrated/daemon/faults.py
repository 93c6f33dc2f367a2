"""Faults at named points, for tests: a daemon that kills itself, stops itself, waits, or cannot write its record.

The rule of the file: a daemon does none of this unless the one who starts it *and* the one who may write to its state
directory both say so with the same key, in MIGRATED_FAULT_KEY and in the file ``faults/key`` there. Where only one of
them does, the daemon does not start. What is to go wrong is a file of the point's name in that directory; it takes
effect once, and the file goes away:

    kill           the daemon kills itself
    stop           it stops itself, as SIGSTOP does
    fail ENOSPC    the record cannot be written, by that errno; only before a record
    hold           it waits until ``POINT.held``, which it makes, is removed; not before a record: a write ends first
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from migrated.errors import ConfigError
from migrated.migration.faultpoint import POINTS, FaultPoint, before_record, no_fault
from migrated.model.handover import Hold
from migrated.savevm.ports import RecordStore

KEY_VARIABLE = "MIGRATED_FAULT_KEY"
DIRECTORY = "faults"
KEY_FILE = "key"
HELD = ".held"
POLL_S = 0.005


class Faults:
    """What is to go wrong in one daemon."""

    def __init__(self, directory: Path, log: FilteringBoundLogger) -> None:
        self._directory = directory
        self._log = log

    async def reach(self, point: str) -> None:
        """Do what is asked for at this point. Raises OSError for ``fail``; ValueError for an unknown name."""
        if point not in POINTS:
            raise ValueError(f"there is no fault point {point!r}")
        action = self._take(point)
        if not action:
            return
        self._log.warning("fault", point=point, action=action)
        match action.split():
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["stop"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["fail", name] if name in errno.errorcode.values():
                number = getattr(errno, name)
                raise OSError(number, f"{os.strerror(number)} (asked for by a test)")
            case ["hold"]:
                while self._is_held(point):  # noqa: ASYNC110  (only the file system knows)
                    await asyncio.sleep(POLL_S)
            case _:
                raise ValueError(f"fault point {point}: no such action: {action!r}")

    def _take(self, point: str) -> str:
        path = self._directory / point
        try:
            action = path.read_text().strip()
        except FileNotFoundError:
            return ""
        if action == "hold":
            path.rename(path.with_name(point + HELD))
        else:
            path.unlink()
        return action

    def _is_held(self, point: str) -> bool:
        return (self._directory / (point + HELD)).exists()


class FaultyStore:
    """A record store with a point before each write."""

    def __init__(self, store: RecordStore, reach: FaultPoint) -> None:
        self._store = store
        self._reach = reach

    def read(self) -> dict[str, Any] | None:
        """Return the record."""
        return self._store.read()

    async def write(self, record: dict[str, Any]) -> None:
        """Replace the record, unless that is to fail."""
        await self._reach(before_record(Hold(record["hold"])))
        await self._store.write(record)


def fault_point(state: Path, log: FilteringBoundLogger, environment: Mapping[str, str] = os.environ) -> FaultPoint:
    """Return what a daemon does at its fault points: nothing, but in a test. Raises ConfigError for half a wish."""
    directory = state / DIRECTORY
    said = environment.get(KEY_VARIABLE)
    if said is None and not directory.exists():
        return no_fault
    if said is None:
        raise ConfigError(
            str(directory),
            "",
            f"faults are asked for, and {KEY_VARIABLE} is not set. This directory is for tests of migrated only."
            " Next: remove it",
        )
    try:
        key = (directory / KEY_FILE).read_text().strip()
    except OSError as error:
        raise ConfigError(
            KEY_VARIABLE, "", f"it is for tests of migrated only, and {directory / KEY_FILE} cannot be read: {error}"
        ) from error
    if not key or not hmac.compare_digest(key.encode(), said.encode()):
        raise ConfigError(
            KEY_VARIABLE, "", f"it is for tests of migrated only, and not what {directory / KEY_FILE} says"
        )
    log.warning("faults_on", directory=str(directory), text="this daemon does what a test says: never use it otherwise")
    return Faults(directory, log).reach

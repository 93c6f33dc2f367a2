"""What `migratectl` answers to the shell.

The rule of the file: the number says who owns the machine, so that a script need not read anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """The promise of the interface."""

    DONE = 0
    USAGE = 2
    REFUSED = 3
    """The daemon said no, or could not be reached; nothing was started."""
    FAILED_SOURCE_OWNS = 4
    FAILED_DESTINATION_OWNS = 5
    OWNERSHIP_UNKNOWN = 6
    INTERRUPTED = 130
    """The operator left while the migration goes on (the shells' number for SIGINT)."""


_FAILED = {
    "source-owns": ExitCode.FAILED_SOURCE_OWNS,
    "destination-owns": ExitCode.FAILED_DESTINATION_OWNS,
    "unknown": ExitCode.OWNERSHIP_UNKNOWN,
}


def exit_code_of(info: Mapping[str, Any]) -> ExitCode | None:
    """Judge what query-migrate returned; None while the migration is not over.

    A failure without a stated outcome comes from a QEMU, whose source keeps the machine.
    """
    status = info.get("status")
    if status == "completed":
        return ExitCode.DONE
    if status in ("failed", "cancelled"):
        return _FAILED.get(str(info.get("x-migrated-outcome")), ExitCode.FAILED_SOURCE_OWNS)
    return None

"""Descriptors of workloads that left: let go of what they refer to, but keep their numbers taken for a while.

The rule of the file: a number handed out through `savevm.ports` is never closed while a migration may use it. A thread
that still scans, punches or writes by a number that was closed could hit whatever was opened next; by a retired one it
gets an error, or writes into /dev/null. The numbers are given back when the next migration begins.
"""

from __future__ import annotations

import os

from migrated.kernel.memory import retire_descriptor

#: Numbers kept at most: a workload that comes and goes all day must not use up RLIMIT_NOFILE (1024 by default).
MAX_RETIRED = 128


class RetiredDescriptors:
    """Numbers whose files are gone. Used from the event loop only."""

    def __init__(self) -> None:
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._numbers: list[int] = []

    def retire(self, fd: int) -> None:
        """Take over ``fd``: its file is closed now, its number later. -1 is ignored."""
        if fd < 0:
            return
        retire_descriptor(fd, self._null)
        self._keep(fd)

    def retire_open(self, fd: int) -> None:
        """Take over ``fd``, but keep its file open too: a pagemap says by itself that its process is gone (ESRCH)."""
        if fd >= 0:
            self._keep(fd)

    def _keep(self, fd: int) -> None:
        self._numbers.append(fd)
        while len(self._numbers) > MAX_RETIRED:
            os.close(self._numbers.pop(0))

    def give_back(self) -> None:
        """Close all numbers: nobody uses any of them (no migration is under way)."""
        while self._numbers:
            os.close(self._numbers.pop())

    def close(self) -> None:
        """Close everything. Twice does no harm."""
        self.give_back()
        if self._null >= 0:
            os.close(self._null)
            self._null = -1

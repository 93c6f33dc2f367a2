"""One daemon per machine: a lock on the state directory.

The rule of the file: the kernel's lock decides, never the text in the file; a lock file left behind locks nothing, and
it is not removed, because a removed one could be locked twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from migrated.errors import MigratedError
from migrated.kernel.flock import try_lock

LOCK_NAME = "lock"


class StateLock:
    """Holds the state directory of one machine while entered."""

    def __init__(self, directory: str | Path) -> None:
        self._path = Path(directory) / LOCK_NAME
        self._fd = -1

    def __enter__(self) -> Self:
        """Take the lock. Raises MigratedError naming the process that has it."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise MigratedError(f"{self._path}: cannot be opened: {error.strerror}") from error
        try:
            if not try_lock(fd):
                raise MigratedError(f"{self._path.parent}: {_holder(fd)} keeps this machine already")
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _holder(fd: int) -> str:
    text = os.pread(fd, 32, 0).strip()
    return f"another migrated (pid {text.decode()})" if text.isdigit() else "another migrated"

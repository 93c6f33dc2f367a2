"""Descriptors under names: `getfd`, `closefd`, and who takes one for a connection.

The rule of the file: a descriptor has one owner. Error texts are QEMU's.
"""

from __future__ import annotations

import os

from migrated.errors import CommandError


class Descriptors:
    """The named descriptors of one daemon."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def add(self, name: str, fd: int) -> None:
        """Keep a descriptor under a name (``getfd``); one of that name is replaced."""
        if (old := self._fds.pop(name, None)) is not None:
            os.close(old)
        self._fds[name] = fd

    def remove(self, name: str) -> None:
        """Close a kept descriptor (``closefd``). Raises CommandError."""
        if name not in self._fds:
            raise CommandError(f"File descriptor named '{name}' not found")
        os.close(self.take(name))

    def take(self, name: str) -> int:
        """Give a descriptor away. Raises CommandError."""
        if name not in self._fds:
            raise CommandError(f"File descriptor named '{name}' has not been found")
        return self._fds.pop(name)

    def close(self) -> None:
        """Close all of them."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

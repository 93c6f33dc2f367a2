"""Descriptors that clients handed over, under names, for ``fd:`` URIs.

The rule of the file: whoever takes one owns it; what nobody took is closed.
"""

from __future__ import annotations

import os

from migrated.errors import CommandError


class Descriptors:
    """Named descriptors of one daemon. Error texts are QEMU's."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def add(self, name: str, fd: int) -> None:
        """Keep a descriptor; one of that name is replaced."""
        if (old := self._fds.pop(name, None)) is not None:
            os.close(old)
        self._fds[name] = fd

    def take(self, name: str) -> int:
        """Hand over a descriptor. Raises CommandError."""
        if name not in self._fds:
            raise CommandError(f"File descriptor named '{name}' has not been found")
        return self._fds.pop(name)

    def close(self, name: str) -> None:
        """Close a descriptor. Raises CommandError."""
        if name not in self._fds:
            raise CommandError(f"File descriptor named '{name}' not found")
        os.close(self._fds.pop(name))

    def close_all(self) -> None:
        """Close what nobody took."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

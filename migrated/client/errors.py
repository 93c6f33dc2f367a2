"""What can go wrong for a workload.

The rule of the file: `MachineMoved` is not an error but news; everything else is an `AttachError` that says what to do.
"""

from __future__ import annotations

from migrated.errors import MigratedError


class AttachError(MigratedError):
    """The daemon cannot be reached, refuses, or the machine object was closed."""


class AttachRefused(AttachError):
    """The daemon said no; the text is its reason. ``again``: the same may succeed later."""

    def __init__(self, why: str, *, again: bool = False) -> None:
        super().__init__(why)
        self.again = again


class MachineMoved(MigratedError):
    """The machine runs at ``peer`` now: this process has nothing to do, unless it stands by for the way back."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"the machine moved to {peer}" if peer else "the machine moved away")
        self.peer = peer

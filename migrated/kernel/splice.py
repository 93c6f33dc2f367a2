"""A pipe through which bytes go from a socket into a file without having been in this process.

The rule of the file: what was put into the pipe is taken out whole, or there is an error. A page of a memfd that is
written whole is not zeroed before, and no page table changes.

Source: splice(2), pipe(7); fcntl(2) F_SETPIPE_SZ.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from migrated.errors import KernelError

#: As much as anybody may have, and it is at most so much that one call takes from a socket.
PIPE_BYTES = 1 << 20


class Pipe:
    """Both ends; ``entrance`` is where bytes go in."""

    def __init__(self) -> None:
        self._exit, self.entrance = os.pipe()
        with contextlib.suppress(OSError):  # who has too many pipes has short ones
            fcntl.fcntl(self.entrance, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def empty_into(self, fd: int, offset: int, count: int) -> None:
        """Write the next ``count`` bytes into ``fd`` from ``offset`` on; the GIL is free. Raises KernelError."""
        try:
            while count:
                moved = os.splice(self._exit, fd, count, offset_dst=offset)
                count, offset = count - moved, offset + moved
        except OSError as error:
            raise KernelError("splice", error.errno or 0, f"{count} bytes") from error

    def close(self) -> None:
        """Let go of it, and of what is in it."""
        os.close(self.entrance)
        os.close(self._exit)

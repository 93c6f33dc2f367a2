"""What a destination waits for: the source's queue of requested pages.

The rule of the file: pure, and a request is checked before it is kept. Source: QEMU's ram_save_queue_pages; error texts
are QEMU's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from migrated.errors import RemoteProtocolError
from migrated.wire.ram import PAGE

#: A destination asks once for each page that a thread waits for. No process has this many threads.
OPEN_MAX = 65536


class PageRequests:
    """A queue of (block, first page, behind the last page)."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._last: str | None = None
        self._queue: deque[tuple[str, int, int]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, block: str | None, start: int, length: int) -> None:
        """Add a request in bytes; ``block`` None means that of the last one. Raises RemoteProtocolError."""
        if start % PAGE or length % PAGE or not length:
            raise _refused(f"MIG_RP_MSG_REQ_PAGES: Misaligned page request, start: {start:x} len: {length}")
        block = self._last if block is None else block
        if block is None:
            raise _refused("ram_save_queue_pages no previous block")
        if block not in self._sizes:
            raise _refused(f"ram_save_queue_pages no block '{block}'")
        if start + length > self._sizes[block]:
            raise _refused(
                f"ram_save_queue_pages request overrun start={start:x} len={length:x} blocklen={self._sizes[block]:x}"
            )
        if len(self._queue) >= OPEN_MAX:
            raise _refused(f"more than {OPEN_MAX} requests are open")
        self._last = block
        self._queue.append((block, start // PAGE, (start + length) // PAGE))

    @property
    def first(self) -> tuple[str, int, int]:
        """The oldest request."""
        return self._queue[0]

    def pop(self) -> tuple[str, int, int]:
        """Take the oldest request."""
        return self._queue.popleft()


def _refused(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, section="return path")

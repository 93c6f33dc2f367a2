"""An in-daemon handler: a journal file that grows while the machine runs, and moves with it.

Loaded by ``[handlers] load = ["journal:register"]``; the environment variable JOURNAL_FILE names the file at this host.
Body of every section: be32 length, then so many bytes of the file, in order.
"""

import os
from pathlib import Path
from typing import Any

from migrated.savevm.handlers import Pending, SaveVMHandlers
from migrated.savevm.registry import SaveVMRegistry

CHUNK_BYTES = 64 << 10


class Journal:
    """An append-only file. What was sent is never changed any more, so there is nothing to send twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sent = 0
        self._arrives = False

    # -- the source --------------------------------------------------------------------------------------------

    def save_setup(self, f: Any, opaque: Any) -> None:
        self._sent = 0
        f.put_be32(0)

    def save_live_pending(self, f: Any, opaque: Any, threshold_size: int) -> Pending:
        return Pending(precopy_only=self._left())

    async def save_live_iterate(self, f: Any, opaque: Any) -> bool:
        self._put_chunk(f)
        await f.drain()
        return self._left() == 0

    async def save_live_complete_precopy(self, f: Any, opaque: Any) -> None:
        """Send what is left. The machine is stopped, so nobody appends any more."""
        f.put_be32(self._left())
        with self._path.open("rb") as file:
            file.seek(self._sent)
            while chunk := file.read(CHUNK_BYTES):
                await f.send(chunk)
                self._sent += len(chunk)

    def _left(self) -> int:
        return max(self._path.stat().st_size - self._sent, 0) if self._path.exists() else 0

    def _put_chunk(self, f: Any) -> None:
        chunk = b""
        if self._left():
            with self._path.open("rb") as file:
                file.seek(self._sent)
                chunk = file.read(CHUNK_BYTES)
        f.put_be32(len(chunk))
        f.put_buffer(chunk)
        self._sent += len(chunk)

    # -- the destination ---------------------------------------------------------------------------------------

    def load_setup(self, f: Any, opaque: Any) -> None:
        """Only remember: this is called before it is known that a machine may arrive here."""
        self._arrives = True

    def load_state(self, f: Any, opaque: Any, version_id: int) -> None:
        """Append one section. A plain function: it runs in a thread, where reading and writing may wait."""
        with self._path.open("wb" if self._arrives else "ab") as file:
            self._arrives = False
            left = f.get_be32()
            while left:
                chunk = f.get_buffer(min(left, CHUNK_BYTES))
                file.write(chunk)
                left -= len(chunk)


def register(registry: SaveVMRegistry, machine: Any) -> None:
    """Entry point of ``[handlers] load``."""
    journal = Journal(Path(os.environ["JOURNAL_FILE"]))
    registry.register_savevm_live("journal", 0, 1, SaveVMHandlers.of(journal), journal)

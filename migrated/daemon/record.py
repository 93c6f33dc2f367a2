"""The hand-over record on disk: one small JSON file, written aside, fsynced, renamed.

The rule of the file: `write` returns only when the record would survive a crash, and a cancelled writer still finishes
first: a record must never be half written by a thread that nobody waits for.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from migrated.errors import ConfigError
from migrated.transport.file import sync_directory


class FileRecordStore:
    """Implements `savevm.ports.RecordStore` in one directory."""

    def __init__(self, directory: Path, name: str = "ownership.json") -> None:
        self._path = directory / name
        self._turn = asyncio.Lock()

    def read(self) -> dict[str, Any] | None:
        """Return the record, or None when none was ever written. Raises ConfigError when it cannot be read."""
        try:
            record = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(str(self._path), "", f"the ownership record cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(str(self._path), "", "the ownership record is not an object")
        return record

    async def write(self, record: dict[str, Any]) -> None:
        """Replace the record durably. Raises OSError; then the old one is still there."""
        async with self._turn:
            task = asyncio.get_running_loop().run_in_executor(None, self._write, json.dumps(record, indent=1) + "\n")
            cancelled = None
            while not task.done():
                try:
                    await asyncio.shield(task)
                except asyncio.CancelledError as error:
                    cancelled = error
                except OSError:
                    break
            task.result()
            if cancelled is not None:
                raise cancelled

    def _write(self, text: str) -> None:
        before = self._path.read_text() if self._path.exists() else None
        self._rename_aside(text)
        try:
            self._sync_directory()
        except OSError:
            self._put_back(before)
            raise

    def _rename_aside(self, text: str) -> None:
        aside = self._path.with_suffix(".new")
        with open(aside, "w", opener=_open_aside) as file:  # writes all of it, or raises
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, self._path)

    def _put_back(self, text: str | None) -> None:
        """Undo what is not known to last: nobody acted on it, so nobody may find it after a restart."""
        if text is None:
            self._path.unlink(missing_ok=True)
        else:
            self._rename_aside(text)

    def _sync_directory(self) -> None:
        sync_directory(self._path.parent)


def _open_aside(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o640)

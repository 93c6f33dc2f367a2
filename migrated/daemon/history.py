"""Reports of migrations on the disk: a directory with one file for each.

The rule of the file: a report is written aside and renamed, so that it is there whole or not at all; a file that cannot
be understood is named, and never keeps the others from being read. The oldest go when there are more than are kept.

A file's name begins with the time at which its migration began, so that names sort as migrations follow each other:

    history/20261126T180125.123Z-3f2a9c1d....json
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import msgspec

from migrated.model.history import Report, Unreadable
from migrated.transport.file import sync_directory
from migrated.transport.thread import in_thread

DIRECTORY = "history"
SUFFIX = ".json"
#: A report has a few kilobytes. What is larger was not written here.
FILE_MAX_BYTES = 4 << 20
#: An id may be a peer's choice, and must not lead out of the directory.
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")


class FileHistoryStore:
    """Implements `migration.history.HistoryStore` below a state directory. One writer at a time."""

    def __init__(self, state: Path, keep: int) -> None:
        self._directory = state / DIRECTORY
        self._keep = keep

    async def read(self, newest: int | None = None) -> list[Report | Unreadable]:
        """Return what is kept, or that many of it, the newest first."""
        return await in_thread(self.reports, newest)

    def reports(self, newest: int | None = None) -> list[Report | Unreadable]:
        """The same, blocking."""
        return [_read(path) for path in self._paths()[::-1][:newest]]

    async def write(self, report: Report, *, durable: bool) -> None:
        """Keep a report. Raises OSError."""
        await in_thread(self._write, report, durable)

    def _write(self, report: Report, durable: bool) -> None:
        if not self._keep:
            return
        self._directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        path = self._directory / _name(report)
        aside = path.with_name(f".{path.name}.new")
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        with open(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
            file.flush()
            if durable:
                os.fsync(fd)
        aside.rename(path)
        for old in self._paths()[: -self._keep]:
            old.unlink(missing_ok=True)
        if durable:
            sync_directory(self._directory)

    def _paths(self) -> list[Path]:
        """Return the files, the oldest first."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path for path in self._directory.iterdir() if _is_report(path.name))
        return []


def _is_report(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def _name(report: Report) -> str:
    stamp = re.sub(r"[-:]", "", report.started)
    return f"{_NOT_IN_NAMES.sub('_', f'{stamp}-{report.id}')}{SUFFIX}"


def _read(path: Path) -> Report | Unreadable:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_MAX_BYTES + 1)
        if len(raw) > FILE_MAX_BYTES:
            return Unreadable(path=str(path), unreadable=f"it is larger than {FILE_MAX_BYTES} bytes")
        return msgspec.json.decode(raw, type=Report)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return Unreadable(path=str(path), unreadable=str(error))

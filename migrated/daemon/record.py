"""The hand-over record on disk: a small file with room for two records, written in turn.

The rule of the file: `write` returns only when the record would survive a crash, and a cancelled writer still finishes
first: a record must never be half written by a thread that nobody waits for.

A machine stands still while its record is written. To write into a place that exists already and flush it takes 0.3 ms
here; a new file, its name and the directory take 2 ms. The record before stays where it is until the next but one is
written, and a line that a crash cut short does not have its checksum, so that at each moment one of the two is whole.

    {"sequence": 7, "checksum": "...", "record": {"hold": "owner", ...}}    4096 bytes, blanks, a line feed
    {"sequence": 8, "checksum": "...", "record": {"hold": "released", ...}}    the higher number is what counts
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_hexdigest

from migrated.errors import ConfigError
from migrated.savevm.ports import RecordStore
from migrated.transport.file import sync_directory
from migrated.transport.thread import in_thread

#: A block of the file system: neither line is touched when the other one is written.
SLOT_BYTES = 4096
SLOTS = 2


class _Slot(NamedTuple):
    sequence: int
    record: dict[str, Any]


class FileRecordStore:
    """Implements `savevm.ports.RecordStore` in one directory. One writer at a time: the daemon holds the lock on it."""

    def __init__(self, directory: Path, name: str = "ownership.json") -> None:
        self._path = directory / name

    def read(self) -> dict[str, Any] | None:
        """Return the record, or None when none was ever written. Raises ConfigError when it cannot be read."""
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(str(error)) from error
        if slots := _slots(raw):
            return _newest(slots).record
        return self._of_older_version(raw)

    def _of_older_version(self, raw: bytes) -> dict[str, Any]:
        """Return what 0.1.0 wrote: the record, and nothing else."""
        try:
            record = json.loads(raw)
        except ValueError as error:
            raise self._unreadable(str(error)) from error
        if not isinstance(record, dict):
            raise self._unreadable("it is not an object")
        return record

    def _unreadable(self, why: str) -> ConfigError:
        return ConfigError(str(self._path), "", f"the ownership record cannot be read: {why}")

    async def write(self, record: dict[str, Any]) -> None:
        """Replace the record durably. Raises OSError; then the old one is still there."""
        await in_thread(self._write, record)

    def _write(self, record: dict[str, Any]) -> None:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._create([_line(1, record), _blank()])
            return
        try:
            slots = _slots(os.pread(fd, SLOTS * SLOT_BYTES, 0))
            if slots:
                self._replace(fd, _newest(slots).sequence + 1, record)
            else:
                old = self._of_older_version(os.pread(fd, SLOT_BYTES, 0))
                self._create([_line(1, old), _line(2, record)])
        finally:
            os.close(fd)

    def _replace(self, fd: int, sequence: int, record: dict[str, Any]) -> None:
        offset = sequence % SLOTS * SLOT_BYTES
        try:
            os.pwrite(fd, _line(sequence, record), offset)
            self._flush(fd)
        except OSError:
            # Nobody will act on what is not known to last, so nobody may find it after a restart.
            os.pwrite(fd, _blank(), offset)
            self._flush(fd)
            raise

    def _flush(self, fd: int) -> None:
        os.fdatasync(fd)

    def _create(self, lines: list[bytes]) -> None:
        """Make the file, aside: there is none, or a whole one. The lines stand where `_replace` would put them."""
        aside = self._path.with_suffix(".new")
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            os.pwrite(fd, lines[0], SLOT_BYTES)
            os.pwrite(fd, lines[1], 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, self._path)
        try:
            self._sync_directory()
        except OSError:
            self._path.unlink(missing_ok=True)
            raise

    def _sync_directory(self) -> None:
        sync_directory(self._path.parent)


def _line(sequence: int, record: dict[str, Any]) -> bytes:
    """Return a slot. Raises OSError for a record that does not fit: a peer's name is cut long before."""
    body = json.dumps(record)
    text = f'{{"sequence": {sequence}, "checksum": "{_checksum(sequence, record)}", "record": {body}}}'
    if len(text) >= SLOT_BYTES:
        raise OSError(f"a record of {len(text)} bytes does not fit into {SLOT_BYTES}")
    return text.encode().ljust(SLOT_BYTES - 1) + b"\n"


def _blank() -> bytes:
    return b"\n".rjust(SLOT_BYTES)


def _checksum(sequence: int, record: dict[str, Any]) -> str:
    return xxh3_64_hexdigest(json.dumps([sequence, record], sort_keys=True).encode())


def _newest(slots: list[_Slot]) -> _Slot:
    return max(slots, key=lambda slot: slot.sequence)


def _slots(raw: bytes) -> list[_Slot]:
    """Return the slots that are whole."""
    slots = []
    for start in range(0, SLOTS * SLOT_BYTES, SLOT_BYTES):
        try:
            line = json.loads(raw[start : start + SLOT_BYTES])
            slot = _Slot(line["sequence"], line["record"])
            if line["checksum"] == _checksum(*slot):
                slots.append(slot)
        except (ValueError, KeyError, TypeError):
            continue  # blank, cut short, or the file of an older version
    return slots


class WatchedStore:
    """A record store that tells what was written, once it is."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self.on_written: Callable[[dict[str, Any]], None] = lambda record: None

    def read(self) -> dict[str, Any] | None:
        """Return the record."""
        return self._store.read()

    async def write(self, record: dict[str, Any]) -> None:
        """Replace the record."""
        try:
            await self._store.write(record)
        except asyncio.CancelledError:
            self.on_written(record)  # it has been made all the same (`RecordStore`)
            raise
        self.on_written(record)

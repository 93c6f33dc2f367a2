"""The record on disk: what was not written for certain is not there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from migrated.daemon.record import FileRecordStore


class BadDisk(FileRecordStore):
    """A disk that loses the directory's entry now and then."""

    works = False

    def _sync_directory(self) -> None:
        if not self.works:
            raise OSError(5, "Input/output error")
        super()._sync_directory()


async def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path)
    assert store.read() is None
    for hold in ("owner", "released"):
        await store.write({"hold": hold})
        assert FileRecordStore(tmp_path).read() == {"hold": hold}
    assert os.listdir(tmp_path) == ["ownership.json"]
    assert (tmp_path / "ownership.json").stat().st_mode & 0o777 == 0o640


async def test_after_a_failed_write_the_old_record_is_still_there(tmp_path: Path) -> None:
    """A destination whose write failed tells the source to go on, and must not own the machine after a restart."""
    store = BadDisk(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        await store.write({"hold": "owner"})
    assert store.read() is None
    store.works = True
    await store.write({"hold": "moved"})
    store.works = False
    with pytest.raises(OSError, match="Input/output"):
        await store.write({"hold": "owner"})
    assert store.read() == {"hold": "moved"}


async def test_a_cancelled_write_is_made_before_it_is_cancelled(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path)
    writing = asyncio.create_task(store.write({"hold": "owner"}))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait([writing])
    assert writing.cancelled()
    assert store.read() == {"hold": "owner"}

"""The record on disk: what was not written for certain is not there, and one of two is always whole."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from migrated.daemon.record import SLOT_BYTES, FileRecordStore, WatchedStore
from migrated.errors import ConfigError


class BadDisk(FileRecordStore):
    """A disk that fails now and then, at the moment when what was written would become durable."""

    works = True

    def _sync_directory(self) -> None:
        self._fail()
        super()._sync_directory()

    def _flush(self, fd: int) -> None:
        self._fail()
        super()._flush(fd)

    def _fail(self) -> None:
        if not self.works:
            self.works = True  # the next attempt, to undo it, succeeds
            raise OSError(5, "Input/output error")


def path(directory: Path) -> Path:
    return directory / "ownership.json"


async def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path)
    assert store.read() is None
    for hold in ("owner", "released", "moved", "owner"):
        await store.write({"hold": hold})
        assert FileRecordStore(tmp_path).read() == {"hold": hold}
    assert os.listdir(tmp_path) == ["ownership.json"]
    assert path(tmp_path).stat().st_mode & 0o777 == 0o640
    assert path(tmp_path).stat().st_size == 2 * SLOT_BYTES


async def test_people_and_tools_can_read_it(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path)
    for hold in ("owner", "released"):
        await store.write({"hold": hold, "peer": "b:1"})
    lines = [json.loads(line) for line in path(tmp_path).read_text().splitlines()]
    assert sorted((line["sequence"], line["record"]["hold"]) for line in lines) == [(1, "owner"), (2, "released")]


async def test_after_a_failed_write_the_old_record_is_still_there(tmp_path: Path) -> None:
    """A destination whose write failed tells the source to go on, and must not own the machine after a restart."""
    store = BadDisk(tmp_path)
    store.works = False
    with pytest.raises(OSError, match="Input/output"):
        await store.write({"hold": "owner"})
    assert store.read() is None
    for hold in ("moved", "partial"):
        await store.write({"hold": hold})
        store.works = False
        with pytest.raises(OSError, match="Input/output"):
            await store.write({"hold": "owner"})
        assert store.read() == {"hold": hold}


@pytest.mark.parametrize("cut", [0, 1, 20, 60, 100])
async def test_a_write_that_was_cut_short_never_was(tmp_path: Path, cut: int) -> None:
    store = FileRecordStore(tmp_path)
    for hold in ("owner", "released"):
        await store.write({"hold": hold})
    before = path(tmp_path).read_bytes()
    await store.write({"hold": "moved"})
    after = path(tmp_path).read_bytes()
    changed = next(at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)
    torn = after[: changed + cut] + before[changed + cut :]
    path(tmp_path).write_bytes(torn)
    assert store.read() == {"hold": "moved" if torn == after else "released"}
    await store.write({"hold": "owner"})
    assert store.read() == {"hold": "owner"}


async def test_a_cancelled_write_is_made_before_it_is_cancelled(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path)
    writing = asyncio.create_task(store.write({"hold": "owner"}))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait([writing])
    assert writing.cancelled()
    assert store.read() == {"hold": "owner"}


async def test_the_record_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    old: dict[str, Any] = {"hold": "moved", "epoch": 4}
    path(tmp_path).write_text(json.dumps(old, indent=1) + "\n")
    store = FileRecordStore(tmp_path)
    assert store.read() == old
    for hold in ("owner", "released"):
        await store.write({"hold": hold})
        assert FileRecordStore(tmp_path).read() == {"hold": hold}


@pytest.mark.parametrize("content", ["", "{", "[]", "\n" * 2 * SLOT_BYTES, '{"sequence": 1}x'])
async def test_what_is_no_record_is_not_taken_for_none(tmp_path: Path, content: str) -> None:
    path(tmp_path).write_text(content)
    with pytest.raises(ConfigError, match="the ownership record cannot be read"):
        FileRecordStore(tmp_path).read()


async def test_a_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    store = FileRecordStore(tmp_path)
    await store.write({"hold": "owner"})
    with pytest.raises(OSError, match="does not fit into 4096"):
        await store.write({"peer": "x" * SLOT_BYTES})
    assert store.read() == {"hold": "owner"}


async def test_a_watched_store_tells_what_is_on_the_disk_and_nothing_else(tmp_path: Path) -> None:
    disk = BadDisk(tmp_path)
    store, told = WatchedStore(disk), list[dict[str, Any]]()
    await store.write({"hold": "owner"})  # nobody listens yet
    store.on_written = told.append
    await store.write({"hold": "released"})
    disk.works = False
    with pytest.raises(OSError, match="Input/output"):
        await store.write({"hold": "moved"})
    assert told == [store.read()] == [{"hold": "released"}]
    writing = asyncio.create_task(store.write({"hold": "owner"}))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait([writing])
    assert writing.cancelled()
    assert told[-1] == store.read() == {"hold": "owner"}

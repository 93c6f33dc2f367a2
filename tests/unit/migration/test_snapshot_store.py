"""Where snapshots are kept: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrated.errors import CommandError, RemoteProtocolError
from migrated.migration.snapshot_store import MANIFEST, STREAM, SnapshotStore, read_manifest
from migrated.wire.manifest import FORMAT, Chunk, Manifest, SavedMachine, Summary

EMPTY = Manifest(FORMAT, "test", "now", SavedMachine("kv", "", "none", "running"), 1, (), (), (Chunk(0, 1, "0"),))


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots")


async def save(store: SnapshotStore, tag: str, stream: bytes = b"x") -> Path:
    aside = await store.begin(tag)
    (aside / STREAM).write_bytes(stream)
    await store.write_manifest(aside, EMPTY)
    await store.commit(aside, tag)
    return store.path(tag)


async def test_a_snapshot_appears_whole_and_private(store: SnapshotStore, tmp_path: Path) -> None:
    aside = await store.begin("one")
    assert await store.summaries() == {}
    await store.discard(aside)
    await store.discard(aside)
    path = await save(store, "one")
    assert sorted(os.listdir(path)) == [MANIFEST, STREAM]
    assert (path / MANIFEST).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "snapshots").stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "snapshots") == ["one"]
    found = (await store.summaries())["one"]
    assert isinstance(found, Summary)
    assert found.machine.name == "kv"
    assert read_manifest(path).length == 1


async def test_one_that_is_there_is_not_overwritten(store: SnapshotStore) -> None:
    path = await save(store, "one")
    with pytest.raises(
        CommandError, match=r"Snapshot 'one' already exists .*Next: delete it, or save under another tag"
    ):
        await store.begin("one")
    assert (path / STREAM).read_bytes() == b"x"


async def test_delete(store: SnapshotStore, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="Snapshot 'one' does not exist"):
        await store.delete("one")
    await save(store, "one")
    await store.delete("one")
    assert os.listdir(tmp_path / "snapshots") == []
    await save(store, "one")


async def test_what_a_dead_daemon_left_is_cleared_away_and_nothing_else(store: SnapshotStore, tmp_path: Path) -> None:
    store.clear()
    await save(store, "one")
    aside = await store.begin("two")
    (aside / STREAM).write_bytes(b"half")
    assert await store.begin("two") == aside, "also by the next attempt"
    assert not (aside / STREAM).exists()
    store.clear()
    assert os.listdir(tmp_path / "snapshots") == ["one"]


async def test_what_cannot_be_read_is_listed_with_the_reason(store: SnapshotStore) -> None:
    path = await save(store, "bad")
    (path / MANIFEST).write_bytes(b"{}")
    other = await save(store, "worse")
    (other / MANIFEST).unlink()
    found = await store.summaries()
    assert [str(error).split(",", maxsplit=1)[0] for error in found.values()] == [
        "the manifest cannot be understood",
        "the manifest cannot be read: No such file or directory",
    ]
    with pytest.raises(RemoteProtocolError, match="the manifest cannot be read"):
        read_manifest(other)


@pytest.mark.parametrize("tag", ["", ".", "..", ".x", "a/b", "a\0", "a b", "ä", "-x", "x" * 101])
def test_tags_are_file_names(store: SnapshotStore, tag: str) -> None:
    with pytest.raises(CommandError, match="Invalid snapshot tag"):
        store.path(tag)


@pytest.mark.parametrize("tag", ["a", "nightly-2026.01.01", "_x", "a@b:c+d", "x" * 100])
def test_what_may_be_a_tag(store: SnapshotStore, tag: str) -> None:
    assert store.path(tag).name == tag

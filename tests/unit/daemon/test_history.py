"""Reports on the disk: whole or not there, a limited number, and one that is damaged hides no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.daemon.history import FILE_MAX_BYTES, FileHistoryStore
from migrated.model.history import Direction, Report, Unreadable


def report(number: int, migration_id: str = "move") -> Report:
    return Report(
        id=migration_id, direction=Direction.INCOMING, machine="kv", started=f"2026-11-26T18:00:{number:02}.000Z",
        status="completed", outcome="destination-owns",
    )  # fmt: skip


def names(state: Path) -> list[str]:
    return sorted(path.name for path in (state / "history").iterdir())


async def test_what_was_written_is_read_the_newest_first(tmp_path: Path) -> None:
    store = FileHistoryStore(tmp_path, keep=10)
    assert await store.read() == []
    for number in (2, 1, 3):
        await store.write(report(number), durable=number == 1)
    assert await FileHistoryStore(tmp_path, keep=10).read() == [report(3), report(2), report(1)]
    assert await store.read(1) == [report(3)]
    assert names(tmp_path) == [f"20261126T18000{number}.000Z-move.json" for number in (1, 2, 3)]
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o750


async def test_a_report_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    store = FileHistoryStore(tmp_path, keep=10)
    begun = Report(
        id="m", direction=Direction.OUTGOING, machine="kv", started="2026-11-26T18:00:00.000Z", status="unfinished",
        outcome="unknown",
    )  # fmt: skip
    ended = Report(
        id="m", direction=Direction.OUTGOING, machine="kv", started=begun.started, status="failed",
        outcome="source-owns", migration={"ram": {"total": 1}},
    )  # fmt: skip
    await store.write(begun, durable=False)
    await store.write(ended, durable=True)
    assert await store.read() == [ended]


async def test_the_oldest_go(tmp_path: Path) -> None:
    store = FileHistoryStore(tmp_path, keep=2)
    for number in range(4):
        await store.write(report(number), durable=True)
    assert await store.read() == [report(3), report(2)]


async def test_a_host_may_keep_none(tmp_path: Path) -> None:
    await FileHistoryStore(tmp_path, keep=0).write(report(1), durable=True)
    assert not (tmp_path / "history").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"id": 1}', b" " * (FILE_MAX_BYTES + 1)])
async def test_a_damaged_one_is_named_and_hides_no_other(tmp_path: Path, content: bytes) -> None:
    store = FileHistoryStore(tmp_path, keep=10)
    for number in (1, 2):
        await store.write(report(number), durable=False)
    path = tmp_path / "history" / names(tmp_path)[1]
    path.write_bytes(content)
    damaged, whole = await store.read()
    assert isinstance(damaged, Unreadable)
    assert (damaged.path, whole) == (str(path), report(1))
    assert damaged.unreadable


async def test_what_was_left_half_written_is_no_report(tmp_path: Path) -> None:
    store = FileHistoryStore(tmp_path, keep=1)
    await store.write(report(1), durable=True)
    (tmp_path / "history" / ".20261126T180002.000Z-move.json.new").write_text("{")
    assert await store.read() == [report(1)]


@pytest.mark.parametrize("migration_id", ["../../etc/passwd", "a/b", "\u00e9", ".."])
async def test_a_peers_id_does_not_lead_out_of_the_directory(tmp_path: Path, migration_id: str) -> None:
    store = FileHistoryStore(tmp_path, keep=10)
    await store.write(report(1, migration_id), durable=True)
    assert [one.id for one in await store.read() if isinstance(one, Report)] == [migration_id]
    assert len(names(tmp_path)) == 1


async def test_a_disk_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "history").write_text("in the way")
    with pytest.raises(OSError, match="history"):
        await FileHistoryStore(tmp_path, keep=1).write(report(1), durable=True)

"""`migratectl snapshot` from outside: what it sends, prints and returns."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from migrated.errors import CommandError
from migrated.transport.chunk_file import create_chunk_file
from migrated.wire.manifest import FORMAT, Manifest, SavedMachine, encode_manifest
from tests.unit.cli.conftest import Ctl, finish

RUNNING: dict[str, object] = {
    "type": "snapshot-save", "status": "running", "current-progress": 1 << 20, "total-progress": 1 << 22,
}  # fmt: skip
DONE: dict[str, object] = {**RUNNING, "status": "concluded", "current-progress": 1 << 22}
FAILED: dict[str, object] = {**DONE, "error": "the disk is full"}


@pytest.mark.parametrize("command", ["save", "load", "delete"])
async def test_a_job_is_followed_and_dismissed(ctl: Ctl, command: str) -> None:
    ctl.snapshots.script = [RUNNING, DONE]
    ran = await ctl.run("snapshot", command, "nightly")
    assert ran.code == 0, ran
    assert [(call[0], call[2:3]) for call in ctl.snapshots.calls] == [(command, ("nightly",)), ("dismiss", ())]
    assert len({call[1] for call in ctl.snapshots.calls}) == 1
    assert ran.out.splitlines()[0] == "snapshot-save running: 25% of 4 MiB, 1 MiB sent, 3 MiB left"
    assert ran.out.splitlines()[-1] == {"save": "Saved", "load": "Loaded", "delete": "Deleted"}[command] + " 'nightly'"


@pytest.mark.parametrize(("record", "code"), [("owner", 4), ("partial", 6)])
async def test_a_failure_says_what_is_left(ctl: Ctl, record: str, code: int) -> None:
    ctl.snapshots.script = [FAILED]
    ctl.migrator.record["record"] = record
    ran = await ctl.run("snapshot", "load", "nightly")
    assert ran.code == code
    assert "'nightly' was not loaded: the disk is full" in ran.out
    ran = await ctl.run("snapshot", "load", "nightly", "--json")
    assert (ran.code, ran.json["exit-code"], ran.json["job"]["error"]) == (code, code, "the disk is full")


async def test_a_refusal(ctl: Ctl) -> None:
    ctl.snapshots.refusal = CommandError("There's a migration process in progress")
    ran = await ctl.run("snapshot", "save", "nightly")
    assert (ran.code, ran.err) == (3, "migratectl: There's a migration process in progress [command-refused]\n")


async def test_ctrl_c_cancels_and_a_second_one_leaves(ctl: Ctl) -> None:
    ctl.snapshots.script = [RUNNING]
    process = await ctl.start("snapshot", "save", "nightly")
    assert process.stdout is not None
    await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while "Cancelling" not in (await process.stdout.readline()).decode():
        pass
    while ("cancel", ctl.snapshots.calls[0][1]) not in ctl.snapshots.calls:
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    ran = await finish(process)
    assert ran.code == 130
    assert "The job goes on; 'query-jobs' shows how" in ran.out


async def test_list(ctl: Ctl) -> None:
    assert (await ctl.run("snapshot", "list")).out == "There are no snapshots\n"
    ctl.snapshots.found = [
        {
            "tag": "good", "path": "/s/good", "created": "2026-01-01T00:00:00+00:00", "size": 1536, "machine": "kv",
            "status": "running", "blocks": [{"name": "heap", "size": 4096}],
        },
        {"tag": "bad", "path": "/s/bad", "error": "the manifest cannot be read"},
    ]  # fmt: skip
    ran = await ctl.run("snapshot", "list")
    assert ran.out.splitlines() == [
        "good: kv, running, 2026-01-01T00:00:00+00:00, 1.50 KiB (heap 4 KiB), /s/good",
        "bad: the manifest cannot be read (/s/bad)",
    ]
    assert (await ctl.run("snapshot", "list", "--json")).json == ctl.snapshots.found


async def make_snapshot(path: Path) -> None:
    path.mkdir()
    writer = await create_chunk_file(path / "stream", 1)
    await writer.send(b"not a stream, but that is not looked at")
    await writer.finish()
    await writer.close()
    machine = SavedMachine("kv", "", "none", "running")
    manifest = Manifest(FORMAT, "test", "now", machine, writer.bytes_sent, (), (), tuple(writer.chunks))
    (path / "manifest.json").write_bytes(encode_manifest(manifest))


async def test_verify_needs_no_daemon(ctl: Ctl, tmp_path: Path) -> None:
    await ctl.server.close()
    await make_snapshot(tmp_path / "one")
    ran = await ctl.run("snapshot", "verify", str(tmp_path / "one"))
    assert (ran.code, ran.out) == (0, f"{tmp_path}/one is whole: 39 B in 1 chunks\n")
    expected: dict[str, Any] = {"path": f"{tmp_path}/one", "verified": True, "bytes": 39, "chunks": 1}
    assert (await ctl.run("snapshot", "verify", str(tmp_path / "one"), "--json")).json == expected
    (tmp_path / "one" / "stream").write_bytes(b"Not a stream, but that is not looked at")
    ran = await ctl.run("snapshot", "verify", str(tmp_path / "one"))
    assert ran.code == 4
    assert "the stream is damaged within 39 bytes" in ran.err
    assert "(section stream header, stream offset 0x0)" in ran.err
    ran = await ctl.run("snapshot", "verify", str(tmp_path / "none"), "--json")
    assert ran.code == 3
    assert "is not the directory of a snapshot" in ran.json["error"]["desc"]

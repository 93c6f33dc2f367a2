"""Snapshots of real machines: saved under load, loaded here and elsewhere, refused where they must be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.integration.conftest import MIB, MakePager, MakeSite
from tests.integration.test_workloads import memory_of
from tests.support.following import assert_moved, assert_still_runs, migrate, run_state, wait_status, wait_until
from tests.support.jobs import begin_job, end_job, fail_job, run_job

SLOW_BPS = 2 << 20


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    """A site whose machine runs."""
    return started(make_site("A"))


def started(site: Site) -> Site:
    site.qmp.execute("cont")
    site.wait_event("running")
    return site


def shelf(site: Site) -> Path:
    return site.directory / "state" / "snapshots"


def events(site: Site) -> list[str]:
    found = []
    while (event := site.qmp.next_event(timeout_s=0)) is not None:
        found.append(event["event"] if event["event"] != "JOB_STATUS_CHANGE" else event["data"]["status"])
    return found


def test_saved_while_it_writes_and_loaded_as_often_as_one_likes(site: Site) -> None:
    events(site)
    run_job(site.qmp, "snapshot-save", "one")
    assert events(site) == ["created", "running", "STOP", "RESUME", "waiting", "pending", "concluded", "null"]
    assert_still_runs(site)
    (listed,) = site.qmp.execute("x-migrated-query-snapshots")
    assert (listed["tag"], listed["status"], listed["blocks"]) == (
        "one",
        "running",
        [{"name": "heap", "size": 16 * MIB}],
    )
    assert listed["size"] == (shelf(site) / "one" / "stream").stat().st_size
    loads = []
    for _ in range(2):
        run_job(site.qmp, "snapshot-load", "one")
        assert_still_runs(site)
        loads.append(site.check())
    assert loads[0]["at"] == loads[1]["at"]
    assert loads[0]["hash"] == loads[1]["hash"]
    assert site.qmp.execute("x-migrated-query-ownership")["record"] == "owner"
    run_job(site.qmp, "snapshot-delete", "one")
    assert site.qmp.execute("x-migrated-query-snapshots") == []
    assert list(shelf(site).iterdir()) == []


def test_memory_comes_back_to_the_last_byte_and_the_run_state_with_it(site: Site) -> None:
    site.qmp.execute("stop")
    before = memory_of(site)
    run_job(site.qmp, "snapshot-save", "paused")
    assert run_state(site) == "paused"
    site.qmp.execute("cont")
    assert_still_runs(site)
    run_job(site.qmp, "snapshot-load", "paused")
    assert run_state(site) == "paused"
    assert memory_of(site) == before
    site.restart_daemon()
    wait_until(lambda: site.qmp.execute("x-migrated-query-machine")["workloads"], "the walker re-attached")
    assert run_state(site) == "paused"
    site.qmp.execute("cont")
    assert_still_runs(site)


@pytest.mark.limit(120)
def test_two_gigabytes_under_full_write_load(make_pager: MakePager) -> None:
    site = make_pager("A", ram_bytes=2048 * MIB, walkers=4)
    site.run()
    run_job(site.qmp, "snapshot-save", "big")
    assert run_state(site) == "running"
    assert site.check()["invariant"]
    run_job(site.qmp, "snapshot-load", "big")
    assert run_state(site) == "running"
    assert site.check()["invariant"]


@pytest.mark.parametrize("uri", ["file:{}", "exec:cat {}"])
def test_it_is_a_migration_stream(site: Site, make_site: MakeSite, uri: str) -> None:
    run_job(site.qmp, "snapshot-save", "one")
    run_job(site.qmp, "snapshot-load", "one")
    here = site.check()
    other = make_site("B", incoming="defer")
    other.qmp.execute("migrate-incoming", {"uri": uri.format(shelf(site) / "one" / "stream")})
    other.wait_event("running")
    there = other.check()
    assert there["invariant"]
    assert (there["at"], there["hash"]) == (here["at"], here["hash"])


def test_loaded_where_no_machine_was(site: Site, make_site: MakeSite) -> None:
    run_job(site.qmp, "snapshot-save", "one")
    other = make_site("B")
    shelf(other).mkdir()
    shutil.copytree(shelf(site) / "one", shelf(other) / "copy")
    run_job(other.qmp, "snapshot-load", "copy")
    other.wait_event("running")
    assert_still_runs(other)
    assert other.qmp.execute("x-migrated-query-ownership")["record"] == "owner"
    other.restart_daemon()
    wait_until(lambda: run_state(other) == "running", "it is this host's")


def test_a_machine_moves_with_its_snapshots_staying_behind(pair: tuple[Site, Site]) -> None:
    a, b = pair
    run_job(a.qmp, "snapshot-save", "one")
    migrate(a, b)
    with pytest.raises(
        CommandError, match=r"no snapshot can be loaded here: the machine runs at .*Next: migrate it back"
    ):
        begin_job(a.qmp, "snapshot-load", "one")
    with pytest.raises(CommandError, match="Can't migrate the vm that was paused due to previous migration"):
        begin_job(a.qmp, "snapshot-save", "two")
    migrate(b, a)
    run_job(a.qmp, "snapshot-load", "one")
    assert_still_runs(a)


def test_not_during_a_migration(pair: tuple[Site, Site]) -> None:
    a, b = pair
    run_job(a.qmp, "snapshot-save", "one")
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": SLOW_BPS})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"active"})
    for command in ("snapshot-save", "snapshot-load"):
        with pytest.raises(CommandError, match="There's a migration process in progress"):
            begin_job(a.qmp, command, "two")
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    run_job(a.qmp, "snapshot-save", "two")
    assert_still_runs(a)


def held(make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Site, Path]:
    """A machine with a device whose save and load can be held."""
    hold = tmp_path / "hold"
    hold.mkdir()
    monkeypatch.setenv("HELD_DEVICE", str(hold))
    config = '[handlers]\nload = ["tests.support.held_device:register"]\n'
    return started(make_site("A", config=config)), hold


def test_what_waits_for_a_snapshot_and_its_cancel(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, hold = held(make_site, tmp_path, monkeypatch)
    run_job(site.qmp, "snapshot-save", "before")
    (hold / "hold-save").touch()
    job = begin_job(site.qmp, "snapshot-save", "never")
    wait_until((hold / "saving").exists, "it saves")
    assert run_state(site) == "save-vm"
    orders: list[tuple[str, dict[str, Any]]] = [
        ("stop", {}),
        ("cont", {}),
        ("migrate", {"uri": "tcp:127.0.0.1:1"}),
        ("migrate-set-capabilities", {"capabilities": []}),
        ("snapshot-save", {"job-id": "other", "tag": "other"}),
        ("snapshot-delete", {"job-id": "other", "tag": "before"}),
    ]
    for command, arguments in orders:
        with pytest.raises(CommandError, match=rf"job '{job}' \(snapshot-save\) is under way\. Next: .*`job-cancel`"):
            site.qmp.execute(command, arguments)
    site.qmp.execute("job-cancel", {"id": job})
    assert end_job(site.qmp, job)["error"] == "Job was cancelled"
    assert_still_runs(site)
    assert [path.name for path in shelf(site).iterdir()] == ["before"]
    (hold / "hold-save").unlink()
    (hold / "hold-load").touch()
    (hold / "loading").unlink(missing_ok=True)
    job = begin_job(site.qmp, "snapshot-load", "before")
    wait_until((hold / "loading").exists, "it loads")
    with pytest.raises(CommandError, match="cannot be cancelled any more: it overwrites the machine of this host"):
        site.qmp.execute("job-cancel", {"id": job})
    (hold / "hold-load").unlink()
    end_job(site.qmp, job)
    assert_still_runs(site)


def test_a_stop_that_is_asked_for_ends_a_save_first(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, hold = held(make_site, tmp_path, monkeypatch)
    (hold / "hold-save").touch()
    begin_job(site.qmp, "snapshot-save", "never")
    wait_until((hold / "saving").exists, "it saves")
    site.daemon.terminate()
    assert site.daemon.wait(30) == 0
    assert list(shelf(site).iterdir()) == []


def flip_a_bit(path: Path, at: float) -> int:
    stream = path / "stream"
    offset = int(stream.stat().st_size * at)
    with stream.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    return offset


def cut_short(path: Path) -> None:
    stream = path / "stream"
    with stream.open("r+b") as file:
        file.truncate(stream.stat().st_size // 2)


def of_a_later_version(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format":1', b'"format":2'))


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


#: What happens to a snapshot, and what is said of it. One machine for all: none of it may be noticed there.
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: flip_a_bit(path, 0.5), r"the stream is damaged .*section ram/0 \(PART\), stream offset 0x"),
    (lambda path: flip_a_bit(path, 0), r"the stream is damaged .*section stream header, stream offset 0x0"),
    (cut_short, r"the stream is cut short, .*section ram/0 \(PART\), stream offset 0x"),
    (of_a_later_version, "does not read snapshots of that format, expected format 1, found format 2"),
    (without_manifest, "the manifest cannot be read"),
]


@pytest.mark.row(48)
def test_what_is_damaged_is_refused_before_anything_is_touched(site: Site) -> None:
    run_job(site.qmp, "snapshot-save", "good")
    events(site)
    for number, (spoil, text) in enumerate(DAMAGE):
        bad = shutil.copytree(shelf(site) / "good", shelf(site) / f"bad{number}")
        spoil(bad)
        error = fail_job(site.qmp, "snapshot-load", bad.name)
        assert_matches(text, error)
        verified = subprocess.run(
            [sys.executable, "-m", "migrated.cli.app", "snapshot", "verify", str(bad)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert verified.returncode == 4
        assert verified.stderr == f"migratectl: {error} [stream-invalid]\n"
    assert "STOP" not in events(site), "the machine never noticed"
    assert_still_runs(site)
    run_job(site.qmp, "snapshot-load", "good")
    assert_still_runs(site)


def test_where_no_machine_is_damage_is_found_on_the_way_and_another_one_may_come(pair: tuple[Site, Site]) -> None:
    a, b = pair
    run_job(a.qmp, "snapshot-save", "one")
    shutil.copytree(shelf(a) / "one", shelf(b) / "bad")
    cut_short(shutil.copytree(shelf(a) / "one", shelf(b) / "short"))
    flip_a_bit(shelf(b) / "bad", 0.9)
    assert_matches("the stream is cut short", fail_job(b.qmp, "snapshot-load", "short"))
    assert b.qmp.execute("x-migrated-query-ownership")["record"] == "none", "that shows at once"
    error = fail_job(b.qmp, "snapshot-load", "bad")
    assert_matches(r"the stream is damaged .*section ram/0 \(PART\), stream offset 0x", error)
    assert "snapshot:bad was loaded only in part" in error
    assert run_state(b) == "inmigrate"
    with pytest.raises(CommandError, match="loaded only in part"):
        b.qmp.execute("cont")
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"completed"})
    assert_moved(a, b)


def assert_matches(text: str, found: str) -> None:
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(found)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ram_bytes": 8 * MIB}, "Size mismatch: heap: 0x1000000 != 0x800000"),
        ({"config": '[handlers]\nload = ["tests.support.held_device:register"]\n'}, "lacks the state of held/0"),
        ({"module": "tests.support.misbehave", "walker_arguments": ["--mode", "signal"]}, "device counter"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_machine_goes_on(
    site: Site,
    make_site: MakeSite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    text: str,
) -> None:
    monkeypatch.setenv("HELD_DEVICE", str(tmp_path))
    run_job(site.qmp, "snapshot-save", "one")
    short = "[workload]\nattach-timeout = 1\n"
    other = make_site("B", **{**options, "config": options.get("config", "") + short})
    shelf(other).mkdir()
    shutil.copytree(shelf(site) / "one", shelf(other) / "one")
    other.qmp.execute("cont")
    other.wait_event("running")
    assert text in fail_job(other.qmp, "snapshot-load", "one")
    assert run_state(other) == "running"
    assert other.qmp.execute("x-migrated-query-ownership")["record"] == "owner"


def test_what_the_job_refuses(site: Site) -> None:
    run_job(site.qmp, "snapshot-save", "one")
    assert "Snapshot 'one' already exists" in fail_job(site.qmp, "snapshot-save", "one")
    for command in ("snapshot-load", "snapshot-delete"):
        assert "Snapshot 'none' does not exist" in fail_job(site.qmp, command, "none")
    site.qmp.execute("snapshot-save", {"job-id": "a", "tag": "two", "vmstate": "disk0", "devices": ["disk0"]})
    assert end_job(site.qmp, "a")["error"] == "vmstate block device 'disk0' does not exist"
    site.qmp.execute("snapshot-load", {"job-id": "a", "tag": "one", "devices": ["disk0"]})
    assert end_job(site.qmp, "a")["error"] == "No block device node 'disk0'"
    for tag in ("../one", ".one", ""):
        with pytest.raises(CommandError, match="Invalid snapshot tag"):
            begin_job(site.qmp, "snapshot-save", tag)
    assert_still_runs(site)


def test_a_machine_that_waits_has_nothing_to_save(make_site: MakeSite) -> None:
    with pytest.raises(CommandError, match="Guest is waiting for an incoming migration"):
        begin_job(make_site("B").qmp, "snapshot-save", "one")


def test_migration_after_a_load(pair: tuple[Site, Site]) -> None:
    a, b = pair
    run_job(a.qmp, "snapshot-save", "one")
    run_job(a.qmp, "snapshot-load", "one")
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"completed"})
    assert_moved(a, b)

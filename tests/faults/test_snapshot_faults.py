"""Whatever dies or fills up while a snapshot is saved or loaded: nothing is lost, and half a machine never runs."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.faults.conftest import HELD
from tests.integration.conftest import MakeSite
from tests.support.following import assert_still_runs, run_state, wait_until
from tests.support.jobs import begin_job, end_job, fail_job, run_job


@pytest.fixture
def site(make_site: MakeSite, hold: Path) -> Site:
    """A machine that runs, with a device whose save and load can be held, and a snapshot of it."""
    site = make_site("A", config=HELD)
    site.qmp.execute("cont")
    site.wait_event("running")
    run_job(site.qmp, "snapshot-save", "good")
    return site


def shelf(site: Site) -> Path:
    return site.directory / "state" / "snapshots"


def attached(site: Site) -> bool:
    return bool(site.qmp.execute("x-migrated-query-machine")["workloads"])


def test_a_daemon_that_is_killed_while_it_saves(site: Site, hold: Path) -> None:
    (hold / "hold-save").touch()
    begin_job(site.qmp, "snapshot-save", "half")
    wait_until((hold / "saving").exists, "it saves")
    assert len(list(shelf(site).iterdir())) == 2, "something is there"
    site.restart_daemon()
    (hold / "hold-save").unlink()
    wait_until(lambda: attached(site), "the walker re-attached")
    assert [path.name for path in shelf(site).iterdir()] == ["good"]
    assert_still_runs(site)
    run_job(site.qmp, "snapshot-save", "half")
    run_job(site.qmp, "snapshot-load", "good")
    assert_still_runs(site)


def test_a_daemon_that_is_killed_while_it_loads(site: Site, hold: Path) -> None:
    (hold / "hold-load").touch()
    begin_job(site.qmp, "snapshot-load", "good")
    wait_until((hold / "loading").exists, "it loads")
    site.restart_daemon()
    (hold / "hold-load").unlink()
    wait_until(lambda: attached(site), "the walker re-attached")
    assert run_state(site) == "inmigrate"
    with pytest.raises(
        CommandError, match=r"snapshot:good was loaded only in part.*Next: load it, or another snapshot"
    ):
        site.qmp.execute("cont")
    run_job(site.qmp, "snapshot-load", "good")
    assert_still_runs(site)


def test_a_workload_that_dies_while_it_is_overwritten(site: Site, hold: Path) -> None:
    (hold / "hold-load").touch()
    job = begin_job(site.qmp, "snapshot-load", "good")
    wait_until((hold / "loading").exists, "it loads")
    site.stop_walker()
    error = end_job(site.qmp, job)["error"]
    assert "workload walker-A" in error
    assert "snapshot:good was loaded only in part" in error
    (hold / "hold-load").unlink()
    assert run_state(site) == "inmigrate"
    assert site.qmp.execute("x-migrated-query-ownership")["record"] == "partial"
    site.start_walker()
    run_job(site.qmp, "snapshot-load", "good")
    site.wait_event("running")
    assert_still_runs(site)


def test_a_workload_that_dies_while_it_is_saved(site: Site, hold: Path) -> None:
    (hold / "hold-save").touch()
    job = begin_job(site.qmp, "snapshot-save", "half")
    wait_until((hold / "saving").exists, "it saves")
    site.stop_walker()
    assert "workload walker-A" in end_job(site.qmp, job)["error"]
    (hold / "hold-save").unlink()
    assert [path.name for path in shelf(site).iterdir()] == ["good"]
    assert run_state(site) == "running"
    site.start_walker()
    site.wait_event("running")
    run_job(site.qmp, "snapshot-load", "good")
    assert_still_runs(site)


@contextmanager
def small_disk(site: Site) -> Iterator[None]:
    """Mount a small memory file system where the daemon writes aside."""
    disk = shelf(site)
    mounted = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=8m", "small", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", str(disk)], check=True)


@contextmanager
def small_files(site: Site) -> Iterator[None]:
    """Let the daemon write only small files."""
    before = resource.prlimit(site.daemon.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(site.daemon.pid, resource.RLIMIT_FSIZE, (8 << 20, before[1]))
    yield
    resource.prlimit(site.daemon.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.row(31)
@pytest.mark.parametrize(
    ("trouble", "text"), [(small_disk, "No space left on device"), (small_files, "File too large")]
)
def test_a_disk_without_room(site: Site, trouble: object, text: str) -> None:
    assert callable(trouble)
    with trouble(site):
        error = fail_job(site.qmp, "snapshot-save", "much")
        assert "Could not create a file of" in error
        assert text in error
        assert "much" not in [path.name for path in shelf(site).iterdir()]
        assert_still_runs(site)
    assert [path.name for path in shelf(site).iterdir()] == ["good"]
    run_job(site.qmp, "snapshot-save", "much")
    run_job(site.qmp, "snapshot-load", "good")
    assert_still_runs(site)

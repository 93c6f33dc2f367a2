"""A machine travels over every transport there is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.integration.conftest import MakeSite
from tests.support.following import assert_moved, assert_still_runs, run_state, wait_status


@pytest.fixture
def source(make_site: MakeSite) -> Site:
    site = make_site("A")
    site.qmp.execute("cont")
    site.wait_event("running")
    return site


def deferred(make_site: MakeSite, name: str = "B") -> Site:
    """A destination that waits for migrate-incoming."""
    return make_site(name, incoming="defer")


def migratectl(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrated.cli.app", "--socket", str(site.directory / "run" / "qmp.sock"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


def test_unix(source: Site, make_site: MakeSite, tmp_path: Path) -> None:
    b = deferred(make_site)
    uri = f"unix:{tmp_path}/m.sock"
    b.qmp.execute("migrate-incoming", {"uri": uri})
    source.qmp.execute("migrate", {"uri": uri})
    assert wait_status(source, {"completed"})["x-migrated-peer"]["kind"] == "migrated"
    assert_moved(source, b)


def test_into_a_file_and_back_in(source: Site, make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "machine.state"
    source.qmp.execute("migrate", {"uri": f"file:{path}"})
    figures = wait_status(source, {"completed"})
    assert figures["x-migrated-peer"]["kind"] == "file"
    assert path.stat().st_size >= 16 << 20
    b = deferred(make_site)
    b.qmp.execute("migrate-incoming", {"uri": f"file:{path}"})
    assert_moved(source, b)


def test_migratectl_loads_a_file_and_reports(source: Site, make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "machine.state"
    source.qmp.execute("migrate", {"uri": f"file:{path}"})
    wait_status(source, {"completed"})
    ownership = source.qmp.execute("x-migrated-query-ownership")
    assert ownership["text"] == f"the machine was saved to file:{path}"
    empty = tmp_path / "empty"
    empty.touch()
    failed = migratectl(deferred(make_site, "C"), "incoming", f"file:{empty}")
    assert failed.returncode == 4, failed
    assert "The machine was not loaded from" in failed.stdout
    b = deferred(make_site)
    done = migratectl(b, "incoming", f"file:{path}")
    assert done.returncode == 0, done
    assert f"The machine is here, loaded from file:{path}; it is running" in done.stdout
    assert_moved(source, b)
    kept = migratectl(source, "release")
    assert (kept.returncode, kept.stdout.count("workload walker-A still maps it")) == (0, 1), kept


def test_half_a_file_is_no_machine(source: Site, make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "machine.state"
    source.qmp.execute("migrate", {"uri": f"file:{path}"})
    wait_status(source, {"completed"})
    os.truncate(path, path.stat().st_size // 2)
    b = deferred(make_site)
    failed = migratectl(b, "incoming", f"file:{path}")
    assert failed.returncode == 4, failed
    assert "  next step    migrate it again" in failed.stdout
    status = migratectl(b, "status").stdout
    assert "an arriving machine was loaded only in part" in status
    assert "cont" not in status.partition("next step")[2].partition("\n")[0]


def test_into_a_file_with_a_pause_before(source: Site, make_site: MakeSite, tmp_path: Path) -> None:
    uri = f"file:{tmp_path}/machine.state"
    pause = {"capability": "pause-before-switchover", "state": True}
    source.qmp.execute("migrate-set-capabilities", {"capabilities": [pause]})
    source.qmp.execute("migrate", {"uri": uri})
    wait_status(source, {"pre-switchover"})
    source.qmp.execute("migrate-continue", {"state": "pre-switchover"})
    wait_status(source, {"completed"})
    b = deferred(make_site)
    b.qmp.execute("migrate-incoming", {"uri": uri})
    assert_moved(source, b)


def test_a_file_with_an_offset_keeps_what_is_before_it(source: Site, make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "machine.state"
    path.write_bytes(b"header".ljust(4096, b"."))
    source.qmp.execute("migrate", {"uri": f"file:{path},offset=4k"})
    wait_status(source, {"completed"})
    assert path.read_bytes()[:6] == b"header"
    b = deferred(make_site)
    b.qmp.execute("migrate-incoming", {"uri": f"file:{path},offset=0x1000"})
    assert_moved(source, b)


def test_through_commands(source: Site, make_site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "machine.gz"
    # gzip is far slower than the walker writes.
    source.qmp.execute("migrate-set-parameters", {"downtime-limit": 60_000})
    source.qmp.execute("migrate", {"uri": f"exec:gzip -1 > {path}"})
    wait_status(source, {"completed"})
    b = deferred(make_site)
    b.qmp.execute("migrate-incoming", {"uri": f"exec:gzip -dc {path}"})
    assert_moved(source, b)


def test_a_file_that_cannot_be_written_resumes_the_source(source: Site) -> None:
    source.qmp.execute("migrate", {"uri": "file:/dev/full"})
    figures = wait_status(source, {"failed"})
    assert figures["x-migrated-outcome"] == "source-owns"
    assert_still_runs(source)


def test_a_command_that_fails_early_resumes_the_source(source: Site) -> None:
    source.qmp.execute("migrate", {"uri": "exec:exit 7"})
    assert wait_status(source, {"failed"})["x-migrated-outcome"] == "source-owns"
    assert_still_runs(source)


def test_descriptors_by_name(source: Site, make_site: MakeSite) -> None:
    b = deferred(make_site)
    ours, theirs = socket.socketpair()
    give(source, "out", ours)
    give(b, "in", theirs)
    b.qmp.execute("migrate-incoming", {"uri": "fd:in"})
    source.qmp.execute("migrate", {"uri": "fd:out"})
    wait_status(source, {"completed"})
    assert_moved(source, b)


def give(site: Site, name: str, sock: socket.socket) -> None:
    """Send a descriptor with ``getfd`` on a connection of its own, and close it here."""
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.connect(str(site.directory / "run" / "qmp.sock"))
        lines = qmp.makefile("rb")
        lines.readline()
        qmp.sendall(b'{"execute": "qmp_capabilities"}')
        lines.readline()
        command = b'{"execute": "getfd", "arguments": {"fdname": "%s"}}' % name.encode()
        socket.send_fds(qmp, [command], [sock.fileno()])
        assert b"return" in lines.readline()
    sock.close()


class FedSite(Site):
    """A site whose daemon inherits an open file as descriptor ``number``."""

    def __init__(self, directory: Path, file: Path, number: int) -> None:
        super().__init__("B", directory, ram_bytes=16 << 20, incoming=f"fd:{number}")
        self._command = f"exec {sys.executable} -m migrated --config {self.config} {number}< {file}"

    def _start_daemon(self) -> subprocess.Popen[str]:
        with self.log_path.open("w") as log:
            return self._own(subprocess.Popen(["/bin/sh", "-c", self._command], stdout=log, stderr=log, text=True))


@pytest.mark.parametrize("number", [0, 7])
def test_an_inherited_descriptor(source: Site, tmp_path: Path, number: int) -> None:
    path = tmp_path / "machine.state"
    source.qmp.execute("migrate", {"uri": f"file:{path}"})
    wait_status(source, {"completed"})
    with FedSite(tmp_path, path, number) as b:
        assert_moved(source, b)
        links = [os.readlink(one) for one in Path(f"/proc/{b.daemon.pid}/fd").iterdir()]
        assert str(path) not in links, "what was read is let go"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("carrier-pigeon:coop", "unknown migration protocol: carrier-pigeon:coop"),
        ("tcp:nowhere", "error parsing address 'nowhere'"),
    ],
)
def test_a_wrong_uri_is_refused_at_once(source: Site, uri: str, text: str) -> None:
    with pytest.raises(CommandError, match=text):
        source.qmp.execute("migrate", {"uri": uri})
    assert_still_runs(source)


def test_an_unknown_descriptor_fails_and_the_source_goes_on(source: Site) -> None:
    source.qmp.execute("migrate", {"uri": "fd:nothing"})
    figures = wait_status(source, {"failed"})
    assert "File descriptor named 'nothing' has not been found" in figures["error-desc"]
    assert run_state(source) == "running"

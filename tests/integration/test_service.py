"""The daemon as a service: signals, sd_notify, cleanliness, configuration check."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.demo.site import Site
from tests.integration.conftest import MakeSite
from tests.support.following import assert_still_runs, migrate, wait_status, wait_until

CONFIG_ERROR = 78


@pytest.fixture
def notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What systemd would read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify.sock"))
        sock.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify.sock"))
        yield sock


def wait_message(sock: socket.socket, part: str) -> str:
    while part not in (message := sock.recv(4096).decode()):
        continue
    return message


def test_ready_watchdog_status_stopping(
    make_site: MakeSite, notify: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    site = make_site("A")
    wait_message(notify, "READY=1")
    wait_message(notify, "WATCHDOG=1")
    site.qmp.execute("cont")
    wait_message(notify, "STATUS=")
    site.daemon.send_signal(signal.SIGTERM)
    wait_message(notify, "STOPPING=1")
    assert site.daemon.wait(30) == 0


def test_every_line_of_the_log_names_the_machine(pair: tuple[Site, Site]) -> None:
    a, b = pair
    migrate(a, b)
    with socket.create_connection(("127.0.0.1", int(b.address.rsplit(":", 1)[1]))):
        wait_until(lambda: "incoming_channel" in b.log_path.read_text(), "the stranger is noticed")
    for site in pair:
        site.daemon.terminate()
        assert site.daemon.wait(30) == 0
        lines = [json.loads(line) for line in site.log_path.read_text().splitlines()]
        assert lines
        assert {line.get("machine") for line in lines} == {"demo"}, lines


def test_a_clean_stop_leaves_the_workload_and_no_sockets(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    a.daemon.send_signal(signal.SIGTERM)
    assert a.daemon.wait(30) == 0
    assert not list((a.directory / "run").glob("*.sock"))
    assert a.walker.poll() is None


@pytest.mark.row(45)
def test_sigterm_during_precopy_resumes_and_ends(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"active"})
    a.restart_daemon(signal.SIGTERM)
    wait_until(lambda: a.qmp.execute("x-migrated-query-machine")["workloads"], "the walker re-attached")
    assert_still_runs(a)


@pytest.mark.row(39)
def test_two_daemons_cannot_share_a_machine(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    second = run("--config", str(a.config))
    assert second.returncode == 1
    assert str(a.daemon.pid) in second.stderr
    assert_still_runs(a)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrated", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_check_config(tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text('[machine]\ntype = "none"\n')
    good = run("--config", str(path), "--check-config")
    assert (good.returncode, good.stdout) == (0, f"{path}: OK (machine kv)\n")
    path.write_text('[machine]\ntyp = "none"\n')
    bad = run("--config", str(path), "--check-config")
    assert bad.returncode == CONFIG_ERROR
    assert "machine.typ" in bad.stderr
    assert "type" in bad.stderr


def test_a_descriptor_that_was_not_inherited_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text(f'[paths]\nruntime = "{tmp_path}/run"\nstate = "{tmp_path}/state"\n')
    result = run("--config", str(path), "--incoming", "fd:99")
    assert result.returncode == CONFIG_ERROR
    assert "no descriptor 99 was inherited" in result.stderr


def test_a_handler_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kv.toml"
    path.write_text(
        f'[paths]\nruntime = "{tmp_path}/run"\nstate = "{tmp_path}/state"\n[handlers]\nload = ["no.such:thing"]\n'
    )
    result = run("--config", str(path))
    assert result.returncode == CONFIG_ERROR
    assert "no.such:thing" in result.stderr


def test_the_daemon_starts_its_workload_once(tmp_path: Path, make_site: MakeSite) -> None:
    run_dir = tmp_path / "S" / "run"
    command = [sys.executable, "-m", "migrated.demo.walker", "--ram", str(4 << 20), "--name", "child"]
    command += ["--attach", str(run_dir / "attach.sock")]
    # Its end of file on stdin would end a walker at once.
    shell = f"exec {' '.join(command)} < <(sleep 1000)"
    site = make_site("S", module="", config=f"[workload]\ncommand = ['bash', '-c', '''{shell}''']\n")
    pid = int(wait_until(lambda: (run_dir / "workload.pid").read_text().split(), "the pid file")[0])
    try:
        wait_until(lambda: "child" in workload_names(site), "the child attached")
        site.restart_daemon(signal.SIGTERM)
        wait_until(lambda: "child" in workload_names(site), "the same child again")
        assert int((run_dir / "workload.pid").read_text().split()[0]) == pid
    finally:
        os.kill(pid, signal.SIGKILL)
        kill_children(pid)


def workload_names(site: Site) -> list[str]:
    return [workload["name"] for workload in site.qmp.execute("x-migrated-query-machine")["workloads"]]


def kill_children(pid: int) -> None:
    """End the sleep that held the walker's stdin open: it is in the session of the workload, which is its leader."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid:
            os.kill(int(stat.parent.name), signal.SIGKILL)

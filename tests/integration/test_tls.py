"""Two real daemons prove to each other who they are; whatever is wrong is said on both sides, and nothing moves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite
from tests.support.keys import Keys, tls

BLOCKS = {"heap": 1 << 20}
CONTENT = bytes(range(256)) * 64
Make = Callable[..., HoldingSite]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Return a function that starts a daemon with a machine, or (``waits``) without."""
    with ExitStack() as stack:

        def start(name: str, config: str, *, waits: bool = False, **options: Any) -> HoldingSite:
            incoming = "tcp:127.0.0.1:0" if waits else None
            site = HoldingSite(name, tmp_path, blocks=BLOCKS, incoming=incoming, config=config, **options)
            stack.enter_context(site)
            if not waits:
                site.poke("heap", 0, CONTENT)
            return site

        yield start


def lines(site: HoldingSite, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in site.log_path.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def wait_line(site: HoldingSite, event: str, count: int = 1) -> dict[str, Any]:
    wait_until(lambda: len(lines(site, event)) >= count, f"{event} of {site.name}")
    return lines(site, event)[-1]


def assert_moved(source: HoldingSite, target: HoldingSite) -> None:
    assert target.run_state() == "running"
    assert source.run_state() == "postmigrate"
    assert target.peek("heap").startswith(CONTENT)


def refused(source: HoldingSite, target: HoldingSite) -> tuple[str, str]:
    """Try to migrate; return what the source's operator is told, and what the destination's log says."""
    before = len(lines(target, "connection_refused"))
    told = str(source.migrate(target.address, "failed")["error-desc"])
    assert source.run_state() == "running"
    said = str(wait_line(target, "connection_refused", before + 1)["reason"])
    assert target.run_state() == "inmigrate"
    assert "status" not in target.query(), "no migration has begun there"
    return told, said


# -- good keys -----------------------------------------------------------------------------------------------------


def test_there_and_back(make: Make, keys: Keys) -> None:
    a = make("A", tls(keys.host("a"), '[peers]\nmay-receive = ["b"]'))
    b = make("B", tls(keys.host("b"), '[peers]\nmay-send = ["a"]'), waits=True)
    a.migrate(b.address)
    wait_until(lambda: b.run_state() == "running", "it runs")
    assert_moved(a, b)
    assert "a" in wait_line(b, "incoming_channel")["certificate"]
    a.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    b.migrate(a.address)
    wait_until(lambda: a.run_state() == "running", "it runs")
    assert_moved(b, a)


def test_postcopy_on_two_connections(make: Make, keys: Keys) -> None:
    a, b = make("A", tls(keys.host("c"))), make("B", tls(keys.host("d")), waits=True)
    for site in (a, b):
        for name in ("postcopy-ram", "postcopy-preempt"):
            site.capability(name)
    a.qmp.execute("migrate", {"uri": b.address})
    a.qmp.execute("migrate-start-postcopy")
    a.wait_status("completed")
    wait_until(lambda: b.run_state() == "running", "it runs")
    assert_moved(a, b)
    assert lines(b, "second_channel")


@pytest.mark.row(43)
def test_reload_takes_new_keys_and_keeps_old_ones_for_bad(make: Make, keys: Keys, tmp_path: Path) -> None:
    directory = keys.host("e", "127.0.0.1")
    a, b = make("A", tls(keys.host("f"))), make("B", tls(directory), waits=True)
    a.parameter("max-bandwidth", 1 << 16)
    a.qmp.execute("migrate", {"uri": b.address})
    a.wait_status("active")
    keys.host("e", "10.0.0.1", days=7.5, begins_in_days=-1, replace=True)
    b.daemon.send_signal(signal.SIGHUP)
    assert "10.0.0.1" in str(wait_line(b, "reloaded")["certificates"])
    assert wait_line(b, "certificate_expires")["within_days"] == 7
    (directory / "server-cert.pem").write_bytes((keys.host("g") / "server-cert.pem").read_bytes())
    b.daemon.send_signal(signal.SIGHUP)
    failed = wait_line(b, "reload_failed")
    assert "TLS-KEYS" in failed["error"]
    assert f"{directory}/server-key.pem is not the key of {directory}/server-cert.pem" in failed["error"]
    a.parameter("max-bandwidth", 0)
    a.wait_status("completed")  # the migration that was under way has noticed nothing
    assert_moved(a, b)
    a.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    b.migrate(a.address)
    told = str(a.migrate(b.address, "failed")["error-desc"])
    assert "TLS-NAME: it should be 127.0.0.1, and its certificate 'e' (for e, 10.0.0.1;" in told
    a.parameter("tls-hostname", "e")
    a.migrate(b.address)


def test_migratectl_check_meets_a_daemon_and_moves_nothing(make: Make, keys: Keys) -> None:
    b = make("B", tls(keys.host("h"), '[peers]\nmay-send = ["i"]'), waits=True)
    good = check(b, keys.host("i"))
    assert good.returncode == 0, good
    assert "trust each other: it is 'h' (for h, 127.0.0.1, localhost; valid " in good.stdout
    assert "'i'" in wait_line(b, "peer_checked")["certificate"]
    bad = check(b, keys.host("j"))
    assert bad.returncode == 4, bad
    assert "TLS-NOT-ALLOWED: the other side says: the certificate 'j'" in bad.stdout
    assert "status" not in b.query()


def check(site: HoldingSite, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrated.cli.app", "pki", "check", f"127.0.0.1:{site.port}"]
    command += ["--directory", str(directory), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


# -- bad ones ------------------------------------------------------------------------------------------------------


def test_who_is_not_on_the_list_sends_nothing(make: Make, keys: Keys) -> None:
    a, b = make("A", tls(keys.host("k"))), make("B", tls(keys.host("l"), '[peers]\nmay-send = ["a"]'), waits=True)
    told, said = refused(a, b)
    assert "TLS-NOT-ALLOWED: the other side says: the certificate 'k' (for k, 127.0.0.1, localhost; valid" in told
    assert "TLS-NOT-ALLOWED: the certificate 'k'" in said
    assert "none of its names is in [peers] may-send" in said


def test_another_authority(make: Make, keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other", "other CA")
    a, b = make("A", tls(other.host("m"))), make("B", tls(keys.host("n")), waits=True)
    told, said = refused(a, b)
    assert "TLS-CA: its certificate 'n' (" in told
    assert "does not come from the CA that is trusted here, 'other CA'" in told
    assert "TLS-CA: the other side refused our certificate 'n'" in said


def test_cleartext_to_a_daemon_with_keys_and_the_reverse(make: Make, keys: Keys) -> None:
    a, b = make("A", '[tls]\nmode = "off"'), make("B", tls(keys.host("o")), waits=True)
    told, said = refused(a, b)
    assert "TLS-CLEARTEXT: the destination takes machines under TLS only, and this came in cleartext" in told
    assert "TLS-CLEARTEXT: what comes is not TLS" in said
    a, b = make("C", tls(keys.host("p"))), make("D", '[tls]\nmode = "off"', waits=True)
    told = str(a.migrate(b.address, "failed")["error-desc"])
    assert "TLS-NOT-SPOKEN: the connection ended before the other side had proven who it is" in told
    assert a.run_state() == "running"
    wait_until(lambda: b.query().get("status") == "failed", "it is noticed")
    assert "TLS-NOT-SPOKEN: the source speaks TLS, and this daemon has no keys" in b.query()["error-desc"]

"""After the last byte and without an answer: the outcome is unknown, and nobody guesses ("the one rule")."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from migrated.control.commands import VERSION
from migrated.demo.site import Site
from migrated.errors import CommandError
from migrated.wire.preflight import Answer, answer_pieces
from migrated.wire.return_path import encode_preflight
from tests.integration.conftest import MakeSite
from tests.support.following import assert_still_runs, run_state, wait_status, wait_until
from tests.support.proxy import Proxy

#: What a destination says to a preflight when there is nothing to say.
READY = encode_preflight(*answer_pieces(Answer(str(VERSION["package"]), "demo", [])))
#: Five PONGs (magic, its greeting, its features, 1, 2) of eight bytes, and that: what comes after them is the answer.
BEFORE_BYTES = 40 + len(READY)


@pytest.fixture
def unknown(held_pair: tuple[Site, Site], link: Proxy) -> tuple[Site, Site]:
    """A hand-over whose answer was lost: the machine runs at B, and A does not know."""
    a, b = held_pair
    link.backward.limit, link.backward.at_limit = BEFORE_BYTES, "swallow"
    a.qmp.execute("migrate", {"uri": link.uri})
    b.wait_event("running")
    link.cut()
    wait_status(a, {"failed"})
    return a, b


def test_the_source_stays_stopped_and_says_so(unknown: tuple[Site, Site]) -> None:
    a, b = unknown
    figures = a.qmp.execute("query-migrate")
    assert figures["x-migrated-outcome"] == "unknown"
    assert "the outcome is unknown" in figures["error-desc"]
    assert "migratectl resolve" in figures["error-desc"]
    for command in ("cont", "migrate_cancel"):
        with pytest.raises(CommandError, match=r"the outcome is unknown.*Next: .*migratectl resolve"):
            a.qmp.execute(command)
    with pytest.raises(CommandError, match="the outcome is unknown"):
        a.qmp.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
    assert run_state(a) == "finish-migrate"
    assert a.qmp.execute("x-migrated-query-ownership")["record"] == "released"
    assert_still_runs(b)


def test_a_restarted_source_still_does_not_know(unknown: tuple[Site, Site]) -> None:
    a, b = unknown
    a.restart_daemon()
    assert run_state(a) == "finish-migrate"
    with pytest.raises(CommandError, match="the outcome is unknown"):
        a.qmp.execute("cont")
    assert_still_runs(b)


def test_an_operator_says_that_the_peer_runs(unknown: tuple[Site, Site]) -> None:
    a, b = unknown
    a.qmp.execute("x-migrated-resolve", {"peer-is-running": True})
    assert run_state(a) == "postmigrate"
    a.wait_event("moved")
    with pytest.raises(CommandError, match="the machine runs at"):
        a.qmp.execute("cont")
    b.qmp.execute("migrate", {"uri": a.address})
    wait_status(b, {"completed"})
    assert_still_runs(a)


def test_an_operator_says_that_the_peer_is_fenced(unknown: tuple[Site, Site]) -> None:
    a, b = unknown
    b.qmp.execute("stop")
    a.qmp.execute("x-migrated-resolve", {"peer-is-fenced": True})
    assert run_state(a) == "paused"
    a.qmp.execute("cont")
    assert_still_runs(a)


def test_resolve_wants_a_clear_word_and_something_to_resolve(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    with pytest.raises(CommandError, match="there is nothing to resolve"):
        a.qmp.execute("x-migrated-resolve", {"peer-is-fenced": True})
    with pytest.raises(CommandError, match="exactly one"):
        a.qmp.execute("x-migrated-resolve", {"peer-is-fenced": True, "peer-is-running": True})


def test_migratectl_exits_with_6(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    link.backward.limit, link.backward.at_limit = BEFORE_BYTES, "swallow"
    command = [sys.executable, "-m", "migrated.cli.app", "--socket", str(a.directory / "run" / "qmp.sock")]
    with subprocess.Popen([*command, "migrate", link.uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ctl:
        b.wait_event("running")
        link.cut()
        output, errors = ctl.communicate()
    assert ctl.returncode == 6, (output, errors)
    assert b"unknown" in output + errors


def test_a_destination_that_fails_late_resumes_the_source(held_pair: tuple[Site, Site], hold: Path) -> None:
    a, b = held_pair
    (hold / "hold-load").touch()
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until((hold / "loading").exists, "B loads")
    b.walker.kill()
    wait_until(lambda: b.qmp.execute("x-migrated-query-machine")["workloads"] == [], "B noticed")
    (hold / "hold-load").unlink()
    figures = wait_status(a, {"failed"})
    assert "walker-B" in figures["error-desc"]
    assert figures["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)


def test_nothing_is_resolved_while_the_answer_may_still_come(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    link.backward.limit, link.backward.at_limit = BEFORE_BYTES, "stall"
    a.qmp.execute("migrate", {"uri": link.uri})
    b.wait_event("running")
    for word in ("peer-is-running", "peer-is-fenced"):
        with pytest.raises(CommandError, match="its outcome is not unknown yet"):
            a.qmp.execute("x-migrated-resolve", {word: True})
    link.resume()
    assert wait_status(a, {"completed"})["x-migrated-outcome"] == "destination-owns"
    assert_still_runs(b)


def test_a_device_that_the_destination_lacks_is_no_unknown_outcome(make_site: MakeSite) -> None:
    a = make_site("A", module="tests.support.misbehave", walker_arguments=["--mode", "fail-on-load"])
    b = make_site("B")
    a.qmp.execute("cont")
    a.wait_event("running")
    b.qmp.execute("migrate-set-parameters", {"x-migrated-answer-timeout": 1000})
    a.qmp.execute("migrate", {"uri": b.address})
    figures = wait_status(a, {"failed"})
    assert "nothing here takes picky/0" in figures["error-desc"]
    assert figures["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)

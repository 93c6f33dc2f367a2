"""After the last byte and without an answer: nobody guesses, the source asks, and an operator may say what he knows."""

from __future__ import annotations

import signal
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
from tests.support.following import (
    assert_moved,
    assert_still_runs,
    migrate,
    record_of,
    run_state,
    wait_status,
    wait_until,
)
from tests.support.proxy import Proxy

COMMIT = bytes.fromhex("08 4d03 002a")
READY = bytes.fromhex("4d03 002a 01")
ACTIVE = bytes.fromhex("4d03 002a 02")
#: What a destination says to a preflight when there is nothing to say.
PREFLIGHTED = encode_preflight(*answer_pieces(Answer(str(VERSION["package"]), "demo", [])))
#: Five PONGs (magic, its greeting, its features, 1, 2) of eight bytes, that, and READY: what comes then is the answer.
HEARD_BYTES = 5 * 8 + len(PREFLIGHTED) + 4 + 42
NOWHERE = ("127.0.0.1", 1)


def lose(link: Proxy, word: bytes, *, way: str, to: tuple[str, int] | str = NOWHERE) -> None:
    """Cut the link before ``word`` passes; who connects afterwards gets ``to``."""
    direction = link.forward if way == "forward" else link.backward
    direction.cut_before = word
    link.target_after_cut = to


@pytest.fixture
def unknown(held_pair: tuple[Site, Site], link: Proxy) -> tuple[Site, Site]:
    """A hand-over whose answer was lost, over a link that stays away: the machine runs at B, and A does not know."""
    a, b = held_pair
    a.qmp.execute("migrate-set-parameters", {"x-migrated-answer-timeout": 1000})
    lose(link, ACTIVE, way="backward")
    a.qmp.execute("migrate", {"uri": link.uri})
    b.wait_event("running")
    wait_status(a, {"failed"})
    return a, b


def back(link: Proxy, site: Site) -> None:
    """The link is mended, and leads to the site, wherever it listens now."""
    link.target = ("127.0.0.1", int(site.address.rsplit(":", 1)[1]))


def outcome_at(site: Site) -> str:
    """Return who has the machine, by the report of the site's last migration."""
    return str(site.qmp.execute("x-migrated-query-history")[0]["outcome"])


def test_an_answer_that_got_lost_is_asked_for(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    lose(link, ACTIVE, way="backward", to=link.target)
    migrate(a, b, uri=link.uri)
    assert link.backward.hit.is_set()
    assert (record_of(a)["hold"], record_of(b)["hold"]) == ("moved", "owner")
    assert record_of(a)["epoch"] == record_of(b)["epoch"] == 2


def test_a_commit_that_got_lost_is_said_again(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    lose(link, COMMIT, way="forward", to=link.target)
    migrate(a, b, uri=link.uri)
    assert link.forward.hit.is_set()


def test_a_source_that_did_not_hear_that_all_is_ready_goes_on(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    lose(link, READY, way="backward")
    a.qmp.execute("migrate", {"uri": link.uri})
    assert wait_status(a, {"failed"})["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)
    wait_until(lambda: record_of(b)["hold"] == "prepared", "B holds what it has")
    migrate(a, b)  # which tells B that nothing came of the first


def test_the_end_of_the_link_is_mended_long_after(unknown: tuple[Site, Site], link: Proxy) -> None:
    a, b = unknown
    assert (record_of(a)["hold"], record_of(b)["hold"]) == ("released", "owner")
    back(link, b)
    wait_until(lambda: record_of(a)["hold"] == "moved", "A asked, and knows")
    a.wait_event("moved")
    assert run_state(a) == "postmigrate"
    assert a.qmp.execute("query-migrate")["x-migrated-outcome"] == "destination-owns"
    assert_still_runs(b)


@pytest.mark.parametrize("lost", [COMMIT, ACTIVE], ids=["commit", "answer"])
def test_a_source_that_is_started_again_asks(lost: bytes, held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    lose(link, lost, way="forward" if lost == COMMIT else "backward")
    a.qmp.execute("migrate", {"uri": link.uri})
    wait_until((link.forward if lost == COMMIT else link.backward).hit.is_set, "it is lost")
    a.restart_daemon()
    assert record_of(a)["hold"] == "released"
    back(link, b)
    wait_until(lambda: record_of(a)["hold"] == "moved", "A asked, and knows")
    assert_moved(a, b)


def test_a_destination_that_is_started_again_gives_the_machine_back(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    lose(link, COMMIT, way="forward")
    a.qmp.execute("migrate", {"uri": link.uri})
    wait_until(link.forward.hit.is_set, "the commit is lost")
    b.restart_daemon()
    assert record_of(b)["hold"] == "partial"
    back(link, b)
    figures = wait_status(a, {"failed"})
    assert "gives the machine back" in figures["error-desc"]
    assert figures["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)


def test_a_destination_whose_source_is_lost_for_good(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    lose(link, COMMIT, way="forward")
    a.qmp.execute("migrate", {"uri": link.uri})
    wait_until(link.forward.hit.is_set, "the commit is lost")
    a.daemon.send_signal(signal.SIGKILL)
    a.daemon.wait()
    a.stop_walker()
    ownership = b.qmp.execute("x-migrated-query-ownership")
    assert "has not said that it lets go" in ownership["text"]
    with pytest.raises(CommandError, match=r"has not said that it lets go.*resolve --peer-is-fenced"):
        b.qmp.execute("cont")
    b.qmp.execute("x-migrated-resolve", {"peer-is-fenced": True})
    assert run_state(b) == "paused"
    assert record_of(b)["hold"] == "owner"
    b.qmp.execute("cont")
    assert_still_runs(b)


def test_an_operator_knows_that_the_source_kept_it(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    lose(link, READY, way="backward")
    a.qmp.execute("migrate", {"uri": link.uri})
    wait_status(a, {"failed"})
    wait_until(lambda: record_of(b)["hold"] == "prepared", "B holds what it has")
    b.qmp.execute("x-migrated-resolve", {"peer-is-running": True})
    assert record_of(b)["hold"] == "partial"
    migrate(a, b)


def test_the_source_stays_stopped_and_says_so(unknown: tuple[Site, Site]) -> None:
    a, b = unknown
    figures = a.qmp.execute("query-migrate")
    assert figures["x-migrated-outcome"] == "unknown"
    assert "the outcome is unknown" in figures["error-desc"]
    assert "migratectl resolve" in figures["error-desc"]
    assert "keeps asking" in figures["error-desc"]
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
    assert outcome_at(a) == "unknown"
    with pytest.raises(CommandError, match="the outcome is unknown"):
        a.qmp.execute("cont")
    assert_still_runs(b)


def test_an_operator_says_that_the_peer_runs(unknown: tuple[Site, Site]) -> None:
    a, b = unknown
    assert outcome_at(a) == "unknown"
    a.qmp.execute("x-migrated-resolve", {"peer-is-running": True})
    assert run_state(a) == "postmigrate"
    wait_until(lambda: outcome_at(a) == "destination-owns", "the report is corrected")
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
    wait_until(lambda: outcome_at(a) == "source-owns", "the report is corrected")
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
    a.qmp.execute("migrate-set-parameters", {"x-migrated-answer-timeout": 1000})
    lose(link, ACTIVE, way="backward")
    command = [sys.executable, "-m", "migrated.cli.app", "--socket", str(a.directory / "run" / "qmp.sock")]
    with subprocess.Popen([*command, "migrate", link.uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ctl:
        b.wait_event("running")
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
    link.backward.limit, link.backward.at_limit = HEARD_BYTES, "stall"
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

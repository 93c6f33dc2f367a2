"""The fault matrix (docs/fault-matrix.md): each test names its row, breaks something at one phase, and says who owns.

The rule of the file: a fault is at a named point, between two acts (`migrated.migration.faultpoint`), never at a time.
Every test ends in `Stage.check`: one host runs the machine, the other one knows, each step was taken once, the memory
is whole, and nobody was asked. Pairs of daemons are used again as long as a test leaves them whole.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support import craft
from tests.support.following import record_of, run_state
from tests.support.stage import FaultySite, Stage, refused
from tests.support.visit import Visit, messages

row = pytest.mark.row
both_ways = pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
PRECOPY, POSTCOPY = False, True


def at(*cases: tuple[object, ...]) -> pytest.MarkDecorator:
    """Parametrize with a point, a mode, and what else the test takes; what is not listed the nemesis plays."""
    names = ("point", "postcopy", "owner", "way")[: len(cases[0])]
    ids = ["-".join("postcopy" if value is True else str(value) for value in case if value) for case in cases]
    return pytest.mark.parametrize(names, cases, ids=ids)


#: A message of the return path, and what it says.
HANDOVER, REFUSED, WHOLE = 0x4D03, 3, 4


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Stage]]:
    """Return a function that returns a stage: the last one, if its test left it whole."""
    with ExitStack() as stack:
        last: list[Stage] = []

        def stage() -> Stage:
            if not last or not last[0].whole:
                stack.close()
                last[:] = [stack.enter_context(Stage(tmp_path_factory.mktemp("stage")))]
            return last[0]

        yield stage


@pytest.fixture
def stage(stages: Callable[[], Stage]) -> Stage:
    return stages()


def site_at(stage: Stage, point: str) -> FaultySite:
    """Return the site whose daemon comes to a point."""
    records_of_target = ("record.prepared", "record.owner", "record.incomplete", "record.partial")
    return stage.target if point.startswith("target.") or point in records_of_target else stage.source


def lead_to(stage: Stage, point: str, action: str = "hold", *, postcopy: bool = False) -> FaultySite:
    """Begin a migration, and let that happen at the point; return whom it happens to once it has."""
    site = site_at(stage, point)
    if postcopy:
        # So that it is asked for before the first pass, which would do.
        stage.source.arm("source.setup", "hold")
    site.arm(point, action)
    stage.begin(postcopy=postcopy)
    if postcopy and point != "source.setup":
        stage.source.wait_held("source.setup")
        stage.source.let_go("source.setup")
    {"hold": lambda: site.wait_held(point), "kill": site.wait_killed, "stop": site.wait_stopped}[action]()
    return site


# -- killed ----------------------------------------------------------------------------------------------------


@row(1)
@pytest.mark.parametrize("point", ["source.setup", "source.pass", "target.load"])
def test_row_01_destination_killed_before_the_switchover(point: str, stage: Stage) -> None:
    lead_to(stage, point)
    stage.kill(stage.target)
    stage.source.let_go(point)
    stage.wait_status(stage.source, "failed")
    assert run_state(stage.source) == "running"
    stage.heal()
    stage.check("source")


@row(2)
@pytest.mark.parametrize("point", ["source.setup", "source.pass"])
def test_row_02_source_killed_before_the_switchover(point: str, stage: Stage) -> None:
    lead_to(stage, point, "kill")
    if point != "source.setup":  # to the destination that was a stranger
        stage.wait_status(stage.target, "failed")
    stage.heal()
    stage.check("source")


@row(3)
@at(("source.stopped", PRECOPY), ("source.sent", PRECOPY), ("source.sent", POSTCOPY))
def test_row_03_source_killed_while_the_machine_stands_still(point: str, postcopy: bool, stage: Stage) -> None:
    lead_to(stage, point, "kill", postcopy=postcopy)
    stage.nobody_runs()  # no timer starts it
    stage.heal()
    stage.check("source")


@row(4)
@at(("record.prepared", PRECOPY), ("target.write-prepared", POSTCOPY), ("target.send-ready", PRECOPY))
def test_row_04_destination_killed_before_the_commit(point: str, postcopy: bool, stage: Stage) -> None:
    lead_to(stage, point, "kill", postcopy=postcopy)
    stage.heal()
    stage.check("source")


@row(5)
@pytest.mark.parametrize("point", ["source.write-released", "source.send-commit", "source.write-moved"])
def test_row_05_source_killed_behind_released(point: str, stage: Stage) -> None:
    lead_to(stage, point, "kill")
    stage.heal()
    stage.check("target")


@row(5)
def test_row_05_source_killed_behind_released_in_postcopy(stage: Stage) -> None:
    """The memory that was to follow went with the process: the destination gives the machine back."""
    lead_to(stage, "source.write-released", "kill", postcopy=True)
    stage.nobody_runs()
    stage.heal()
    stage.check("source")


@row(6)
@both_ways
def test_row_06_destination_killed_before_owner_is_durable(postcopy: bool, stage: Stage) -> None:
    lead_to(stage, "record.incomplete" if postcopy else "record.owner", "kill", postcopy=postcopy)
    stage.nobody_runs()
    stage.heal()
    stage.check("source")


@row(6)
@pytest.mark.parametrize("point", ["target.write-owner", "target.run", "target.send-active"])
def test_row_06_destination_killed_once_owner_is_durable(point: str, stage: Stage) -> None:
    lead_to(stage, point, "kill")
    stage.heal()
    stage.check("target")


@row(7, 38)
def test_row_07_destination_lost_behind_active(stage: Stage) -> None:
    """The copy at the source is out of date, and never runs: not when it is asked to, nor after a restart."""
    site = lead_to(stage, "target.send-active", "kill")
    stage.wait_status(stage.source, "completed")
    for _ in range(2):
        assert stage.source.hold() == "moved"
        assert "the machine runs at" in refused(stage.source, "cont")
        assert run_state(stage.source) == "postmigrate"
        stage.restart(stage.source)
    assert not site.alive
    stage.heal()
    stage.check("target")


@row(8, 10)
def test_row_08_source_lost_in_postcopy(stage: Stage) -> None:
    """Who waits for a page goes on waiting, and nothing is made up."""
    lead_to(stage, "source.background", postcopy=True)
    stage.target.wait_event("running")
    stage.kill(stage.source)
    stage.wait_status(stage.target, "postcopy-paused")
    assert stage.target.hold() == "incomplete"
    stage.restart(stage.source)
    assert stage.source.hold() == "moved"
    assert "the machine runs at" in refused(stage.source, "cont")
    assert stage.target.status()["status"] == "postcopy-paused"


@row(9, 11, 30)
def test_row_09_destination_lost_in_postcopy(stage: Stage) -> None:
    """The source keeps what it has, and does not run it; nor does the destination after a restart."""
    lead_to(stage, "source.background", postcopy=True)
    stage.target.wait_event("running")
    stage.kill(stage.target)
    stage.source.let_go("source.background")
    stage.wait_status(stage.source, "postcopy-paused")
    assert stage.source.hold() == "moved"
    assert "the machine runs at" in stage.source.qmp.execute("x-migrated-query-ownership")["text"]
    refused(stage.source, "cont")
    stage.target.restart_daemon()
    assert stage.target.hold() == "incomplete"
    assert run_state(stage.target) == "io-error"
    assert "stands still for good" in refused(stage.target, "cont")


# -- cut -------------------------------------------------------------------------------------------------------


@row(13)
@at(
    ("source.setup", PRECOPY),
    ("source.pass", PRECOPY),
    ("target.load", PRECOPY),
    ("source.stopped", PRECOPY),
    ("source.stopped", POSTCOPY),
    ("target.write-prepared", PRECOPY),
    ("target.write-prepared", POSTCOPY),
)
def test_row_13_reset_before_ready(point: str, postcopy: bool, stage: Stage) -> None:
    site = lead_to(stage, point, postcopy=postcopy)
    stage.link.cut()
    stage.wait_status(stage.source if site is stage.target else stage.target, "failed")
    stage.heal()
    stage.check("source")


@row(14)
@pytest.mark.parametrize("point", ["source.setup", "source.pass"])
def test_row_14_silence_before_the_switchover(point: str, stage: Stage) -> None:
    site = lead_to(stage, point)
    stage.silence("forward", "backward")
    site.let_go(point)
    stage.wait_status(stage.source, "failed")
    if point != "source.setup":  # to the destination that was a stranger
        stage.wait_status(stage.target, "failed")
    stage.heal()
    stage.check("source")


@row(15)
@at(("source.stopped", PRECOPY), ("target.write-prepared", PRECOPY), ("target.write-prepared", POSTCOPY))
def test_row_15_silence_in_the_switchover(point: str, postcopy: bool, stage: Stage) -> None:
    site = lead_to(stage, point, postcopy=postcopy)
    stage.silence("forward", "backward")
    site.let_go(point)
    stage.wait_status(stage.source, "failed")
    assert run_state(stage.source) == "running"
    stage.heal()
    stage.check("source")


@row(16)
@both_ways
def test_row_16_silence_between_commit_and_owner(postcopy: bool, stage: Stage) -> None:
    """Nobody runs, both say so, and the link's return is all that is needed."""
    site = lead_to(stage, "source.write-released", postcopy=postcopy)
    stage.silence("forward", "backward")
    site.let_go("source.write-released")
    stage.wait_status(stage.source, "postcopy-paused" if postcopy else "failed")
    stage.nobody_runs()
    assert (stage.source.hold(), stage.target.hold()) == ("released", "prepared")
    refused(stage.source, "cont")
    assert "the outcome is unknown" in stage.source.qmp.execute("x-migrated-query-ownership")["text"]
    assert "has not said that it lets go" in refused(stage.target, "cont")
    stage.heal()
    stage.check("target")


@row(17)
@pytest.mark.parametrize("way", ["reset", "backward"])
@pytest.mark.parametrize("point", ["source.write-released", "source.background", "target.background"])
def test_row_17_cut_in_postcopy(point: str, way: str, stage: Stage) -> None:
    """It pauses and goes on by itself; also where all has arrived, and only the word that it has got lost."""
    site = lead_to(stage, point, postcopy=True)
    if way == "reset":
        stage.link.cut()
        site.let_go(point)
    else:
        stage.silence(way)
        site.let_go(point)
        stage.wait_status(stage.source, "postcopy-paused")
    stage.heal()
    stage.check("target")


@row(17)
def test_row_17_a_destination_that_has_forgotten_gives_nothing_back(stage: Stage) -> None:
    """It has run: whoever answers in its place, and says that it never did, does not make the source run it again."""
    lead_to(stage, "target.background", postcopy=True)
    stage.silence("backward")
    stage.target.let_go("target.background")
    stage.wait(lambda: stage.target.hold() == "owner", "all has arrived")
    stage.wait_status(stage.source, "postcopy-paused")
    stage.kill(stage.target)
    (stage.target.directory / "state" / "ownership.json").unlink()
    stage.target.restart_daemon()
    stage.moved_to(stage.target)
    stage.mend_link()
    stage.wait(lambda: '"answer": "refused"' in stage.target.log_path.read_text(), "it has said so")
    assert stage.source.hold() == "moved"
    assert run_state(stage.source) != "running"
    assert stage.source.status()["status"].startswith("postcopy")


@row(16, 21)
def test_row_16_strangers_while_the_commit_is_missing(stage: Stage) -> None:
    """Who fails beside it changes nothing for what is waited for."""
    site = lead_to(stage, "source.write-released")
    stage.silence("forward", "backward")
    site.let_go("source.write-released")
    stage.wait_status(stage.source, "failed")
    record = record_of(stage.target)
    assert record["hold"] == "prepared"
    for noise in (b"GET / HTTP/1.1\r\n\r\n", craft.header(), craft.join(craft.machine({}, {})[:4]) + b"\x7f"):
        with Visit(_port(stage.target)) as stranger:
            stranger.say(noise, end=True)
            stranger.hear()
        assert record_of(stage.target) == record
    stage.heal()
    stage.check("target")


@row(19)
@at(
    ("source.stopped", PRECOPY, "source", "forward"),
    ("source.stopped", POSTCOPY, "source", "backward"),
    ("target.write-prepared", PRECOPY, "target", "forward"),  # it is heard that all is ready: the source lets go
    ("target.write-prepared", POSTCOPY, "source", "backward"),
    ("source.write-released", POSTCOPY, "target", "forward"),
    ("source.write-released", PRECOPY, "target", "backward"),
)
def test_row_19_one_direction_goes_silent(point: str, owner: str, way: str, postcopy: bool, stage: Stage) -> None:
    site = lead_to(stage, point, postcopy=postcopy)
    stage.silence(way)
    site.let_go(point)
    stage.wait_status(stage.source, "failed", "postcopy-paused")
    stage.heal()
    stage.check(owner)


@row(23)
def test_row_23_what_was_said_before_changes_nothing(stage: Stage) -> None:
    """A commit, an offer, a whole migration that is said again: the machine is where it is, once."""
    stage.begin()
    here = stage.check("target")
    record = record_of(here)
    migration_id = record["migration_id"].encode()
    lead = craft.header() + craft.configuration() + craft.open_return_path(craft.OUR_PING)
    for name, answer in ((migration_id, WHOLE), (b"never heard of", REFUSED)):
        commit = craft.commit(name, record["epoch"])
        # Behind the greeting and its features: a word about a hand-over, and which.
        with Visit(_port(here)) as peer:
            peer.say(lead + commit)
            body = bytes([answer]) + craft.name(name) + craft.number(record["epoch"], 8)
            assert list(messages(peer.hear()))[-1] == (HANDOVER, body)
        assert record_of(here) == record
    stage.begin()
    there = stage.check("target")
    # Where it was and is not any more, whoever offers it once more is refused.
    record = record_of(here)
    with Visit(_port(here)) as peer:
        peer.say(lead + craft.offer(migration_id, 1 << 40), end=True)
        assert b"an offer that was taken before" in peer.hear()
    assert record_of(here) == record
    assert run_state(there) == "running"


def _port(site: FaultySite) -> int:
    return int(site.address.rsplit(":", 1)[1])


# -- disks -----------------------------------------------------------------------------------------------------


@row(31, 32)
@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
@at(
    ("record.released", PRECOPY),
    ("record.released", POSTCOPY),
    ("record.prepared", PRECOPY),
    ("record.owner", PRECOPY),
    ("record.incomplete", POSTCOPY),
)
def test_row_31_the_record_cannot_be_written(point: str, code: str, postcopy: bool, stage: Stage) -> None:
    """Nobody acts on what is not on the disk: the machine stays, and moves when there is room again."""
    site_at(stage, point).arm(point, f"fail {code}")
    stage.source.arm("source.setup", "hold")
    stage.begin(postcopy=postcopy)
    stage.source.wait_held("source.setup")
    stage.source.let_go("source.setup")
    stage.wait_status(stage.source, "failed")
    stage.check("source")
    stage.begin(postcopy=postcopy)
    stage.check("target")


@row(33)
def test_row_33_the_record_cannot_be_read(stage: Stage) -> None:
    """The daemon does not start, and says why; the workload keeps running."""
    stage.whole = False
    path = stage.source.directory / "state" / "ownership.json"
    record = path.read_bytes()
    stage.kill(stage.source)
    path.write_bytes(b"\0" * len(record))
    command = [sys.executable, "-m", "migrated", "--config", str(stage.source.config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "ownership record cannot be read" in done.stderr
    before = stage.source.check()["steps"]
    assert stage.source.check()["steps"] > before
    path.write_bytes(record)
    stage.heal()
    stage.check("source")


# -- operators -------------------------------------------------------------------------------------------------


@row(36, 37)
def test_row_37_two_migrations_of_one_machine(stage: Stage) -> None:
    """There, and there once more, elsewhere, and back at the same time: one is under way, the others are told."""
    lead_to(stage, "source.pass")
    for uri in (stage.uri, "tcp:127.0.0.1:1"):
        assert "There's a migration process in progress" in refused(stage.source, "migrate", uri=uri)
    refused(stage.target, "migrate", uri=stage.source.address)
    stage.source.let_go("source.pass")
    stage.check("target")
    assert "due to previous migration" in refused(stage.target, "migrate", uri=stage.source.address)


@row(40)
@at(
    ("source.setup", PRECOPY),
    ("source.stopped", PRECOPY),
    ("target.write-prepared", PRECOPY),
    ("target.write-prepared", POSTCOPY),
)
def test_row_40_cancelled_before_the_commit(point: str, postcopy: bool, stage: Stage) -> None:
    lead_to(stage, point, postcopy=postcopy)
    if stage.source.status()["status"].startswith("postcopy"):
        assert "cannot cancel" in refused(stage.source, "migrate_cancel")
        stage.link.cut()
    else:
        for _ in range(2):
            stage.source.qmp.execute("migrate_cancel")
    stage.wait_status(stage.source, "cancelled", "failed")
    stage.heal()
    stage.check("source")


@row(40)
@at(("source.write-released", PRECOPY), ("target.write-owner", PRECOPY), ("target.write-owner", POSTCOPY))
def test_row_40_cancelled_behind_the_commit(point: str, postcopy: bool, stage: Stage) -> None:
    """The answer says that it is too late, and who decides."""
    site = lead_to(stage, point, postcopy=postcopy)
    for _ in range(2):
        why = refused(stage.source, "migrate_cancel")
        assert "cannot cancel" in why or "only the destination's answer" in why or "the outcome is unknown" in why
    site.let_go(point)
    stage.check("target")


# -- stopped for longer than anybody waits ---------------------------------------------------------------------


@row(42)
@at(
    ("source.pass", PRECOPY, "source"),
    ("source.stopped", POSTCOPY, "source"),
    ("source.sent", PRECOPY, ""),  # the destination is ready meanwhile, and waits: either may have it
    ("source.write-released", PRECOPY, "target"),
    ("source.write-released", POSTCOPY, "target"),
    ("source.send-commit", PRECOPY, "target"),
)
def test_row_42_source_stopped_and_continued(point: str, owner: str, postcopy: bool, stage: Stage) -> None:
    lead_to(stage, point, "stop", postcopy=postcopy)
    if owner == "source":
        stage.wait_status(stage.target, "failed")
    else:
        stage.wait(lambda: stage.target.hold() in ("prepared", "incomplete", "owner"), "the destination waits, or runs")
    stage.heal()
    stage.check(owner)


@row(42)
@at(
    ("target.load", PRECOPY, "source"),
    ("record.prepared", PRECOPY, "source"),
    ("target.write-prepared", POSTCOPY, "source"),
    ("record.owner", PRECOPY, "target"),
    ("record.incomplete", POSTCOPY, "target"),
    ("target.write-owner", PRECOPY, "target"),
    ("target.run", POSTCOPY, "target"),
)
def test_row_42_destination_stopped_and_continued(point: str, owner: str, postcopy: bool, stage: Stage) -> None:
    lead_to(stage, point, "stop", postcopy=postcopy)
    stage.wait_status(stage.source, "failed", "postcopy-paused")
    if owner == "source":
        assert run_state(stage.source) == "running"
    stage.heal()
    stage.check(owner)

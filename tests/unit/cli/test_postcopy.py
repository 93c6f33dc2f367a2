"""Postcopy at `migratectl`: the moment of the switch, pauses, recovery, faults."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from migrated.cli.postcopy import (
    DEFAULT_MOMENT,
    Moment,
    describe_blocktime,
    describe_faults,
    give_value,
    is_source,
    last_address,
    next_step,
    parse_moment,
    pause_note,
)
from migrated.cli.progress import progress_line, read_progress
from migrated.cli.report import recovery_lines, status_lines
from migrated.errors import CommandError
from migrated.model.runstate import RunState
from tests.unit.cli.conftest import Ctl, Ran, finish

PEER = {"address": "10.0.0.7:7400", "kind": "migrated"}
RAM = {"total": 1 << 30, "remaining": 1 << 28, "transferred": 3 << 28, "page-size": 4096, "dirty-sync-count": 1}
NONE = {"count": 0, "p50-us": 0, "p99-us": 0, "max-us": 0, "buckets": []}
FAULTS = {
    "requests": 10,
    "remote": {"count": 10, "p50-us": 330, "p99-us": 2733, "max-us": 2810, "buckets": [0, 10]},
    "in-flight": {**NONE, "count": 3},
    "local": {**NONE, "count": 2},
}
ACTIVE: dict[str, Any] = {
    "status": "active", "ram": RAM, "total-time": 1000, "x-migrated-passes": [], "x-migrated-outcome": "source-owns",
    "x-migrated-peer": PEER, "expected-downtime": 300, "x-migrated-dirty-rate-bps": 1 << 20,
}  # fmt: skip
PASS = {"pass": 1, "sent-bytes": 1 << 30, "dirtied-bytes": 1 << 20, "ms": 1000.0}
STUCK = {**ACTIVE, "x-migrated-convergence": {"converging": False, "text": "too fast", "suggestions": []}}
POSTCOPY = {
    **ACTIVE,
    "status": "postcopy-active",
    "x-migrated-outcome": "destination-owns",
    "x-migrated-faults": FAULTS,
}
PAUSED = {**POSTCOPY, "status": "postcopy-paused", "error-desc": "the link was cut"}
COMPLETED: dict[str, Any] = {
    "status": "completed", "ram": {**RAM, "remaining": 0}, "total-time": 1000, "downtime": 12,
    "x-migrated-outcome": "destination-owns", "x-migrated-peer": PEER, "x-migrated-faults": FAULTS,
    "x-migrated-passes": [],
}  # fmt: skip
START = ("start_postcopy",)


def on(ctl: Ctl) -> bool:
    return ctl.migrator.capabilities.all()["postcopy-ram"]


# migrate --postcopy


@pytest.mark.parametrize(
    ("words", "moment"),
    [
        (["u", "--postcopy"], ["u", f"--postcopy={DEFAULT_MOMENT}"]),
        (["--postcopy", "u"], [f"--postcopy={DEFAULT_MOMENT}", "u"]),
        (["--postcopy", "when-stuck", "u"], ["--postcopy=when-stuck", "u"]),
        (["--postcopy=at-once", "u"], ["--postcopy=at-once", "u"]),
        (["u"], ["u"]),
    ],
)
def test_the_option_may_stand_alone(words: list[str], moment: list[str]) -> None:
    assert give_value(words) == moment


def test_moments() -> None:
    assert parse_moment(DEFAULT_MOMENT) == parse_moment("after-pass") == Moment("after-pass", 1)
    for text in ("", "later", "after-pass:0", "after-pass:x", "at-once:1"):
        with pytest.raises(ValueError, match="is not at-once, after-pass:N or when-stuck"):
            parse_moment(text)


@pytest.mark.parametrize(
    ("moment", "info", "come"),
    [
        ("at-once", {"status": "setup"}, True),
        ("at-once", {"status": "completed"}, False),
        ("after-pass:1", ACTIVE, False),
        ("after-pass:1", {**ACTIVE, "x-migrated-passes": [PASS]}, True),
        ("after-pass:2", {**ACTIVE, "x-migrated-passes": [PASS]}, False),
        ("after-pass:2", {"status": "active", "ram": {"dirty-sync-count": 3}}, True),
        ("when-stuck", ACTIVE, False),
        ("when-stuck", STUCK, True),
        ("when-stuck", {**STUCK, "status": "pre-switchover"}, False),
    ],
)
def test_when_a_moment_has_come(moment: str, info: dict[str, Any], come: bool) -> None:
    assert parse_moment(moment).has_come(info) is come


async def test_a_switch_in_its_moment(ctl: Ctl) -> None:
    ctl.migrator.script = [ACTIVE, ACTIVE, {**ACTIVE, "x-migrated-passes": [PASS]}, POSTCOPY, COMPLETED]
    ran = await ctl.run("migrate", "tcp:10.0.0.7:7400", "--postcopy")
    assert ran.code == 0, ran
    assert ctl.migrator.calls == [("migrate", "tcp:10.0.0.7:7400", False), START]
    assert not on(ctl), "it was off before"
    assert ran.out.splitlines() == [
        "active: 75% of 1 GiB, pass 1, 768 MiB sent, 256 MiB left, dirtied 1 MiB/s, expected downtime 300 ms",
        "Switching to postcopy: the machine moves, its memory follows, unless the rest fits the downtime limit",
        "postcopy-active: 75% of 1 GiB, 768 MiB sent, 256 MiB left, 10 faults (p50 0.33 ms, p99 2.73 ms)",
        "The machine is at 10.0.0.7:7400 now, and its memory follows: no way back",
        "completed: 100% of 1 GiB, 768 MiB sent, 0 B left, 10 faults (p50 0.33 ms, p99 2.73 ms)",
        "Migration completed (peer 10.0.0.7:7400)",
        "  total time   1 s",
        "  downtime     12 ms",
        "  transferred  768 MiB for 1 GiB of RAM",
        "  throughput   768 MiB/s",
        (
            "  faults       10 waited for the source (p50 0.33 ms, p99 2.73 ms, max 2.81 ms),"
            " 3 for a page that was on its way, 2 found the page here"
        ),
    ]


async def test_what_was_on_stays_on(ctl: Ctl) -> None:
    ctl.migrator.set_capabilities({"postcopy-ram": True})
    ctl.migrator.script = [ACTIVE, STUCK, POSTCOPY, COMPLETED]
    ran = await ctl.run("migrate", "--postcopy=when-stuck", "tcp:h:1", "--json")
    assert (ran.code, ran.json["faults"]) == (0, FAULTS)
    assert on(ctl)


async def test_without_a_wait_only_at_once(ctl: Ctl) -> None:
    ctl.migrator.info = ACTIVE
    ran = await ctl.run("migrate", "--postcopy", "--detach", "tcp:h:1")
    assert ran.code == 2
    assert "nobody waits for the moment with --detach" in ran.err
    ran = await ctl.run("migrate", "--postcopy=soon", "tcp:h:1")
    assert ran.code == 2
    assert ctl.migrator.calls == []
    assert (await ctl.run("migrate", "--postcopy=at-once", "--detach", "tcp:h:1")).code == 0
    assert ctl.migrator.calls == [("migrate", "tcp:h:1", False), START]
    assert on(ctl), "the migration goes on"


async def test_a_refused_migration_leaves_the_capability_as_it_was(ctl: Ctl) -> None:
    ctl.migrator.refusal = CommandError("not now")
    assert await ctl.run("migrate", "--postcopy", "tcp:h:1") == Ran(3, "", "migratectl: not now [command-refused]\n")
    assert not on(ctl)


async def test_a_switch_that_was_not_needed_is_told_of(ctl: Ctl) -> None:
    without = {name: value for name, value in COMPLETED.items() if name != "x-migrated-faults"}
    ctl.migrator.script = [ACTIVE, without]
    ran = await ctl.run("migrate", "--postcopy=at-once", "tcp:h:1")
    assert ran.out.splitlines()[-1] == "  postcopy     not needed: what was left fitted the downtime limit"


# Pauses and Ctrl-C


async def test_a_pause_says_what_comes_next_and_is_waited_for(ctl: Ctl) -> None:
    again = {**PAUSED, "error-desc": "Connection refused"}
    ctl.migrator.script = [POSTCOPY, PAUSED, PAUSED, again, POSTCOPY, COMPLETED]
    ran = await ctl.run("migrate", "tcp:10.0.0.7:7400")
    assert ran.code == 0
    assert ran.out.count("Paused: the link was cut. Nothing is lost") == 1
    assert "Next: this host connects to 10.0.0.7:7400 again by itself" in ran.out
    assert ran.out.count("Still paused: Connection refused") == 1
    assert ran.out.count("Connected again") == 1


async def test_ctrl_c_in_postcopy_leaves_and_cancels_nothing(ctl: Ctl) -> None:
    ctl.migrator.info = POSTCOPY
    process = await ctl.start("migrate", "tcp:h:1")
    assert process.stdout is not None
    while b"no way back" not in (line := await process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    ran = await finish(process)
    assert ran.code == 130
    assert "Postcopy cannot be cancelled: the migration goes on; 'migratectl status' shows how" in ran.out
    assert ctl.migrator.calls == [("migrate", "tcp:h:1", False)]


async def test_a_failure_after_the_hand_over(ctl: Ctl) -> None:
    ctl.migrator.script = [POSTCOPY, {**POSTCOPY, "status": "failed", "error-desc": "lost"}]
    ctl.migrator.record = {"record": "moved", "text": "x", "next-step": "look there"}
    ran = await ctl.run("migrate", "tcp:h:1")
    assert ran.code == 5
    assert "Migration failed; the destination owns the machine" in ran.out


# start-postcopy, pause, recover


@pytest.mark.parametrize(("word", "call"), [("start-postcopy", START), ("pause", ("pause",))])
async def test_commands_without_a_wait(ctl: Ctl, word: str, call: tuple[str]) -> None:
    ctl.migrator.info = POSTCOPY
    assert (await ctl.run(word)).code == 0
    assert ctl.migrator.calls == [call]


async def test_recover_at_the_source(ctl: Ctl) -> None:
    ctl.migrator.script = [PAUSED, PAUSED, {**POSTCOPY, "status": "postcopy-recover"}, POSTCOPY, COMPLETED]
    ran = await ctl.run("recover")
    assert ran.code == 0, ran
    assert ctl.migrator.calls == [("migrate", "tcp:10.0.0.7:7400", True)]
    assert ran.out.startswith("Connecting to tcp:10.0.0.7:7400, which must wait there")
    assert "Migration completed" in ran.out
    assert "Paused:" not in ran.out


async def test_recover_at_the_source_elsewhere_as_often_as_it_takes(ctl: Ctl) -> None:
    ctl.migrator.script = [PAUSED] * 14 + [POSTCOPY, COMPLETED]
    ran = await ctl.run("recover", "tcp:10.0.0.8:1", "--json")
    assert ran.json["exit-code"] == 0
    assert ctl.migrator.calls == [("migrate", "tcp:10.0.0.8:1", True)] * 2


async def test_recover_without_a_pause_is_refused_by_the_daemon(ctl: Ctl) -> None:
    ctl.migrator.refusal = CommandError("Cannot resume if there is no paused migration")
    ctl.migrator.info = {**COMPLETED, "status": "failed"}
    assert (await ctl.run("recover")).code == 3
    ctl.migrator.refusal = CommandError("Migrate recover can only be run when postcopy is paused.")
    ctl.migrator.info = {}
    ran = await ctl.run("recover", "tcp:0:1")
    assert ran == Ran(3, "", "migratectl: Migrate recover can only be run when postcopy is paused. [command-refused]\n")
    ctl.migrator.info = {"status": "postcopy-paused", "x-migrated-outcome": "unknown"}
    ran = await ctl.run("recover")
    assert (ran.code, "say URI" in ran.err) == (2, True)


async def test_recover_at_the_destination(ctl: Ctl) -> None:
    ctl.machine.run_state = RunState.RUNNING
    waits = {"socket-address": [{"type": "inet", "host": "10.0.0.9", "port": "7401"}]}
    ctl.migrator.info = {"status": "postcopy-paused", **waits}
    expected = [
        "Waiting for the source at tcp:10.0.0.9:7401",
        "  next step    at the source: `migratectl recover tcp:10.0.0.9:7401`",
    ]
    assert (await ctl.run("recover")).out.splitlines() == expected
    assert ctl.migrator.calls == [], "it waits there anyway"
    assert (await ctl.run("recover", "tcp:10.0.0.9:7401")).out.splitlines() == expected
    assert ctl.migrator.calls == [("recover", "tcp:10.0.0.9:7401")]
    assert (await ctl.run("recover", "--json")).json == waits


# Words


def test_what_to_do_in_the_middle_of_a_postcopy() -> None:
    here = {name: value for name, value in PAUSED.items() if name != "x-migrated-outcome"}
    assert next_step({}, "running") is None
    assert next_step(COMPLETED, "postmigrate") is None
    assert "keep this host up" in str(next_step(POSTCOPY, "finish-migrate"))
    assert "memory still comes from 10.0.0.7:7400" in str(next_step({**here, "status": "postcopy-active"}, "running"))
    assert "at the source (10.0.0.7:7400)" in str(next_step(here, "running"))
    assert "what has arrived" in str(next_step({**here, "status": "postcopy-recover"}, "running"))
    qemu = {**PAUSED, "x-migrated-peer": {"address": "h:1", "kind": "qemu"}}
    assert str(next_step(qemu, "finish-migrate")).startswith("`migrate-recover` at the destination")
    assert "by itself" not in pause_note(qemu)


def test_status_in_postcopy_has_one_next_step_and_it_is_not_the_records() -> None:
    record = {"record": "moved", "text": "the machine runs there", "next-step": "migrate it back"}
    lines = "\n".join(status_lines({"status": "finish-migrate"}, {}, record, PAUSED))
    assert lines.count("next step") == 1
    assert "migrate it back" not in lines
    assert "  reason       the link was cut" in lines
    assert "  faults       10 waited for the source" in lines


def test_sides_and_addresses() -> None:
    assert is_source(POSTCOPY, "running")
    assert is_source({}, "postmigrate")
    assert not is_source({"status": "postcopy-paused"}, "running")
    for peer, uri in [
        ("10.0.0.7:7400", "tcp:10.0.0.7:7400"), ("[::1]:7400", "tcp:[::1]:7400"), ("unix:/x", "unix:/x"),
        ("fd:7", None), ("", None),
    ]:  # fmt: skip
        assert last_address({"x-migrated-peer": {"address": peer}}) == uri
    assert recovery_lines({}) == ["The source has no address to come to. Next: 'migratectl recover URI' here"]
    anywhere = {"socket-address": [{"type": "inet", "host": "0.0.0.0", "port": "1"}]}
    assert "`migratectl recover tcp:THIS-HOST:1`" in recovery_lines(anywhere)[-1]


def test_figures() -> None:
    assert describe_faults({"remote": NONE, "in-flight": NONE, "local": NONE}) == "0 waited for the source"
    assert describe_blocktime({}) == ""
    info = {"postcopy-blocktime": 12, "postcopy-vcpu-blocktime": [3, 40]}
    assert describe_blocktime(info) == "12 ms all of 2 threads, at most 40 ms one of them"
    assert describe_blocktime({"postcopy-blocktime": 0, "postcopy-vcpu-blocktime": []}) == "0 ms all"
    line = progress_line(read_progress(POSTCOPY))
    assert "expected downtime" not in line
    assert "pass" not in line

"""`migratectl history` and `report`: what they say to people and programs, with a daemon and without."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from migrated.daemon.history import FileHistoryStore
from migrated.model.history import Direction, Report, Unreadable, with_answer
from tests.unit.cli.conftest import Ctl

STARTED = "2026-11-26T18:00:0{}.000Z"
FULL: dict[str, Any] = {
    "status": "completed", "x-migrated-peer": {"address": "10.0.0.7:7400", "kind": "migrated"}, "total-time": 89,
    "setup-time": 9, "downtime": 65, "x-migrated-downtime": {"stop": 51.1, "ram": 13.9},
    "x-migrated-passes": [{"pass": 1, "sent-bytes": 6480, "dirtied-bytes": 0, "ms": 1.0}],
    "ram": {"transferred": 8 << 10, "total": 1 << 20},
}  # fmt: skip
FAILED: dict[str, Any] = {
    "status": "failed", "error-desc": "nobody listens", "x-migrated-error": {"id": "link-closed"}, "total-time": 3,
}  # fmt: skip


def begun(number: int, migration_id: str, direction: Direction = Direction.OUTGOING) -> Report:
    return Report(
        id=migration_id, direction=direction, machine="kv", started=STARTED.format(number), ended=STARTED.format(9),
        status="unfinished", outcome="unknown", uri="tcp:10.0.0.7:7400" if direction is Direction.OUTGOING else "",
    )  # fmt: skip


MOVED = with_answer(begun(2, "0123456789-a"), FULL, outcome="destination-owns")
CAME = with_answer(begun(3, "0123456789-b", Direction.INCOMING), FULL, outcome="destination-owns")
REFUSED = with_answer(begun(1, "tried"), FAILED, outcome="source-owns")
REPORTS = [CAME, MOVED, REFUSED]


def local(number: int) -> str:
    return datetime.fromisoformat(STARTED.format(number)).astimezone().strftime("%Y-%m-%d %H:%M:%S")


async def on_disk(state: Path, *reports: Report) -> Path:
    for report in reports:
        await FileHistoryStore(state, keep=10).write(report, durable=False)
    return state


async def test_a_table_of_migrations(ctl: Ctl) -> None:
    ctl.history.reports = [*REPORTS, Unreadable(path="/h/x.json", unreadable="cut short")]
    ran = await ctl.run("history")
    assert (ran.code, ran.err) == (0, "")
    assert [line.split() for line in ran.out.splitlines()] == [
        ["ID", "STARTED", "PEER", "STATUS", "DOWNTIME", "TOTAL", "DATA"],
        f"0123456789-b {local(3)} from 10.0.0.7:7400 completed 65 ms 89 ms 8 KiB".split(),
        f"0123456789-a {local(2)} to 10.0.0.7:7400 completed 65 ms 89 ms 8 KiB".split(),
        f"tried {local(1)} to tcp:10.0.0.7:7400 failed [link-closed] 3 ms".split(),
        ["/h/x.json", "cannot", "be", "read:", "cut", "short"],
    ]
    assert len((await ctl.run("history", "-n", "1")).out.splitlines()) == 2


async def test_an_id_is_shown_as_far_as_it_is_needed(ctl: Ctl) -> None:
    ctl.history.reports = [begun(1, "f" * 32)]
    assert (await ctl.run("history")).out.splitlines()[1].startswith("ffffffff  ")


async def test_the_same_for_programs(ctl: Ctl) -> None:
    ctl.history.reports = list(REPORTS)
    found = (await ctl.run("history", "--json")).json
    assert [one["id"] for one in found] == [report.id for report in REPORTS]
    assert found[0]["downtime"] == 65
    report = (await ctl.run("report", "tried", "--json")).json
    assert (report["error-id"], report["outcome"], report["migration"]["total-time"]) == (
        "link-closed",
        "source-owns",
        3,
    )


async def test_there_may_be_nothing(ctl: Ctl) -> None:
    assert (await ctl.run("history")).out == "There are no reports of migrations\n"


async def test_a_report_for_people(ctl: Ctl) -> None:
    ctl.history.reports = list(REPORTS)
    ran = await ctl.run("report", "0123456789-a")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "Migration to 10.0.0.7:7400: completed",
        "  id           0123456789-a",
        "  machine      kv",
        "  uri          tcp:10.0.0.7:7400",
        f"  started      {local(2)}",
        f"  ended        {local(9)}",
        "  owner        the other host",
        "  total time   89 ms",
        "  downtime     65 ms = stop 51.1 ms + ram 13.9 ms",
        "  passes       1 (6.33 KiB)",
        "  transferred  8 KiB for 1 MiB of RAM",
        "  throughput   100 KiB/s",
    ]


async def test_a_report_of_a_failure_says_why(ctl: Ctl) -> None:
    ctl.history.reports = list(REPORTS)
    assert "  reason       nobody listens [link-closed]" in (await ctl.run("report", "tr")).out.splitlines()


async def test_a_report_that_nobody_finished(ctl: Ctl) -> None:
    ctl.history.reports = [
        Report(
            id="gone", direction=Direction.INCOMING, machine="kv", started=STARTED.format(1), status="interrupted",
            outcome="unknown", error="the daemon ended", error_id="migration-interrupted",
        )
    ]  # fmt: skip
    lines = (await ctl.run("report", "gone")).out.splitlines()
    assert lines[0] == "Migration from an unknown peer: interrupted"
    assert "  owner        unknown" in lines
    assert "  reason       the daemon ended [migration-interrupted]" in lines
    assert not any(line.startswith("  ended") for line in lines)


async def test_an_id_that_is_not_one(ctl: Ctl) -> None:
    ctl.history.reports = list(REPORTS)
    for wanted in ("none", "0123456789"):
        ran = await ctl.run("report", wanted)
        assert (ran.code, ran.out, "Next: " in ran.err) == (3, "", True)


async def test_without_a_daemon_the_disk_says(ctl: Ctl, tmp_path: Path) -> None:
    state = await on_disk(tmp_path, *REPORTS)
    ctl.history.reports = []
    ran = await ctl.run("history", "--state", str(state), "--json")
    assert [one["id"] for one in ran.json] == [report.id for report in REPORTS]
    ran = await ctl.run("report", "tried", "--state", str(state), "--json")
    assert (ran.code, ran.json["status"]) == (0, "failed")
    ran = await ctl.run("report", "none", "--state", str(state))
    assert ran.code == 3
    await ctl.server.close()
    shutil.rmtree(state / "history")
    assert (await ctl.run("history", "--state", str(state))).out == "There are no reports of migrations\n"
    ran = await ctl.run("history", "--state", str(state / "none"))
    assert (ran.code, "no such state directory" in ran.err) == (3, True)


async def test_without_a_daemon_and_without_its_directory_nothing_is_known(ctl: Ctl) -> None:
    await ctl.server.close()
    ran = await ctl.run("history")
    assert (ran.code, "[link-closed]" in ran.err) == (3, True)

"""`migratectl` from outside: what it sends, prints and returns."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from migrated.errors import CommandError
from migrated.model.runstate import RunState
from migrated.savevm.ports import TrackedMapping
from tests.support.fake_services import FakeBlock, FakeDevice
from tests.unit.cli.conftest import Ctl, Ran, finish

RAM = {"total": 1 << 30, "remaining": 1 << 28, "transferred": 3 << 28, "page-size": 4096, "dirty-sync-count": 1}
ACTIVE: dict[str, object] = {
    "status": "active",
    "ram": RAM,
    "total-time": 1000,
    "setup-time": 10,
    "expected-downtime": 45,
    "x-migrated-dirty-rate-bps": 120 << 20,
    "x-migrated-bandwidth-bps": 812 << 20,
    "x-migrated-eta-ms": 4000,
    "x-migrated-passes": [{"pass": 1, "sent-bytes": 1 << 30, "dirtied-bytes": 1 << 20, "ms": 1000.0}],
    "x-migrated-outcome": "source-owns",
}
STUCK: dict[str, object] = {
    **ACTIVE,
    "x-migrated-convergence": {
        "converging": False,
        "text": "the machine dirties memory faster than it is sent",
        "suggestions": ["downtime-limit 900", "auto-converge"],
    },
}
COMPLETED: dict[str, object] = {
    "status": "completed",
    "ram": {**RAM, "remaining": 0, "transferred": 3 << 29},
    "total-time": 2310,
    "setup-time": 310,
    "downtime": 41,
    "x-migrated-downtime": {"stop": 1.2, "sync": 0.8, "ram": 30.0, "devices": 2.0, "record": 3.0, "answer": 4.0},
    "x-migrated-passes": [
        {"pass": 1, "sent-bytes": 1 << 30, "dirtied-bytes": 1 << 29, "ms": 1500.0},
        {"pass": 2, "sent-bytes": 1 << 29, "dirtied-bytes": 0, "ms": 400.0},
    ],
    "x-migrated-outcome": "destination-owns",
    "x-migrated-peer": {"address": "10.0.0.7:7400", "kind": "migrated"},
}


def failed(outcome: str | None, status: str = "failed") -> dict[str, object]:
    info: dict[str, object] = {"status": status, "error-desc": "the link was cut"}
    return info if outcome is None else {**info, "x-migrated-outcome": outcome}


# migrate


async def test_migrate_waits_and_reports(ctl: Ctl) -> None:
    ctl.migrator.script = [{"status": "setup"}, ACTIVE, COMPLETED]
    ran = await ctl.run("migrate", "tcp:10.0.0.7:7400")
    assert ran.code == 0, ran
    assert ctl.migrator.calls == [("migrate", "tcp:10.0.0.7:7400", False)]
    assert ran.err == ""
    assert ran.out.splitlines() == [
        "setup",
        (
            "active: 75% of 1 GiB, pass 2, 768 MiB sent, 256 MiB left, 812 MiB/s, dirtied 120 MiB/s,"
            " expected downtime 45 ms, ETA 4 s"
        ),
        "completed: 100% of 1 GiB, pass 2, 1.50 GiB sent, 0 B left",
        "Migration completed (peer 10.0.0.7:7400)",
        "  total time   2.31 s",
        "  downtime     41 ms = stop 1.20 ms + sync 0.80 ms + ram 30 ms + devices 2 ms + record 3 ms + answer 4 ms",
        "  passes       2 (1 GiB, 512 MiB)",
        "  transferred  1.50 GiB for 1 GiB of RAM",
        "  throughput   768 MiB/s",
    ]


@pytest.mark.parametrize("words", [("--json", "migrate", "tcp:h:1"), ("migrate", "tcp:h:1", "--json")])
async def test_migrate_for_programs(ctl: Ctl, words: tuple[str, ...]) -> None:
    ctl.migrator.script = [{"status": "setup"}, STUCK, COMPLETED]
    ran = await ctl.run(*words)
    report = ran.json
    assert ran.code == 0
    assert report["downtime-split"] == COMPLETED["x-migrated-downtime"]
    assert report["passes"] == COMPLETED["x-migrated-passes"]
    expected = {"status": "completed", "exit-code": 0, "outcome": "destination-owns", "total-time": 2310}
    expected |= {"downtime": 41, "transferred": 3 << 29, "ram": 1 << 30, "throughput": (3 << 29) // 2}
    assert {name: report[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("info", "code", "verdict"),
    [
        (failed("source-owns"), 4, "Migration failed; this host still owns the machine"),
        (failed("source-owns", "cancelled"), 4, "Migration cancelled; this host still owns the machine"),
        (failed(None), 4, "Migration failed; this host still owns the machine"),
        (failed("destination-owns"), 5, "Migration failed; the destination owns the machine"),
        (failed("unknown"), 6, "Migration failed; it is unknown which host owns the machine"),
    ],
)
async def test_exit_code_says_who_owns_the_machine(ctl: Ctl, info: dict[str, object], code: int, verdict: str) -> None:
    # "unknown" while the answer is awaited is not the end
    ctl.migrator.script = [{**ACTIVE, "status": "device", "x-migrated-outcome": "unknown"}, info]
    ctl.migrator.record = {"record": "released", "text": "unknown", "next-step": "look at the other host"}
    ran = await ctl.run("migrate", "tcp:h:1")
    assert ran.code == code
    assert verdict in ran.out
    assert "  reason       the link was cut" in ran.out
    assert ran.out.splitlines()[-1] == "  next step    look at the other host"
    ran = await ctl.run("migrate", "tcp:h:1", "--json")
    assert (ran.code, ran.json["exit-code"], ran.json["error"]) == (code, code, "the link was cut")
    assert ran.json["outcome"] == info.get("x-migrated-outcome", "source-owns")


async def test_refused_migrations(ctl: Ctl) -> None:
    ctl.migrator.refusal = CommandError("There's a migration process in progress")
    ran = await ctl.run("migrate", "tcp:h:1")
    assert ran == Ran(3, "", "migratectl: There's a migration process in progress [command-refused]\n")
    ran = await ctl.run("migrate", "tcp:h:1", "--json")
    assert ran.code == 3
    assert ran.err == ""
    expected = {"class": "GenericError", "desc": "There's a migration process in progress", "id": "command-refused"}
    assert ran.json == {"error": expected}


async def test_migrate_detached(ctl: Ctl) -> None:
    ctl.migrator.info = ACTIVE
    ran = await ctl.run("migrate", "--detach", "tcp:h:1")
    assert ran == Ran(0, "Migration started; 'migratectl status' shows how it goes\n", "")
    assert ctl.migrator.calls == [("migrate", "tcp:h:1", False)]


async def test_a_migration_that_does_not_converge_says_so_once(ctl: Ctl) -> None:
    ctl.migrator.script = [STUCK, STUCK, STUCK, failed("source-owns", "cancelled") | {**STUCK, "status": "cancelled"}]
    ran = await ctl.run("migrate", "tcp:h:1")
    said = "the machine dirties memory faster than it is sent. What would help: downtime-limit 900; auto-converge"
    assert ran.out.count(f"Not converging: {said}") == 1
    assert f"  convergence  {said}" in ran.out


async def test_a_pause_before_the_switchover_says_how_to_go_on(ctl: Ctl) -> None:
    ctl.migrator.script = [ACTIVE, {**ACTIVE, "status": "pre-switchover"}, COMPLETED]
    ran = await ctl.run("migrate", "tcp:h:1")
    assert ran.out.count("'migratectl continue' goes on") == 1
    assert ran.code == 0


async def test_a_daemon_lost_while_waiting_leaves_the_outcome_unknown(ctl: Ctl) -> None:
    ctl.migrator.info = ACTIVE
    process = await ctl.start("migrate", "tcp:h:1")
    assert process.stdout is not None
    assert b"active" in await process.stdout.readline()
    await ctl.server.close()
    ran = await finish(process)
    assert ran.code == 6
    assert "how the migration ended is unknown, ask 'migratectl status'" in ran.err


async def test_ctrl_c_cancels_and_a_second_one_leaves(ctl: Ctl) -> None:
    ctl.migrator.info = ACTIVE
    process = await ctl.start("migrate", "tcp:h:1")
    assert process.stdout is not None
    assert b"active" in await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while b"Cancelling" not in (line := await process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    ran = await finish(process)
    assert ran.code == 130
    assert "The migration goes on" in ran.out
    assert ctl.migrator.calls == [("migrate", "tcp:h:1", False), ("cancel",)]


async def test_ctrl_c_that_comes_too_late_is_told_so(ctl: Ctl) -> None:
    ctl.migrator.info = ACTIVE
    process = await ctl.start("migrate", "tcp:h:1")
    assert process.stdout is not None
    assert b"active" in await process.stdout.readline()
    ctl.migrator.refusal = CommandError("the last byte is gone")
    process.send_signal(signal.SIGINT)
    while b"Cannot cancel: the last byte is gone" not in (line := await process.stdout.readline()):
        assert line
    ctl.migrator.info = COMPLETED
    assert (await finish(process)).code == 0


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
async def test_a_terminal_gets_a_bar_and_colours_unless_it_wants_none(ctl: Ctl, environment: dict[str, str]) -> None:
    ctl.migrator.script = [ACTIVE, STUCK, {**ACTIVE, "status": "pre-switchover"}, COMPLETED]
    controller, terminal = pty.openpty()
    process = await ctl.start(
        "migrate", "tcp:h:1", stdout=terminal, env={"TERM": "xterm-256color", "COLUMNS": "200", **environment}
    )
    os.close(terminal)
    reading = asyncio.get_running_loop().run_in_executor(None, read_all, controller)
    ran, text = await finish(process), await reading
    os.close(controller)
    assert ran.code == 0
    assert "━" in text
    assert "Not converging" in text
    assert "Migration completed" in text
    coloured = re.search(r"\x1b\[[0-9;]*m", re.sub(r"\x1b\[0?m", "", text))
    assert (coloured is None) == bool(environment)


def read_all(fd: int) -> str:
    """Everything up to the end of the other side of a terminal."""
    text = b""
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:  # how Linux says that the other side is closed
            return text.decode()
        if not data:
            return text.decode()
        text += data


# The other commands


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (("stop",), ("stop",)),
        (("cont",), ("cont",)),
        (("cancel",), ("cancel",)),
        (("continue",), ("proceed", "pre-switchover")),
        (("release",), ("release",)),
        (("resolve", "--peer-is-fenced"), ("resolve", True, False)),
        (("resolve", "--peer-is-running"), ("resolve", False, True)),
        (("incoming", "--detach", "tcp:0:7400"), ("incoming", "tcp:0:7400")),
    ],
)
async def test_simple_commands(ctl: Ctl, words: tuple[str, ...], call: tuple[Any, ...]) -> None:
    ran = await ctl.run(*words)
    assert (ran.code, ran.err) == (0, "")
    ran = await ctl.run(*words, "--json")
    assert ran.code == 0
    assert isinstance(ran.json, dict)
    assert ctl.migrator.calls == [call, call]
    ctl.migrator.refusal = CommandError("not now")
    assert await ctl.run(*words) == Ran(3, "", "migratectl: not now [command-refused]\n")


async def test_incoming_says_where(ctl: Ctl) -> None:
    ctl.migrator.info = {
        "socket-address": [
            {"type": "inet", "host": "127.0.0.1", "port": "7400", "ipv4": True},
            {"type": "inet", "host": "::1", "port": "7400"},
            {"type": "unix", "path": "/x"},
        ]
    }
    ran = await ctl.run("incoming", "tcp:localhost:7400")
    assert ran.out.splitlines() == ["Waiting at tcp:127.0.0.1:7400", "Waiting at tcp:[::1]:7400", "Waiting at unix:/x"]


LOADED: dict[str, object] = {
    "status": "completed",
    "total-time": 20,
    "ram": {**RAM, "remaining": 0},
    "x-migrated-migration-id": "new",
    "x-migrated-peer": {"address": "file:/m", "kind": "unknown"},
}


async def test_incoming_from_a_file_waits_and_reports(ctl: Ctl) -> None:
    before = {**COMPLETED, "x-migrated-migration-id": "old"}
    active = {**LOADED, "status": "active"}
    ctl.migrator.script = [before, before, before, active, LOADED]
    ran = await ctl.run("incoming", "file:/m")
    assert ran.code == 0, ran
    assert ran.out.splitlines()[-3:] == [
        "The machine is here, loaded from file:/m; it is running",
        "  total time   20 ms",
        "  memory       1 GiB",
    ]
    ctl.migrator.script = [before, active, LOADED]
    assert (await ctl.run("incoming", "file:/m", "--json")).json["run-state"] == "running"
    ctl.migrator.script = [before, active]
    ran = await ctl.run("incoming", "--detach", "file:/m")
    assert (ran.code, ran.out) == (0, "The load has started; 'migratectl status' shows how it goes\n")


@pytest.mark.parametrize(("record", "code"), [("none", 4), ("moved", 4), ("accepted", 6)])
async def test_incoming_that_fails_says_why(ctl: Ctl, record: str, code: int) -> None:
    ctl.migrator.record = {"record": record, "text": "x", "next-step": "load it again"}
    ctl.migrator.script = [{}, {}, {**LOADED, "status": "failed", "error-desc": "not a machine"}]
    ran = await ctl.run("incoming", "file:/m")
    assert ran.code == code, ran
    assert "  reason       not a machine" in ran.out
    assert "  next step    load it again" in ran.out


async def test_release_says_what_is_kept(ctl: Ctl) -> None:
    ctl.machine.blocks = [FakeBlock("heap", 1 << 28, mappings=[TrackedMapping("worker", 0, 1 << 28, 5, 6)])]
    ran = await ctl.run("release")
    assert ran.out == "Kept block heap: workload worker still maps it; end the workload, then release again\n"
    assert (await ctl.run("release", "--json")).json == {
        "released": [],
        "kept": [{"name": "heap", "workloads": ["worker"]}],
    }


async def test_status(ctl: Ctl) -> None:
    mapping = TrackedMapping("worker", 0, 1 << 28, 5, 6)
    ctl.machine.blocks = [FakeBlock("heap", 1 << 28, mappings=[mapping]), FakeBlock("spare", 4096)]
    ctl.machine.attached = [FakeDevice("cpu", "worker")]
    ctl.machine.run_state = RunState.FINISH_MIGRATE
    ctl.migrator.record = {"record": "released", "text": "nobody knows", "next-step": "ask the other host"}
    ctl.migrator.info = {**ACTIVE, "error-desc": "why", "socket-address": [{"type": "fd", "str": "7"}]}
    kept = {"id": "rtc", "instance-id": 0, "version-id": 2, "size": 300}
    ctl.migrator.info["x-migrated-kept-sections"] = [kept]
    ran = await ctl.run("status")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "  machine      kv, finish-migrate",
        "  block        heap, 256 MiB, workload worker",
        "  block        spare, 4 KiB, no workload",
        "  device       cpu, instance 0, workload worker",
        "  kept         rtc, instance 0, 300 B, for a host that knows it",
        "  ownership    released: nobody knows",
        "  next step    ask the other host",
        "  waiting at   fd:7",
        (
            "  migration    active: 75% of 1 GiB, pass 2, 768 MiB sent, 256 MiB left, 812 MiB/s, dirtied 120 MiB/s,"
            " expected downtime 45 ms, ETA 4 s"
        ),
        "  reason       why",
    ]
    shown = (await ctl.run("status", "--json")).json
    assert shown["status"]["status"] == "finish-migrate"
    assert shown["machine"]["blocks"][0]["name"] == "heap"
    assert shown["ownership"]["record"] == "released"
    assert shown["migration"]["status"] == "active"


async def test_capabilities(ctl: Ctl) -> None:
    ran = await ctl.run("capabilities")
    assert "return-path=on" in ran.out.splitlines()
    assert "multifd=off" in ran.out.splitlines()
    ran = await ctl.run("capabilities", "events=on", "auto-converge=true", "validate-uuid=off")
    assert ran == Ran(0, "events=on\nauto-converge=on\nvalidate-uuid=off\n", "")
    shown = (await ctl.run("capabilities", "events=off", "--json")).json
    assert (shown["events"], shown["auto-converge"]) == (False, True)
    ran = await ctl.run("capabilities", "compress=on")
    assert ran == Ran(
        3, "", "migratectl: Capability 'compress' is not implemented by this version of migrated [argument-invalid]\n"
    )
    for word in ("events", "events=maybe", "=on"):
        assert (await ctl.run("capabilities", word)).code == 2


async def test_parameters(ctl: Ctl) -> None:
    assert "downtime-limit=300" in (await ctl.run("parameters")).out.splitlines()
    words = ("downtime-limit=500", "max-bandwidth=1G", "cpu-throttle-tailslow=on", "multifd-compression=none")
    ran = await ctl.run("parameters", *words)
    expected = "downtime-limit=500\nmax-bandwidth=1073741824\ncpu-throttle-tailslow=on\nmultifd-compression=none\n"
    assert ran == Ran(0, expected, "")
    assert ctl.migrator.parameters.integer("max-bandwidth") == 1 << 30
    assert (await ctl.run("parameters", "--json")).json["downtime-limit"] == 500
    ran = await ctl.run("parameters", "downtime-limt=1")
    assert ran == Ran(3, "", "migratectl: Parameter 'downtime-limt' is unexpected [argument-invalid]\n")
    ran = await ctl.run("parameters", "downtime-limit=soon")
    assert ran.code == 2
    assert "'soon' is not a size" in ran.err


@pytest.mark.parametrize("as_json", [False, True])
async def test_events(ctl: Ctl, as_json: bool) -> None:
    process = await ctl.start("events", *(["--json"] if as_json else []))
    assert process.stdout is not None
    line = b""
    while b"MIGRATION" not in line:  # until it listens
        ctl.migrator.emit("MIGRATION", {"status": "setup", "late": False})
        try:
            line = await asyncio.wait_for(process.stdout.readline(), 0.1)
        except TimeoutError:
            continue
    if as_json:
        assert json.loads(line)["data"] == {"status": "setup", "late": False}
    else:
        assert re.fullmatch(rb"\d\d:\d\d:\d\d\.\d{3} MIGRATION status=setup late=off\n", line)
    process.send_signal(signal.SIGINT)
    assert (await finish(process)).code == 0


async def test_events_end_with_the_daemon(ctl: Ctl) -> None:
    process = await ctl.start("events")
    assert process.stdout is not None
    line = b""
    while not line:
        ctl.migrator.emit("STOP")
        try:
            line = await asyncio.wait_for(process.stdout.readline(), 0.1)
        except TimeoutError:
            continue
    await ctl.server.close("host-signal")
    ran = await finish(process)
    assert ran.code == 0
    assert ran.out.splitlines()[-1].endswith("SHUTDOWN guest=off reason=host-signal")


# Usage


@pytest.mark.parametrize(
    "words",
    [
        ("balloon",),
        ("migrate",),
        ("migrate", "tcp:h:1", "--bogus"),
        ("resolve",),
        ("resolve", "--peer-is-fenced", "--peer-is-running"),
    ],
)
async def test_usage_errors(ctl: Ctl, words: tuple[str, ...]) -> None:
    ran = await ctl.run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: migratectl" in ran.err
    assert ctl.migrator.calls == []


async def test_a_daemon_that_is_not_there(ctl: Ctl, tmp_path: Path) -> None:
    process = await ctl.start("--socket", str(tmp_path / "none"), "status")
    ran = await finish(process)
    assert ran.code == 3
    assert (
        ran.err == f"migratectl: Failed to connect to '{tmp_path / 'none'}': No such file or directory [link-closed]\n"
    )


async def test_machine_names_stand_for_sockets() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "migrated.cli.app", "--machine", "no-such-machine", "status", "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    ran = await finish(process)
    assert ran.code == 3
    assert "/run/migrated/no-such-machine/qmp.sock" in ran.json["error"]["desc"]


async def test_help_names_every_command_there_is_and_none_to_come(ctl: Ctl) -> None:
    ran = await ctl.run("--help")
    assert ran.code == 0
    commands = (
        "status migrate incoming cancel start-postcopy pause recover continue capabilities parameters stop cont release"
        " resolve events demo snapshot"
    )
    for command in commands.split():
        assert re.search(rf"\b{command}\b", ran.out), command
    ran = await ctl.run("snapshot", "--help")
    for command in ["save", "load", "delete", "list", "verify"]:
        assert re.search(rf"\b{command}\b", ran.out), command


async def test_starting_costs_little() -> None:
    """Neither rich nor the daemon's libraries are loaded for a plain command."""
    code = (
        "import sys; sys.argv = ['migratectl', '--socket', '/nonexistent', 'status'];"
        "from migrated.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'rich', 'numpy', 'msgspec', 'structlog', 'asyncio', 'uvloop'}))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert (await finish(process)).out.strip() == ""

"""What a test looks at inside a booted systemd: two instances of the units, a workload at each, one migration.

The rule of the file: it runs as root inside the container, once, and writes what it saw to the file it is given; the
test outside says what is right. Run by `tests.support.container`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from migrated.control.client import QmpClient
from migrated.errors import ChannelClosed

UNITS = {"migrated.service": "migrated", "migrated@demo.service": "demo"}
RAM_BYTES = 16 << 20
DEADLINE_S = 20.0
#: Its configuration has a [workload] command.
OWN = "migrated@own.service"
SHOWN = ("ActiveState", "SubState", "Result", "StatusText", "NRestarts", "MainPID", "ExecMainStatus", "User")


class Walker:
    """A workload, in no sandbox, as ``user``."""

    all: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, machine: str, user: str) -> None:
        command = [sys.executable, "-m", "migrated.demo.walker", "--attach", f"/run/migrated/{machine}/attach.sock"]
        command += ["--ram", str(RAM_BYTES), "--name", f"walker-{machine}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=user, group=user
        )
        self.all.append(self.process)
        self.ready = self.wait_event("ready")

    def wait_event(self, name: str) -> dict[str, Any]:
        """Return the next event of that name."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"the walker ended before {name}")

    def check(self) -> dict[str, Any]:
        """Let it check its memory."""
        assert self.process.stdin is not None
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self.wait_event("checked")


def systemctl(*words: str) -> str:
    """Run systemctl; what it prints."""
    return subprocess.run(["/usr/bin/systemctl", *words], check=True, capture_output=True, text=True).stdout


def show(unit: str) -> dict[str, str]:
    """Return properties of a unit."""
    lines = systemctl("show", unit, f"--property={','.join(SHOWN)}").splitlines()
    return dict(line.split("=", 1) for line in lines)


def wait_for(probe: Callable[[], Any], what: str) -> Any:
    """Ask until there is an answer."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.02)
    return found


def qmp(machine: str) -> QmpClient | None:
    """Connect to a daemon, if it is there."""
    try:
        return QmpClient(f"/run/migrated/{machine}/qmp.sock")
    except ChannelClosed:
        return None


def status_of(pid: str) -> dict[str, str]:
    """Return /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def migrate(seen: dict[str, Any]) -> Walker:
    """Move a machine from the first unit to the second; return the walker there."""
    first, second = UNITS.values()
    here, there = Walker(first, "migrated"), Walker(second, "root")
    seen["tracked"] = [here.ready["tracked"], there.ready["tracked"]]
    client = wait_for(lambda: qmp(first), "a control socket")
    client.execute("cont")
    here.wait_event("running")
    seen["running"] = show(next(iter(UNITS)))
    client.execute("migrate", {"uri": "tcp:127.0.0.1:7401"})
    answer = wait_for(lambda: _ended(client.execute("query-migrate")), "the end of the migration")
    seen["migration"] = answer
    if answer["status"] == "completed":
        seen["left"] = here.wait_event("moved")
        there.wait_event("running")
        seen["arrived"] = there.check()
    return there


def _ended(answer: dict[str, Any]) -> dict[str, Any] | None:
    return answer if answer["status"] in ("completed", "failed") else None


def hang(unit: str, machine: str, walker: Walker, seen: dict[str, Any]) -> None:
    """Stop the daemon's process: the watchdog must notice, and the next daemon must find its workload."""
    before = show(unit)
    os.kill(int(before["MainPID"]), signal.SIGSTOP)
    wait_for(lambda: show(unit)["NRestarts"] == "1" and show(unit)["SubState"] == "running", "a restart")
    seen["restarted"] = show(unit)
    client = wait_for(lambda: qmp(machine), "a control socket")
    wait_for(lambda: client.execute("x-migrated-query-machine")["workloads"], "the walker is back")
    seen["after-hang"] = {"run-state": client.execute("query-status")["status"], "check": walker.check()}


def own_workload(seen: dict[str, Any]) -> None:
    """A daemon that starts its workload inside its own sandbox, and ends without it."""
    systemctl("start", OWN)
    client = wait_for(lambda: qmp("own"), "a control socket")
    seen["own"] = wait_for(lambda: _with_blocks(client.execute("x-migrated-query-machine")), "its own workload")
    systemctl("stop", OWN)
    commands = [found.read_text().split("\0") for found in Path("/proc").glob("[0-9]*/cmdline")]
    seen["own-lives"] = any(command[0] == sys.executable and "walker-own" in command for command in commands)


def _with_blocks(machine: dict[str, Any]) -> dict[str, Any] | None:
    return machine if machine["blocks"] else None


def main(path: str) -> None:
    """Do all of it, and write what was seen, however far it went."""
    seen: dict[str, Any] = {}
    try:
        systemctl("start", *UNITS)
        seen["started"] = {unit: show(unit) for unit in UNITS}
        seen["process"] = {unit: status_of(one["MainPID"]) for unit, one in seen["started"].items()}
        walker = migrate(seen)
        systemctl("reload", *UNITS)
        seen["after-reload"] = {unit: show(unit) for unit in UNITS}
        unit, machine = list(UNITS.items())[1]
        hang(unit, machine, walker, seen)
        own_workload(seen)
        systemctl("stop", *UNITS)
        seen["stopped"] = {unit: show(unit) for unit in UNITS}
        seen["walker-lives"] = walker.process.poll() is None
        seen["left-behind"] = sorted(str(found) for found in Path("/run/migrated").rglob("*.sock"))
    finally:
        for process in Walker.all:
            process.kill()
        journal = subprocess.run(
            ["/usr/bin/journalctl", "--no-pager", "-o", "cat"], capture_output=True, text=True, check=False
        )
        seen["journal"] = journal.stdout
        Path(path).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])

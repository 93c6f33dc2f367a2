"""Who may join the machine: what a workload says it was doing, against what the machine is doing.

The rule of the file: a table. A workload comes *fresh*, or comes back from a daemon that died or was restarted; then it
says what it is doing, and the run state (from the ownership record) says whether that can be. Nothing that could be a
second copy is let in as running.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from migrated.machine.claims import ClaimRefused
from migrated.machine.machine import Machine
from migrated.machine.workload import Workload
from migrated.model.runstate import RunState

#: A workload that reconnects may be faster than the news that its old connection is closed.
OLD_CONNECTION_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of a workload when it is let in."""

    running: bool = False
    replaceable: bool = False


_GOING = Facts(running=True)
_STOPPED = Facts()
_EMPTY = Facts(replaceable=True)

_RUNS_ELSEWHERE = "the machine here waits for a migration, and this workload says that it runs"
_CAME_BACK = "the machine runs here, and this workload says that it moved away: its threads have let go of it"

#: (the workload's state, the machine's: running, inmigrate, postmigrate or "stopped") -> facts, or why not.
ADMISSION: dict[tuple[str, str], Facts | str] = {
    ("fresh", "running"): _GOING,
    ("fresh", "inmigrate"): _EMPTY,
    # The memory of a machine that moved away is kept only until the next one arrives.
    ("fresh", "postmigrate"): _EMPTY,
    ("fresh", "stopped"): _STOPPED,
    # Taken back; where the machine does not run, it is told to stop (postmigrate: that it moved).
    ("running", "running"): _GOING,
    ("running", "inmigrate"): _RUNS_ELSEWHERE,
    ("running", "postmigrate"): _GOING,
    ("running", "stopped"): _GOING,
    # Where the machine runs, it is told to go on. Waiting for a migration: it blocks that until it leaves.
    ("stopped", "running"): _STOPPED,
    ("stopped", "inmigrate"): _STOPPED,
    ("stopped", "postmigrate"): _STOPPED,
    ("stopped", "stopped"): _STOPPED,
    # Running: a machine has arrived in it and its daemon died before it could say so.
    ("standby", "running"): _EMPTY,
    ("standby", "inmigrate"): _EMPTY,
    ("standby", "postmigrate"): _EMPTY,
    ("standby", "stopped"): _EMPTY,
    ("moved", "running"): _CAME_BACK,
    ("moved", "inmigrate"): _STOPPED,
    ("moved", "postmigrate"): _STOPPED,
    ("moved", "stopped"): _STOPPED,
}


def initial_facts(client_state: str, machine: Machine) -> Facts:
    """Return what is true of a workload in ``client_state``. Raises ClaimRefused when it cannot be."""
    if machine.barred:
        raise ClaimRefused(machine.barred, again=True)
    states = {RunState.RUNNING: "running", RunState.INMIGRATE: "inmigrate", RunState.POSTMIGRATE: "postmigrate"}
    facts = ADMISSION[client_state, states.get(machine.run_state, "stopped")]
    if isinstance(facts, str):
        raise ClaimRefused(facts, again=True)
    return facts


async def check_name_free(machine: Machine, name: str, pid: int) -> None:
    """Raise ClaimRefused when the name or the process is attached already (a dying connection gets its time to end)."""
    deadline = asyncio.get_running_loop().time() + OLD_CONNECTION_GRACE_S
    while (other := _occupant(machine, name, pid)) is not None:
        if not other.hung_up() or asyncio.get_running_loop().time() > deadline:
            raise _occupied(other, name, pid)
        await asyncio.sleep(0.01)


def _occupant(machine: Machine, name: str, pid: int) -> Workload | None:
    return next((other for other in machine.workloads.values() if other.name == name or other.pid == pid), None)


def _occupied(other: Workload, name: str, pid: int) -> ClaimRefused:
    if other.pid == pid:
        return ClaimRefused(f"process {pid} is attached already, as workload {other.name}", again=True)
    return ClaimRefused(f"the name '{name}' is in use by process {other.pid}", again=True)


def admit(machine: Machine, workload: Workload, facts: Facts) -> None:
    """Add a checked workload to the machine."""
    # A process that talks is not frozen, so a signal workload runs until its threads are stopped.
    workload.running = facts.running or workload.signalled
    workload.replaceable = facts.replaceable
    machine.attach(workload)

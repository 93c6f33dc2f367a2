"""Workloads that misbehave in one chosen way; otherwise walkers.

Run: ``python -m tests.support.misbehave --mode MODE``. The modes are the functions below, and "signal": no callbacks,
RAM only, stopped through its pidfd.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable

from xxhash import xxh3_128_hexdigest

from migrated.client import Machine, attach
from migrated.demo.walker import PAGE, Walker, tell


def hang_stop(machine: Machine) -> None:
    """on_stop never returns."""
    machine.on_stop(lambda: threading.Event().wait())


def slow_stop(machine: Machine) -> None:
    """on_stop takes a moment, within the deadline."""
    machine.on_stop(lambda: threading.Event().wait(0.3))


def stray(machine: Machine) -> None:
    """A thread goes on writing after the stop was acknowledged."""
    memory = machine.ram("scratch", 16 * PAGE)

    def write_for_ever() -> None:
        while True:
            memory[0] = (memory[0] + 1) & 0xFF

    threading.Thread(target=write_for_ever, daemon=True).start()


def die_on_save(machine: Machine) -> None:
    """The process ends when it is asked for a device's state."""
    machine.device("mortal", save=lambda: os._exit(3), load=lambda state, version_id: None, version_id=1)


def fail_on_load(machine: Machine) -> None:
    """Restoring a device raises."""

    def load(state: bytes, version_id: int) -> None:
        raise ValueError(f"cannot restore {state!r}")

    machine.device("picky", save=lambda: b"state", load=load, version_id=1)


def idle_block(machine: Machine) -> None:
    """A second block, in which nobody writes."""
    machine.ram("scratch", 16 * PAGE)


def deaf_to_cont(machine: Machine) -> None:
    """It hears that the machine goes on, and says nothing: the daemon waits for its answer."""
    machine._orders._cont = lambda order: None  # type: ignore[method-assign]


MODES: dict[str, Callable[[Machine], None]] = {
    "none": lambda machine: None,
    "hang-stop": hang_stop,
    "slow-stop": slow_stop,
    "stray": stray,
    "die-on-save": die_on_save,
    "fail-on-load": fail_on_load,
    "idle-block": idle_block,
    "deaf-to-cont": deaf_to_cont,
}


def signal_workload(machine: Machine, ram_bytes: int) -> None:
    """Write to memory for ever; say what it looks like before the first write."""
    memory = machine.ram("heap", ram_bytes)
    tell("ready")  # before ready(): from there on an empty machine's daemon keeps this process frozen
    machine.ready()
    machine.wait_running()
    tell("running", steps=0, hash=xxh3_128_hexdigest(memory))
    value = 0
    while True:
        value = (value + 1) & 0xFF
        for offset in range(0, ram_bytes, PAGE):
            memory[offset] = value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attach", required=True)
    parser.add_argument("--ram", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="walker")
    parser.add_argument("--mode", choices=[*MODES, "signal"], default="none")
    arguments = parser.parse_args()
    if arguments.mode == "signal":
        with attach(arguments.attach, name=arguments.name, pause="signal") as machine:
            signal_workload(machine, arguments.ram)
        return
    with attach(arguments.attach, name=arguments.name) as machine:
        walker = Walker(machine, arguments.ram, arguments.seed)
        MODES[arguments.mode](machine)
        machine.ready()
        tell("ready")
        walker.run()


if __name__ == "__main__":
    main()

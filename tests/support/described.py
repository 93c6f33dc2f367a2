"""A workload whose devices are VMState descriptions, and the same kind of device as a handler in the daemon.

As a workload: ``python -m tests.support.described --attach SOCKET --ram BYTES --device chip/0@2 --device bank/1``. The
part behind "/" is the instance, behind "@" the version, behind "+" the priority. Events are JSON lines on stdout;
``state`` on stdin is answered with what every device holds, ``memory`` with the seed that the memory begins with.

In a daemon: ``[handlers] load = ["tests.support.described:register"]``. The environment variable DESCRIBED_HANDLERS
names the devices, separated by blanks; what they hold is written to the file DESCRIBED_DIR/PID.json at each load, which
is refused while there is a file DESCRIBED_DIR/PID.refuse.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from migrated.client import Machine, MachineMoved, attach
from migrated.demo.walker import tell
from migrated.wire.vmstate import VMState, array, boolean, buffer, qtailq, timer, uint8, uint16, uint32, varray
from migrated.wire.vmstate_rows import Row

PAGE = 4096


class Item(VMState):
    """An element of a queue, and of a table."""

    name = "item"
    fields = (uint8("kind"), uint16("value"))


def description(kind: str, version_id: int, priority: int) -> type[VMState]:
    """Return the description of a device: version 2 has a table that version 1 does not have."""
    rows: tuple[Row, ...] = (
        uint32("steps"),
        boolean("armed"),
        buffer("serial", 8),
        array("regs", uint16, 4),
        timer("expires"),
    )
    rows += (qtailq("queue", Item),)
    if version_id > 1:
        rows += (uint32("items_len", since=2), varray("items", Item, "items_len", since=2))

    class Alarm(VMState):
        name = f"{kind}/alarm"
        fields = (uint32("alarm"),)

        @staticmethod
        def needed(obj: Any) -> bool:
            return bool(obj.alarm)

    members = {
        "name": kind, "version_id": version_id, "minimum_version_id": 1, "priority": priority, "fields": rows,
        "subsections": (Alarm,), "pre_load": staticmethod(pre_load), "new": SimpleNamespace,
    }  # fmt: skip
    return type("Device", (VMState,), members)


def pre_load(obj: Any) -> None:
    """Give what an older stream lacks its values."""
    obj.alarm = obj.items_len = 0
    obj.items = []


def state(seed: int) -> SimpleNamespace:
    """Return what a device holds at first: different things for different seeds."""
    items = [SimpleNamespace(kind=i, value=seed) for i in range(seed % 3 + 1)]
    return SimpleNamespace(
        steps=seed, armed=bool(seed % 2), serial=seed.to_bytes(8, "big"), regs=[seed, 2, 3, 4],
        expires=None if seed % 2 else seed * 1000, queue=items, items_len=len(items), items=items, alarm=seed % 2 * 77,
    )  # fmt: skip


def shown(obj: Any) -> dict[str, Any]:
    """Return an object's content as JSON takes it."""
    plain: dict[str, Any] = json.loads(json.dumps(vars(obj), default=lambda one: getattr(one, "__dict__", str(one))))
    return plain


def parse(text: str) -> tuple[str, int, int, int]:
    """Return name, instance, version and priority."""
    text, _, priority = text.partition("+")
    text, _, version = text.partition("@")
    name, _, instance = text.partition("/")
    return name, int(instance or 0), int(version or 2), int(priority or 0)


# -- in the daemon -------------------------------------------------------------------------------------------------


def register(registry: Any, machine: Any) -> None:
    """Entry point of ``[handlers] load``."""
    from migrated.savevm.vmstate import vmstate_register  # noqa: PLC0415 - a workload does without

    file = Path(os.environ["DESCRIBED_DIR"]) / f"{os.getpid()}.json"
    held: dict[str, SimpleNamespace] = {}

    def write(obj: Any, version_id: int) -> None:
        if file.with_suffix(".refuse").exists():
            raise ValueError("told to refuse")
        file.write_text(json.dumps({name: shown(one) for name, one in held.items()}))

    for number, text in enumerate(os.environ.get("DESCRIBED_HANDLERS", "").split()):
        name, instance, version, priority = parse(text)
        base = description(name, version, priority)
        table = type("Handler", (base,), {"minimum_version_id": 1, "post_load": staticmethod(write)})
        held[f"{name}/{instance}"] = state(os.getpid() % 1000 + number)
        vmstate_register(registry, None, instance, table, held[f"{name}/{instance}"])
    write(None, 0)


# -- as a workload -------------------------------------------------------------------------------------------------


def follow(machine: Machine) -> None:
    """Take part in every stop, and tell where the machine is."""
    while True:
        try:
            machine.wait_running()
            tell("running")
            while True:
                machine.checkpoint()
                threading.Event().wait(0.001)
        except MachineMoved:
            machine.standby()
            tell("moved")


def main() -> None:
    """Attach, declare, answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--attach", required=True)
    parser.add_argument("--ram", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="described")
    parser.add_argument("--block", default="heap")
    parser.add_argument("--device", action="append", default=[])
    arguments = parser.parse_args()
    with attach(arguments.attach, name=arguments.name) as machine:
        memory = machine.ram(arguments.block, arguments.ram)
        memory[:] = os.urandom(arguments.ram)  # pages of zeros take no time
        memory[:8] = arguments.seed.to_bytes(8, "big")
        held = {}
        for number, text in enumerate(arguments.device):
            name, instance, version, priority = parse(text)
            held[f"{name}/{instance}"] = one = state(arguments.seed + number)
            machine.device(name, vmstate=description(name, version, priority), state=one, instance_id=instance)
        machine.ready()
        tell("ready")
        threading.Thread(target=follow, args=(machine,), daemon=True).start()
        for line in sys.stdin:
            if line == "state\n":
                tell("state", devices={name: shown(one) for name, one in held.items()})
            else:
                tell("memory", seed=int.from_bytes(memory[:8], "big"))


if __name__ == "__main__":
    main()

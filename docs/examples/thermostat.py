#!/usr/bin/env python3
"""A device that moves with its machine. Run: thermostat.py [ATTACH_SOCKET] (default: $MIGRATED_ATTACH)."""

import json
import sys
import time
from dataclasses import asdict, dataclass, field

from migrated.client import MachineMoved, attach
from migrated.wire.vmstate import VMState, boolean, int32, qtailq, uint32


@dataclass
class Setpoint:
    minute: int = 0
    millidegrees: int = 0


@dataclass
class Thermostat:
    reading: int = 20_000
    heating: bool = False
    override: int = 0
    program: list[Setpoint] = field(default_factory=list)


class SetpointState(VMState):
    name = "setpoint"
    fields = (uint32("minute"), int32("millidegrees"))
    new = Setpoint


class OverrideState(VMState):
    name = "thermostat/override"
    fields = (int32("override"),)

    @staticmethod
    def needed(device: Thermostat) -> bool:
        return device.override != 0  # sent only while somebody has turned the knob


class ThermostatState(VMState):
    name = "thermostat"
    version_id = 2  # 2: the program came
    minimum_version_id = 1
    fields = (
        int32("reading"),
        boolean("heating"),
        qtailq("program", SetpointState, since=2),
    )
    subsections = (OverrideState,)

    @staticmethod
    def pre_load(device: Thermostat) -> None:
        device.program, device.override = [], 0  # what an older stream does not have


def main() -> None:
    device = Thermostat(program=[Setpoint(420, 21_000), Setpoint(1320, 17_000)])
    with attach(*sys.argv[1:2]) as machine:
        machine.device("thermostat", vmstate=ThermostatState, state=device)
        machine.ready()
        while True:
            try:
                machine.wait_running()
                while True:
                    machine.checkpoint()
                    device.reading += 1
                    device.override = 22_000 if device.reading > 20_003 else 0
                    print(json.dumps(asdict(device)), flush=True)
                    time.sleep(0.05)
            except MachineMoved as moved:
                print(json.dumps({"moved": moved.peer}), flush=True)
                machine.standby()


if __name__ == "__main__":
    main()

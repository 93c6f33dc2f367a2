#!/usr/bin/env python3
"""A counter that outlives its host. Run: counter.py [ATTACH_SOCKET] (default: $MIGRATED_ATTACH)."""

import json
import os
import sys
import time

from migrated.client import MachineMoved, attach

journey = [os.getpid()]  # not RAM: it travels as the state of a device


def load(state: bytes, version_id: int) -> None:
    journey[:] = [*json.loads(state), os.getpid()]


with attach(*sys.argv[1:2]) as machine:
    memory = machine.ram("counter", 1 << 20)  # RAM: shared with the daemon, moved page by page
    machine.device("journey", save=lambda: json.dumps(journey).encode(), load=load)
    machine.ready()  # everything is declared
    while True:
        try:
            machine.wait_running()  # at the source: until `cont`; at the destination: until the state is here
            while True:
                machine.checkpoint()  # waits while the machine is stopped
                count = int.from_bytes(memory[:8], "little") + 1
                memory[:8] = count.to_bytes(8, "little")
                print(json.dumps({"count": count, "journey": journey}), flush=True)
                time.sleep(0.05)
        except MachineMoved as moved:
            print(json.dumps({"moved": moved.peer}), flush=True)
            machine.standby()  # offers the memory for the way back, and waits again

"""A workload that stands still: it declares blocks and devices and does what it is told on stdin.

The rule of the file: an ordinary client of `migrated.client`; it touches its memory only when it is asked to.

Run: ``python -m tests.support.holder --attach SOCKET --block mem0:65536 --device disk:16``. Events are JSON lines on
stdout (``ready``, ``running``, ``moved``, ``loaded``), commands are JSON lines on stdin, each answered by one event:

    {"do": "hash", "block": NAME}             {"do": "peek", "block": NAME, "offset": N, "length": N}
                                              {"do": "poke", "block": NAME, "offset": N, "hex": BYTES}
    {"do": "state", "device": NAME}           {"do": "quit"}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
from typing import Any

from migrated.client import Machine, MachineMoved, attach

_telling = threading.Lock()


def tell(event: str, **fields: Any) -> None:
    """Write one event."""
    with _telling:
        print(json.dumps({"event": event, **fields}), flush=True)


class Device:
    """Some bytes that come and go with the machine."""

    def __init__(self, machine: Machine, name: str, size: int) -> None:
        self.name = name
        self.state = bytes(i & 0xFF for i in range(size))
        machine.device(name, save=lambda: self.state, load=self._load)

    def _load(self, state: bytes, version_id: int) -> None:
        self.state = state
        tell("loaded", device=self.name, bytes=len(state), version=version_id)


class Holder:
    """Everything this process has of the machine."""

    def __init__(self, machine: Machine, blocks: list[str], devices: list[str], *, huge_pages: bool) -> None:
        self._machine = machine
        self._stopped = threading.Event()
        self._blocks = {}
        for text in blocks:
            name, _, size = text.rpartition(":")
            self._blocks[name] = machine.ram(name, int(size), huge_pages=huge_pages)
        self._devices = {}
        for text in devices:
            name, _, size = text.rpartition(":")
            self._devices[name] = Device(machine, name, int(size))
        machine.on_stop(self._stopped.set)

    def follow(self) -> None:
        """Take part in every stop, and tell where the machine is."""
        while True:
            try:
                self._machine.wait_running()
                tell("running")
                while True:
                    self._machine.checkpoint()
                    self._stopped.wait()
                    self._stopped.clear()
            except MachineMoved as moved:
                self._machine.standby()
                tell("moved", to=str(moved))

    def obey(self) -> None:
        """Do what stdin says until it ends."""
        threading.Thread(target=self.follow, daemon=True).start()
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "quit":
                return
            tell("did", **self._do(command))

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "hash":
                return {"hash": hashlib.sha256(self._blocks[command["block"]]).hexdigest()}
            case "peek":
                start = command.get("offset", 0)
                end = start + command["length"] if "length" in command else None
                return {"hex": self._blocks[command["block"]][start:end].hex()}
            case "poke":
                data = bytes.fromhex(command["hex"])
                offset = command["offset"]
                self._blocks[command["block"]][offset : offset + len(data)] = data
                return {}
            case "state":
                return {"hex": self._devices[command["device"]].state.hex()}
            case unknown:
                return {"error": f"what is {unknown!r}?"}


def main() -> None:
    """Attach, declare, obey."""
    parser = argparse.ArgumentParser(description="a workload that stands still")
    parser.add_argument("--attach", required=True, help="path of the daemon's attach socket")
    parser.add_argument("--name", default="holder")
    parser.add_argument("--block", action="append", default=[], metavar="NAME:BYTES")
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--device", action="append", default=[], metavar="NAME:BYTES")
    arguments = parser.parse_args()
    with attach(arguments.attach, name=arguments.name) as machine:
        holder = Holder(machine, arguments.block, arguments.device, huge_pages=arguments.huge_pages)
        machine.ready()
        tell("ready")
        holder.obey()


if __name__ == "__main__":
    main()

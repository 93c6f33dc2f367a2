"""A QMP connection with out-of-band commands: what a QEMU whose main thread waits for a page still answers.

The rule of the file: `start` does not wait for the answer, `finish` does; every wait has a deadline.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

DEADLINE_S = 60.0


class OobClient:
    """A negotiated connection to a QEMU."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._last_id = 0
        assert "oob" in json.loads(self._lines.readline())["QMP"]["capabilities"]
        self.finish(self.start("qmp_capabilities", {"enable": ["oob"]}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lines.close()
        self._socket.close()

    def start(self, name: str, arguments: Mapping[str, object], *, verb: str = "execute") -> int:
        """Send a command and return its number."""
        self._last_id += 1
        command = {verb: name, "arguments": dict(arguments), "id": self._last_id}
        self._socket.sendall(json.dumps(command).encode() + b"\n")
        return self._last_id

    def finish(self, number: int) -> Any:
        """Return what a command answers."""
        while number not in self._answers:
            self._read()
        answer = self._answers.pop(number)
        assert "return" in answer, answer
        return answer["return"]

    def finished(self, number: int) -> bool:
        """Say whether an answer has been seen (by `wait_status`, or by another `finish`)."""
        return number in self._answers

    def at_once(self, name: str, arguments: Mapping[str, object]) -> Any:
        """Execute a command out of band."""
        return self.finish(self.start(name, arguments, verb="exec-oob"))

    def wait_status(self, status: str) -> None:
        """Wait for the next MIGRATION event with this status."""
        while True:
            while self._events:
                event = self._events.pop(0)
                if event["event"] == "MIGRATION" and event["data"]["status"] == status:
                    return
            self._read()

    def _read(self) -> None:
        line = self._lines.readline()
        assert line, "the QEMU has ended"
        message = json.loads(line)
        if "event" in message:
            self._events.append(message)
        else:
            self._answers[message["id"]] = message

"""A real QEMU without a machine (``-M none``), whose RAM is a file: an exact oracle of what was sent or received.

A destination of postcopy has anonymous memory or a memfd instead (a userfaultfd takes no plain file), and `dump`.

The rule of the file: whatever it starts it ends, by pid, also when the test fails; it is steered over QMP with the
product's own client, and what a QEMU says before it exits (on stderr only) is kept for the error text.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrated.control.client import QmpClient
from migrated.errors import ChannelClosed
from tests.support.following import wait_until
from tests.support.oob import OobClient

PROGRAM = shutil.which("qemu-system-x86_64")
BLOCK = "mem0"
PAGE = 4096
END_DEADLINE_S = 10.0
ENDED = frozenset({"completed", "failed", "cancelled"})


class Qemu:
    """One ``-M none`` QEMU with one RAM block. ``ram`` is what the block holds at the start.

    ``memory``: file (the only one that takes ``ram``) | memfd | huge (a memfd in huge pages) | anonymous | default
    (anonymous, and called "ram").
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        size: int,
        ram: bytes | None = None,
        incoming: str = "",
        stopped: bool = False,
        memory: str = "file",
        block: str = BLOCK,
        arguments: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir()
        self.size = size
        self.ram_path = self.directory / "ram"
        if memory == "file":
            self.ram_path.write_bytes(ram if ram is not None else bytes(size))
        self._socket = self.directory / "qmp.sock"
        self._oob_socket = self.directory / "oob.sock"
        self._errors = self.directory / "stderr"
        self._incoming = incoming
        self._stopped = stopped
        self._memory = memory
        self._block = block
        self._arguments = list(arguments)

    def __enter__(self) -> Self:
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        with ExitStack() as stack:
            stack.callback(self._end)
            self.qmp = stack.enter_context(wait_until(self._connect, f"QEMU {self.name} answers"))
            self.capability("events")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _command(self) -> list[str]:
        assert PROGRAM is not None
        command = [PROGRAM, "-accel", "tcg", "-m", f"size={self.size}B", *self._ram_arguments()]
        command += ["-nodefaults", "-display", "none"]
        for socket in (self._socket, self._oob_socket):
            command += ["-qmp", f"unix:{socket},server=on,wait=off"]
        command += ["-S"] if self._stopped else []
        command += ["-incoming", self._incoming] if self._incoming else []
        return command + self._arguments

    def _ram_arguments(self) -> list[str]:
        if self._memory == "default":
            return ["-M", "none"]
        backend = {
            "file": f"memory-backend-file,mem-path={self.ram_path},share=on",
            "memfd": "memory-backend-memfd,share=on",
            "huge": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
            "anonymous": "memory-backend-ram",
        }[self._memory]
        return ["-M", f"none,memory-backend={self._block}", "-object", f"{backend},id={self._block},size={self.size}"]

    def _connect(self) -> QmpClient | None:
        assert self.process.poll() is None, f"QEMU {self.name} ended at once: {self.said()}"
        try:
            return QmpClient(str(self._socket))
        except ChannelClosed:
            return None

    def _end(self) -> None:
        self.process.kill()
        self.process.wait(END_DEADLINE_S)

    # -- asking ------------------------------------------------------------------------------------------------

    def said(self) -> str:
        """What it wrote to stderr so far."""
        return self._errors.read_text(errors="replace")

    def ram(self) -> bytes:
        """Return its memory as it is now."""
        return self.ram_path.read_bytes()

    def dump(self) -> bytes:
        """Return its memory as it sees it itself, whatever it is kept in."""
        path = self.directory / "dump"
        self.qmp.execute("pmemsave", {"val": 0, "size": self.size, "filename": str(path)})
        return path.read_bytes()

    def oob(self) -> OobClient:
        """Return a connection that is answered also while this QEMU waits for a page."""
        return self._stack.enter_context(OobClient(str(self._oob_socket)))

    def run_state(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    def query(self) -> dict[str, Any]:
        return dict(self.qmp.execute("query-migrate"))

    def capability(self, name: str, *, state: bool = True) -> None:
        self.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state}]})

    def parameter(self, name: str, value: object) -> None:
        self.qmp.execute("migrate-set-parameters", {name: value})

    def listen(self) -> str:
        """Start to wait for a machine (it was started with ``incoming="defer"``); return where."""
        self.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        address = self.query()["socket-address"][0]
        return f"tcp:{address['host']}:{address['port']}"

    def wait_status(self, statuses: Collection[str]) -> dict[str, Any]:
        """Wait until query-migrate shows one of ``statuses``; return that answer."""

        def probe() -> dict[str, Any] | None:
            answer = self.query()
            if answer.get("status") in statuses:
                return answer
            assert answer.get("status") not in ENDED, f"QEMU {self.name} ended otherwise: {answer}\n{self.said()}"
            return None

        return dict(wait_until(probe, f"QEMU {self.name} in {sorted(statuses)}"))

    def migrate(self, uri: str, statuses: Collection[str] = ("completed",)) -> dict[str, Any]:
        """Migrate and wait for the end; return query-migrate's last answer."""
        self.qmp.execute("migrate", {"uri": uri})
        return self.wait_status(statuses)

    def wait_exit(self) -> int:
        """Wait until it ended by itself (as a QEMU 7.2 does when a load fails); return its status."""
        return self.process.wait(END_DEADLINE_S)

    def events(self) -> list[dict[str, Any]]:
        """Return the events that came since the last call."""
        found = []
        while (event := self.qmp.next_event(timeout_s=0)) is not None:
            found.append(event)
        return found


MakeQemu = Callable[..., Qemu]

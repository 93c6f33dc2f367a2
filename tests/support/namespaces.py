"""A stage whose daemons live in two network namespaces, joined by a cable that can be pulled.

The rule of the file: the names are this process's own, and are taken away also when a test fails half-way. Control and
attach sockets are files: only the link between the daemons is in the namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from migrated.daemon.faults import HELD
from tests.support.stage import CONFIG, RAM_BYTES, FaultySite, Stage

PORT = 7400
#: What a source hears of a destination that is busy.
TURNED_AWAY = ("reset by peer", "closed the connection")
#: A few milliseconds of a gigabit, and as much to wait.
_BUCKET = ("burst", "256kb", "latency", "20ms")
ADDRESSES = {"A": "10.111.7.1", "B": "10.111.7.2"}


def why_not() -> str:
    """Return why this host cannot have them; nothing where it can."""
    if missing := [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]:
        return f"needs {' and '.join(missing)}"
    name = f"migrated-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"this host makes no network namespaces: {error.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Cable:
    """Two network namespaces and the link between them, which are there inside a ``with`` block."""

    def __init__(self) -> None:
        self._spaces = {name: f"migrated-{os.getpid()}-{name.lower()}" for name in ADDRESSES}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._lay()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *what: object) -> None:
        self._stack.close()

    def _lay(self) -> None:
        for space in self._spaces.values():
            _ip("netns", "add", space)
            self._stack.callback(_ip, "netns", "del", space)
        a, b = self._spaces.values()
        _ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for name, space in self._spaces.items():
            _ip("-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "cable")
            _ip("-n", space, "link", "set", "cable", "up")

    def launcher(self, name: str) -> list[str]:
        """Return what starts a program at that end."""
        return ["nsenter", f"--net=/run/netns/{self._spaces[name]}"]

    def set(self, state: str) -> None:
        """Take both ends ``up`` or ``down``."""
        for space in self._spaces.values():
            _ip("-n", space, "link", "set", "cable", state)

    def slow_down(self, rate: str) -> None:
        """Let no more through than ``rate``, in the words of tc, either way: a token bucket with a short queue."""
        for name in self._spaces:
            shape = ["tc", "qdisc", "replace", "dev", "cable", "root", "tbf", "rate", rate, *_BUCKET]
            subprocess.run([*self.launcher(name), *shape], check=True, capture_output=True, text=True)


class NamespaceStage(Stage):
    """A pair of sites, each in a namespace of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._cable = Cable()

    def _site(self, name: str) -> FaultySite:
        if name == "A":
            self._stack.enter_context(self._cable)
        other = ADDRESSES["B" if name == "A" else "A"]
        return FaultySite(
            name,
            self._directory,
            ram_bytes=RAM_BYTES,
            incoming=f"tcp:{ADDRESSES[name]}:{PORT}",
            config=CONFIG + '[tls]\nmode = "off"\n',
            allow=[other],
            launcher=self._cable.launcher(name),
        )

    def _connect(self) -> None:
        return

    def moved_to(self, site: FaultySite) -> None:
        return

    @property
    def uri(self) -> str:
        return f"tcp:{ADDRESSES[self.target.name]}:{PORT}"

    def pull(self) -> None:
        """Take the link down, at both ends."""
        self._cable.set("down")

    def mend_link(self) -> None:
        self._cable.set("up")

    def begin(self, *, postcopy: bool = False) -> None:
        """Begin to migrate; again, as long as the destination is busy with a connection that has died."""
        super().begin(postcopy=postcopy)
        while self._is_turned_away():
            super().begin(postcopy=postcopy)

    def _is_turned_away(self) -> bool:
        held = self.source.faults / f"source.setup{HELD}"
        self.wait(lambda: held.exists() or self.source.status()["status"] != "setup", "the destination takes it")
        return any(why in self.source.status().get("error-desc", "") for why in TURNED_AWAY)


def _ip(*arguments: str) -> None:
    subprocess.run([shutil.which("ip") or "ip", *arguments], check=True, capture_output=True, text=True)

"""What the daemon tells systemd: READY, STATUS, STOPPING, and the watchdog's sign of life.

The rule of the file: telling never fails the daemon and never blocks it. Without a service manager nothing is sent, and
without a watchdog nothing ever wakes up.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import MutableMapping
from typing import Self

#: STATUS is one line on an operator's screen.
STATUS_MAX = 200


class Notifier:
    """Talks to one service manager, or to nobody."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        self._address = address
        self._interval_s = None if watchdog_s is None else watchdog_s / 2
        self._status = ""

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Self:
        """Take the service manager's variables *out of* the environment: what we start must not talk in our name."""
        address = environment.pop("NOTIFY_SOCKET", None)
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        watchdog_pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        enabled = watchdog_us.isdigit() and int(watchdog_us) > 0 and watchdog_pid == str(os.getpid())
        return cls(address, int(watchdog_us) / 1_000_000 if enabled else None)

    def ready(self, status: str = "") -> None:
        """Tell that the start is over."""
        self._send("READY=1", *([f"STATUS={_line(status)}"] if status else []))

    def status(self, text: str) -> None:
        """Tell in one line what is going on; the same line is not told twice."""
        if (line := _line(text)) != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def stopping(self) -> None:
        """Tell that the stop has begun."""
        self._send("STOPPING=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for this much more time to start or stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    async def keep_watchdog(self) -> None:
        """Show that the event loop turns, until cancelled; returns at once where nobody watches."""
        if self._interval_s is None or not self._address:
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._interval_s)

    def _send(self, *lines: str) -> None:
        if not self._address or self._address[0] not in "/@":
            return
        # An abstract socket's name begins with NUL, which an environment variable cannot hold.
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        # A manager that does not listen (any more) is not our concern.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sock:
            sock.sendto("\n".join(lines).encode(), address)


def _line(text: str) -> str:
    return " ".join(text.split())[:STATUS_MAX]

"""Waiting for a migration to end, with something to look at.

The rule of the file: it never changes how the daemon works. It polls, woken early by whatever event comes anyway;
the only command it sends is the cancel that the operator asked for with Ctrl-C.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from migrated.cli.display import Display
from migrated.cli.exit_code import ExitCode, exit_code_of
from migrated.cli.progress import read_progress
from migrated.control.client import QmpClient
from migrated.errors import CommandError

POLL_S = 0.2


class Interrupts:
    """How often the operator pressed Ctrl-C."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def counted_interrupts() -> Iterator[Interrupts]:
    """Count SIGINT instead of raising, so that no answer is torn in the middle."""
    interrupts = Interrupts()
    before = signal.signal(signal.SIGINT, interrupts.add)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_load(
    client: QmpClient, display: Display, interrupts: Interrupts, earlier: str | None
) -> tuple[ExitCode, dict[str, Any]]:
    """Poll until the load is over; return the verdict and query-migrate's last answer.

    ``earlier`` is the id of the migration that query-migrate told of before. A load cannot be cancelled: the first
    Ctrl-C leaves. Raises ChannelError when the daemon is lost.
    """
    while True:
        info = client.execute("query-migrate")
        # A QEMU gives no ids, and loads once.
        if (identity := info.get("x-migrated-migration-id")) is None or identity != earlier:
            display.update(read_progress(info))
            if (code := exit_code_of(info)) is not None:
                return code, info
        if interrupts.count:
            return ExitCode.INTERRUPTED, info
        client.next_event(POLL_S)


def wait_for_end(client: QmpClient, display: Display, interrupts: Interrupts) -> tuple[ExitCode, dict[str, Any]]:
    """Poll until the migration is over, or the operator leaves; return the verdict and query-migrate's last answer.

    The first Ctrl-C cancels the migration and goes on waiting, for a cancel may come too late; the second leaves.
    Raises ChannelError when the daemon is lost.
    """
    seen = Seen(display)
    cancelled = False
    while True:
        info = client.execute("query-migrate")
        display.update(read_progress(info))
        seen.say_what_is_new(info)
        if (code := exit_code_of(info)) is not None:
            return code, info
        if interrupts.count > 1:
            return ExitCode.INTERRUPTED, info
        if interrupts.count and not cancelled:
            cancelled = True
            _cancel(client, display)
        client.next_event(POLL_S)


class Seen:
    """Remarks that are made once, not at every poll."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._said: set[str] = set()

    def say_what_is_new(self, info: dict[str, Any]) -> None:
        progress = read_progress(info)
        if progress.warning:
            self._once("convergence", f"Not converging: {progress.warning.removeprefix('not converging: ')}")
        else:
            self._said.discard("convergence")
        if progress.status == "pre-switchover":
            self._once("pause", "Paused before the switchover, the machine is stopped: 'migratectl continue' goes on")

    def _once(self, topic: str, text: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            self._display.note(text)


def _cancel(client: QmpClient, display: Display) -> None:
    display.note("Cancelling; press Ctrl-C again to leave without waiting")
    try:
        client.execute("migrate_cancel")
    except CommandError as error:
        display.note(f"Cannot cancel: {error}")

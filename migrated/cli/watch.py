"""Waiting for a migration to end, with something to look at.

The rule of the file: it never changes how the daemon works. It polls, woken early by whatever event comes anyway;
the only commands it sends are those that the operator asked for: the cancel of Ctrl-C, and an `Errand`'s.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from migrated.cli.display import Display
from migrated.cli.exit_code import ExitCode, exit_code_of
from migrated.cli.postcopy import Reconnect, is_postcopy, pause_note
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


def wait_for_job(
    client: QmpClient,
    job_id: str,
    show: Callable[[Mapping[str, Any]], None],
    interrupts: Interrupts,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Poll until a job has ended, or the operator leaves; return its last line of query-jobs.

    The first Ctrl-C cancels the job, the second leaves. Raises ChannelError when the daemon is lost.
    """
    cancelled = False
    while True:
        job: dict[str, Any] = next(job for job in client.execute("query-jobs") if job["id"] == job_id)
        show(job)
        if job["status"] == "concluded" or interrupts.count > 1:
            return job
        if interrupts.count and not cancelled:
            cancelled = True
            note("Cancelling; press Ctrl-C again to leave without waiting")
            try:
                client.execute("job-cancel", {"id": job_id})
            except CommandError as error:
                note(f"Cannot cancel: {error}")
        client.next_event(POLL_S)


class Errand(Protocol):
    """Something to be done at the right moment of a migration."""

    @property
    def poll_s(self) -> float | None:
        """How soon to look again; None: no sooner than anybody else needs."""
        ...

    def look(self, info: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Act on query-migrate's answer."""
        ...


def wait_for_end(
    client: QmpClient, display: Display, interrupts: Interrupts, errand: Errand | None = None
) -> tuple[ExitCode, dict[str, Any]]:
    """Poll until the migration is over, or the operator leaves; return the verdict and query-migrate's last answer.

    The first Ctrl-C cancels the migration and goes on waiting, for a cancel may come too late; the second leaves. In
    postcopy nothing can be cancelled: the first one leaves. Raises ChannelError when the daemon is lost.
    """
    seen = Seen(display, knows_of_pause=isinstance(errand, Reconnect))
    cancelled = False
    while True:
        info = client.execute("query-migrate")
        display.update(read_progress(info))
        seen.say_what_is_new(info)
        if (code := exit_code_of(info)) is not None:
            return code, info
        if interrupts.count > 1 or (interrupts.count and is_postcopy(info)):
            return ExitCode.INTERRUPTED, info
        if interrupts.count and not cancelled:
            cancelled = True
            _cancel(client, display)
        if errand is not None:
            errand.look(info, display.note)
        client.next_event((errand.poll_s if errand else None) or POLL_S)


class Seen:
    """Remarks that are made once, not at every poll."""

    def __init__(self, display: Display, *, knows_of_pause: bool = False) -> None:
        self._display = display
        self._knows_of_pause = knows_of_pause
        self._said: set[str] = set()

    def say_what_is_new(self, info: dict[str, Any]) -> None:
        progress = read_progress(info)
        if progress.warning:
            self._once("convergence", f"Not converging: {progress.warning.removeprefix('not converging: ')}")
        else:
            self._said.discard("convergence")
        if progress.status == "pre-switchover":
            self._once("pause", "Paused before the switchover, the machine is stopped: 'migratectl continue' goes on")
        self._say_how_postcopy_goes(info)

    def _say_how_postcopy_goes(self, info: dict[str, Any]) -> None:
        match info.get("status"):
            case "postcopy-active" if "paused" in self._said:
                self._said = {topic for topic in self._said if not topic.startswith("paused")}
                self._display.note("Connected again; the rest of the memory follows")
            case "postcopy-active":
                where = info.get("x-migrated-peer", {}).get("address") or "the destination"
                self._once("postcopy", f"The machine is at {where} now, and its memory follows: no way back")
            case "postcopy-paused":
                reason = info.get("error-desc")
                first = "paused" not in self._said
                self._said.add("paused")
                if first and self._knows_of_pause:
                    self._said.add(f"paused: {reason}")
                self._once(f"paused: {reason}", pause_note(info) if first else f"Still paused: {reason}")
            case _:
                return

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

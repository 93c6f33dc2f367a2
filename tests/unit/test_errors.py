"""What an error knows besides its text."""

from __future__ import annotations

import errno

import pytest

from migrated.error_ids import ERROR_IDS
from migrated.errors import (
    ArgumentError,
    Blocker,
    ChannelTimeout,
    CommandError,
    KernelError,
    MigratedError,
    PreflightBlocked,
    RemoteProtocolError,
    WorkloadError,
)


@pytest.mark.parametrize(
    ("error", "error_id"),
    [
        (MigratedError("what"), "internal"),
        (MigratedError("what", error_id="host-io"), "host-io"),
        (CommandError("no"), "command-refused"),
        (CommandError("no", error_id="busy"), "busy"),
        (ArgumentError("no"), "argument-invalid"),
        (RemoteProtocolError("what", section="ram"), "stream-invalid"),
        (ChannelTimeout("silence"), "link-timeout"),
        (WorkloadError("w", "gone"), "workload-failed"),
        (KernelError("access", errno.EROFS, error_id="state-read-only"), "state-read-only"),
    ],
)
def test_every_error_has_an_id_and_a_next_step(error: MigratedError, error_id: str) -> None:
    assert error.error_id == error_id
    assert error.row is ERROR_IDS[error_id]
    assert error.next_step == ERROR_IDS[error_id].next_step
    assert error.statement == str(error)


def test_a_text_knows_its_next_step_better() -> None:
    error = CommandError("no. Next: say please. Next time, too")
    assert (error.statement, error.next_step) == ("no", "say please. Next time, too")


def test_what_programs_are_told() -> None:
    assert CommandError("no. Next: wait", error_id="busy").explain("setup", "all is well") == {
        "id": "busy", "fault": "operator", "phase": "setup", "known": "all is well", "next-step": "wait",
    }  # fmt: skip


def test_what_would_be_an_error_later_is_a_blocker_now() -> None:
    error = KernelError("statvfs", errno.ENOSPC, "0 bytes", error_id="state-disk-full")
    blocker = Blocker.of(error, "source")
    next_step = ERROR_IDS["state-disk-full"].next_step
    assert blocker == Blocker("state-disk-full", "source", "statvfs: ENOSPC (0 bytes)", next_step)
    assert Blocker.of(CommandError("late", error_id="clock-skew"), "source").warning


def test_all_blockers_are_one_error_and_warnings_are_not_its_reason() -> None:
    blockers = [Blocker("block-size", "destination", "a", "b"), Blocker("clock-skew", "destination", "c", "d", True)]
    error = PreflightBlocked([*blockers, Blocker("state-disk-full", "source", "e", "f")])
    assert str(error) == "nothing was moved: destination: a [block-size]; source: e [state-disk-full]"
    assert len(error.blockers) == 3

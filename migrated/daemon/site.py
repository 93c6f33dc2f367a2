"""The host that a daemon runs on: its memory, its clock, the disk of the ownership record.

The rule of the file: it answers from what is so now and keeps nothing but the reservation. Daemons of one host find
each other's reservations beside their own, in the runtime directories next to theirs (as the units lay them out); one
that is not renewed ends by itself, so a daemon that died keeps nobody out for long.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from migrated.errors import KernelError, MigratedError
from migrated.kernel.host_memory import available_bytes
from migrated.kernel.memory import PAGE_SIZE, STAT_BLOCK_BYTES, reserve
from migrated.savevm.ports import RamBlockPort

RESERVATION = "memory-reserved.json"
#: A machine that is loaded more slowly has most of its memory by then; what has come is no longer free anyway.
RESERVED_FOR_S = 60.0
RESERVATION_MAX_BYTES = 4096
#: Two records (the old one is there until the new one is complete), rounded up to a file system's largest blocks.
RECORD_ROOM_BYTES = 128 << 10


class _Reservation(msgspec.Struct, frozen=True):
    size_bytes: int
    until_s: float
    """CLOCK_MONOTONIC, which all processes of a host share."""


class HostSite:
    """Implements `migration.host.SitePort`."""

    def __init__(
        self,
        state: Path,
        runtime: Path,
        blocks: Callable[[], Sequence[RamBlockPort]],
        tool: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tool = tool
        self._state = state
        self._path = runtime / RESERVATION
        self._blocks = blocks
        self._clock = clock

    def clock_ms(self) -> int:
        """Return the wall clock."""
        return time.time_ns() // 1_000_000

    def processors(self) -> int:
        """Return how many processors this program may use."""
        return len(os.sched_getaffinity(0))

    def used_bytes(self, block: RamBlockPort) -> int:
        """Return how much of a block is not a hole."""
        return os.fstat(block.memfd).st_blocks * STAT_BLOCK_BYTES

    def free_bytes(self) -> int:
        """Return what the host can give; what is in the blocks here is given back when a machine arrives."""
        here = sum(self.used_bytes(block) for block in self._blocks() if block.page_size == PAGE_SIZE)
        return max(available_bytes() + here - self._reserved_by_others(), 0)

    def huge_page_obstacles(self) -> list[MigratedError]:
        """Reserve huge pages for the blocks here that consist of them; return what stands against that."""
        found: list[MigratedError] = []
        for block in self._blocks():
            if block.page_size > PAGE_SIZE:
                try:
                    reserve(block.memfd, block.size_bytes, f"RAM block {block.name}")
                except KernelError as error:
                    found.append(error)
        return found

    def reserve(self, size_bytes: int) -> None:
        """Reserve until `RESERVED_FOR_S` from now, instead of what was reserved before; 0 ends it."""
        if not size_bytes:
            self._path.unlink(missing_ok=True)
            return
        reservation = _Reservation(size_bytes, self._clock() + RESERVED_FOR_S)
        aside = self._path.with_suffix(".new")
        aside.write_bytes(msgspec.json.encode(reservation))
        aside.replace(self._path)

    def record_obstacles(self) -> list[MigratedError]:
        """Return what stands against writing the ownership record."""
        room = os.statvfs(self._state)
        if room.f_flag & os.ST_RDONLY or not os.access(self._state, os.W_OK):
            hint = f"the state directory {self._state} cannot be written"
            return [KernelError("access", errno.EROFS, hint, error_id="state-read-only")]
        if room.f_bavail * room.f_frsize < RECORD_ROOM_BYTES:
            hint = f"{room.f_bavail * room.f_frsize} bytes are free in {self._state}, expected {RECORD_ROOM_BYTES}"
            return [KernelError("statvfs", errno.ENOSPC, hint, error_id="state-disk-full")]
        return []

    def _reserved_by_others(self) -> int:
        paths = self._path.parent.parent.glob(f"*/{RESERVATION}")
        return sum(self._reserved(path) for path in paths if path != self._path)

    def _reserved(self, path: Path) -> int:
        with contextlib.suppress(OSError, msgspec.DecodeError), path.open("rb") as file:
            reservation = msgspec.json.decode(file.read(RESERVATION_MAX_BYTES), type=_Reservation)
            # Nobody reserves for longer: a time further on is one of before the host was started anew.
            if 0 < reservation.until_s - self._clock() <= RESERVED_FOR_S:
                return max(reservation.size_bytes, 0)
        return 0

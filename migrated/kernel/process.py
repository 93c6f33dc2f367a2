"""Other processes: handles that outlive a pid, signals, and "has it stopped?".

The rule of the file: a process is held by pidfd; a bare pid is used only to read /proc, and only while the pidfd says
that the process is still there. No numpy here: the client library imports this module.

Source: pidfd_open(2), proc(5).
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
from dataclasses import dataclass

from migrated.errors import KernelError

# Newer than Python 3.11's socket module; asm-generic/socket.h.
SO_PEERPIDFD = 77
_PAGEMAP_LINK = re.compile(r"/proc/(\d+)/(?:task/\d+/)?pagemap")


@dataclass(frozen=True, slots=True)
class MapsEntry:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    device: tuple[int, int]
    inode: int


def peer_pidfd(sock: socket.socket, pid: int) -> int:
    """Return a pidfd of the process that connected a Unix socket; without a pid race where the kernel can (6.5)."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.ENODATA):
            raise KernelError("SO_PEERPIDFD", error.errno or 0) from error
    return open_pidfd(pid)


def open_pidfd(pid: int) -> int:
    """Return a handle of a process that is not fooled by a pid used again."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise KernelError("pidfd_open", error.errno or 0, f"pid {pid}") from error


def send_signal(pidfd: int, number: signal.Signals) -> None:
    """Send a signal. KernelError ESRCH when the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except OSError as error:
        raise KernelError("pidfd_send_signal", error.errno or 0, number.name) from error


def has_exited(pidfd: int) -> bool:
    """Say whether the process behind a pidfd has ended (it may still wait to be reaped)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def all_tasks_stopped(pid: int) -> bool:
    """Say whether every thread of a process is stopped ('T'); True also for one whose threads are all gone or zombies.

    A thread that waits in the kernel for a page or for a disk (state D) is not stopped: it could still write.
    """
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return True
    return all(_task_state(pid, task) in "TtZXx" for task in tasks)


def _task_state(pid: int, task: str) -> str:
    try:
        with open(f"/proc/{pid}/task/{task}/stat", "rb") as stat:
            content = stat.read()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    # pid (comm) state ...: comm may contain blanks and brackets, so look behind the last one.
    return content[content.rindex(b")") + 2 :][:1].decode()


def process_name(pid: int) -> str:
    """Return the short name of a process (comm), or "?" when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().rstrip("\n")
    except OSError:
        return "?"


def pagemap_owner(fd: int) -> int | None:
    """Return the pid whose pagemap ``fd`` is; None when it is a file that /proc as seen from here does not name.

    Raises KernelError when it is certainly not a pagemap.
    """
    link = os.readlink(f"/proc/self/fd/{fd}")
    if match := _PAGEMAP_LINK.fullmatch(link):
        return int(match.group(1))
    # A /proc of another mount namespace shows without its mount point.
    if not link.endswith("/pagemap"):
        raise KernelError("readlink", errno.EINVAL, f"not a pagemap but {link[:80]}")
    return None


def read_maps(pid: int, start: int, end: int) -> list[MapsEntry]:
    """Return the entries of a process's memory map that touch [start, end), ascending.

    Raises KernelError EACCES or EPERM when this process may not look, ESRCH when it is gone.
    """
    entries = []
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                entry = _parse_maps_line(line)
                if entry.start >= end:
                    break
                if entry.end > start:
                    entries.append(entry)
    except FileNotFoundError as error:
        raise KernelError("open", errno.ESRCH, f"/proc/{pid}/maps") from error
    except OSError as error:
        raise KernelError("open", error.errno or 0, f"/proc/{pid}/maps") from error
    return entries


def _parse_maps_line(line: str) -> MapsEntry:
    # start-end perms offset major:minor inode path
    where, permissions, offset, device, inode = line.split(maxsplit=5)[:5]
    start, end = where.split("-")
    major, minor = device.split(":")
    return MapsEntry(
        int(start, 16), int(end, 16), permissions, int(offset, 16), (int(major, 16), int(minor, 16)), int(inode)
    )

"""Missing pages of another process: read who waits for which, put pages in place, once.

The rule of the file: a call says how far it got and what stood in its way; nothing is placed twice and nothing is
decided here. A page that is populated is never overwritten (EEXIST), and its waiters are not woken: see
`userfault.wake`. Destination addresses are those of the process the userfaultfd belongs to, source addresses are ours.

A range that meets an obstacle ends before it: the kernel answers EAGAIN and how much it placed, and names the obstacle
to whoever tries again from there, which is done here. About 2 us for one page, 4 GB/s for 1 MiB.

Source: ioctl_userfaultfd(2), mm/userfaultfd.c (6.18).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from migrated.errors import KernelError
from migrated.kernel import userfault

_COPY = struct.Struct("=QQQQq")  # dst, src, len, mode, copied(out)
_FILL = struct.Struct("=QQQq")  # start, len, mode, done(out): of ZEROPAGE and POISON
_PAGE = 4096
_DONE = struct.Struct("=q")  # the last field of both
_FAULT = struct.Struct("=B7xQQI4x")  # event, flags, address, thread id

assert userfault.UFFDIO_COPY >> 16 & 0x3FFF == _COPY.size
assert userfault.UFFDIO_ZEROPAGE >> 16 & 0x3FFF == userfault.UFFDIO_POISON >> 16 & 0x3FFF == _FILL.size
assert _FAULT.size == 32

#: Do not wake who waits; `userfault.wake` does it for a larger range later. Same number for COPY, ZEROPAGE and POISON.
MODE_DONTWAKE = 1 << 0
#: COPY only: place write-protected, so that the page counts as clean in the dirty log.
MODE_COPY_WP = 1 << 1

FAULT_WRITE = 1 << 0
FAULT_WP = 1 << 1
FAULT_MINOR = 1 << 2
_EVENT_PAGEFAULT = 0x12

#: What missing pages are served with: faults of shared memory, by thread, and an honest end for a page that is lost.
_FEATURES_MISSING = userfault.FEATURE_MISSING_SHMEM | userfault.FEATURE_THREAD_ID | userfault.FEATURE_POISON
#: FORK, REMAP, REMOVE, UNMAP: whoever negotiated them gets events that somebody has to answer (FORK even installs a
#: descriptor in the reader), and COPY fails with EAGAIN meanwhile. Nobody here asks for them.
_FEATURES_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6

#: What may stand in the way of a page without anybody having made a mistake: it is populated; its range is no longer
#: registered or mapped; its process is gone; the host has no memory left; the memory map is changing.
OBSTACLES = frozenset({errno.EEXIST, errno.ENOENT, errno.ESRCH, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN})
#: The obstacles that mean: nobody waits there any more.
GONE = frozenset({errno.ENOENT, errno.ESRCH})
#: EAGAIN without progress means that the page tables changed under the call, and again is at once; a memory map that
#: goes on changing must not keep this thread for ever.
_ATTEMPTS = 1000


class Placed(NamedTuple):
    """How many bytes from the start of a range were placed, and the errno of what stands behind them (0: all is done).

    The errno is one of OBSTACLES. ENOENT is also said of a whole range that crosses from one mapping into the next (the
    process split it, by mprotect for example): smaller ranges tell.
    """

    placed: int
    obstacle: int = 0


class Fault(NamedTuple):
    """A thread (its id as its own pid namespace has it) waits for the page at ``address``; flags are FAULT_*."""

    address: int
    thread_id: int
    flags: int


def can_serve_missing(fd: int) -> bool:
    """Say whether a userfaultfd was opened with the features that missing pages need, and with no events.

    It cannot say whether it was opened with UFFD_USER_MODE_ONLY, which the kernel does not show: then system calls on
    missing pages fail with EFAULT instead of waiting.
    """
    features = userfault.negotiated_features(fd)
    return features is not None and features & (_FEATURES_MISSING | _FEATURES_EVENTS) == _FEATURES_MISSING


def read_faults(fd: int, maximum: int = 64) -> list[Fault]:
    """Return the faults that arrived, one per waiting thread, at most ``maximum``; none where nobody waits now.

    A fault is told once. `userfault.wake` makes a thread whose page is still missing fault again.
    """
    try:
        raw = os.read(fd, maximum * _FAULT.size)
    except BlockingIOError:
        return []
    except OSError as error:
        raise KernelError("read", error.errno or 0, "userfaultfd") from error
    faults = []
    for event, flags, address, thread_id in _FAULT.iter_unpack(raw):
        if event != _EVENT_PAGEFAULT:
            raise KernelError("read", errno.EPROTO, f"userfaultfd event {event:#x} that nobody asked for")
        faults.append(Fault(address, thread_id, flags))
    return faults


def copy(fd: int, destination: int, source: int, length: int, mode: int = 0) -> Placed:
    """Place copies of our memory at ``source``, and wake who waits there.

    ``mode`` is MODE_DONTWAKE and MODE_COPY_WP. Raises KernelError for what is no obstacle: a range that is not whole
    pages, memory of ours that cannot be read.
    """
    return _place(
        "UFFDIO_COPY",
        fd,
        userfault.UFFDIO_COPY,
        length,
        lambda done: _COPY.pack(destination + done, source + done, length - done, mode, 0),
    )


def copy_page(fd: int, destination: int, source: int) -> int:
    """Place one page and wake who waits for it, as `copy` does, faster; return the errno of an obstacle, 0 without."""
    argument = bytearray(_COPY.pack(destination, source, _PAGE, 0, 0))
    return _call("UFFDIO_COPY", fd, userfault.UFFDIO_COPY, argument)


def zeropage(fd: int, destination: int, length: int, mode: int = 0) -> Placed:
    """Place pages of zeros, and wake who waits there; on shared memory each is a page of its own."""
    return _place(
        "UFFDIO_ZEROPAGE",
        fd,
        userfault.UFFDIO_ZEROPAGE,
        length,
        lambda done: _FILL.pack(destination + done, length - done, mode, 0),
    )


def poison(fd: int, destination: int, length: int, mode: int = 0) -> Placed:
    """Declare pages lost: whoever touches one gets SIGBUS, a system call EFAULT. Other mappings do not notice."""
    return _place(
        "UFFDIO_POISON",
        fd,
        userfault.UFFDIO_POISON,
        length,
        lambda done: _FILL.pack(destination + done, length - done, mode, 0),
    )


def _place(name: str, fd: int, number: int, length: int, argument: Callable[[int], bytes]) -> Placed:
    """Run an ioctl from where it ended the last time, until all is placed or it ends without any progress."""
    done, attempts = 0, _ATTEMPTS
    while True:
        buffer = bytearray(argument(done))
        obstacle = _call(name, fd, number, buffer)
        if not obstacle:
            return Placed(length)
        more = _progress(obstacle, buffer)
        done += more
        attempts -= not more
        if not more and (obstacle != errno.EAGAIN or not attempts):
            return Placed(done, obstacle)


def _call(name: str, fd: int, number: int, buffer: bytearray) -> int:
    """Run one ioctl and return the errno of an obstacle, 0 if there was none; ``buffer`` has the answer either way."""
    try:
        fcntl.ioctl(fd, number, buffer)
    except OSError as error:
        code = error.errno or 0
        if code not in OBSTACLES:
            raise KernelError(name, code) from error
        return code
    return 0


def _progress(code: int, buffer: bytearray) -> int:
    """Return how many bytes a call that ended with an obstacle placed before it."""
    if code != errno.EAGAIN:
        return 0
    (done,) = _DONE.unpack_from(buffer, len(buffer) - _DONE.size)
    return max(0, int(done))

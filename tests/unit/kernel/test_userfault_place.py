"""Missing pages on the real kernel: who waits, what was placed, what stood in the way.

What waits for a page is a process of its own: a thread of this one that waits with the interpreter's lock held would
stop the test that is to serve it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.errors import KernelError
from migrated.kernel import memory, pagemap, userfault
from migrated.kernel import userfault_place as place
from migrated.kernel.userfault_place import Fault, Placed

PAGE = memory.PAGE_SIZE
SIZE = 16 * PAGE
MISSING = userfault.MODE_MISSING | userfault.MODE_WP
EVENT_REMOVE = 1 << 3


@pytest.fixture
def source() -> Iterator[memory.Mapping]:
    """Memory of ours: page p is full of the byte p + 1."""
    fd = memory.create_memfd("source", SIZE)
    mapping = memory.Mapping(fd, SIZE)
    os.close(fd)
    mapping.view[:] = b"".join(bytes([page + 1]) * PAGE for page in range(16))
    yield mapping
    mapping.close()


class Target:
    """Memory of this process whose pages are missing; it is only looked at through the descriptor."""

    def __init__(self, features: int = userfault.FEATURES_TRACKING) -> None:
        self.memfd = memory.create_memfd("target", SIZE)
        self.mapping = memory.Mapping(self.memfd, SIZE)
        self.address = self.mapping.address
        self.uffd = userfault.open_userfaultfd(features)
        userfault.register(self.uffd, self.address, SIZE, MISSING)

    def close(self) -> None:
        os.close(self.uffd)
        os.close(self.memfd)
        self.mapping.close()

    def pages(self) -> list[int | None]:
        """The first byte of every page; None where there is none."""
        found: list[int | None] = [None] * 16
        for start, end in memory.data_extents(self.memfd, 0, SIZE):
            for offset in range(start, end, PAGE):
                found[offset // PAGE] = os.pread(self.memfd, 1, offset)[0]
        return found


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    yield made
    made.close()


# -- placing ---------------------------------------------------------------------------------------------------


def test_pages_are_placed_where_there_are_none(target: Target, source: memory.Mapping) -> None:
    assert place.copy(target.uffd, target.address + 2 * PAGE, source.address, 3 * PAGE) == Placed(3 * PAGE)
    assert target.pages() == [None, None, 1, 2, 3] + [None] * 11


def test_a_populated_page_is_never_overwritten(target: Target, source: memory.Mapping) -> None:
    os.pwrite(target.memfd, b"\xaa", 4 * PAGE)
    for done in (
        place.copy(target.uffd, target.address + 4 * PAGE, source.address, PAGE),
        place.copy(target.uffd, target.address + 4 * PAGE, source.address, 4 * PAGE),
        place.zeropage(target.uffd, target.address + 4 * PAGE, PAGE),
    ):
        assert done == Placed(0, errno.EEXIST)
    assert target.pages() == [None] * 4 + [0xAA] + [None] * 11


def test_a_range_ends_before_a_populated_page(target: Target, source: memory.Mapping) -> None:
    os.pwrite(target.memfd, b"\xaa", 4 * PAGE)
    assert place.copy(target.uffd, target.address, source.address, 8 * PAGE) == Placed(4 * PAGE, errno.EEXIST)
    after = 5 * PAGE
    assert place.zeropage(target.uffd, target.address + after, 4 * PAGE) == Placed(4 * PAGE)
    assert target.pages() == [1, 2, 3, 4, 0xAA, 0, 0, 0, 0] + [None] * 7
    done = place.zeropage(target.uffd, target.address + 2 * PAGE, PAGE)
    assert done == Placed(0, errno.EEXIST)


def test_poison_ends_before_a_populated_page(target: Target, source: memory.Mapping) -> None:
    place.copy(target.uffd, target.address + 3 * PAGE, source.address, PAGE)
    assert place.poison(target.uffd, target.address, 8 * PAGE) == Placed(3 * PAGE, errno.EEXIST)


def test_a_page_can_be_placed_clean(target: Target, source: memory.Mapping) -> None:
    place.copy(target.uffd, target.address, source.address, 2 * PAGE, place.MODE_COPY_WP)
    place.copy(target.uffd, target.address + 2 * PAGE, source.address, PAGE)
    maps = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        target.mapping.view[PAGE] = 1  # placed: touching it waits for nobody
        starts, ends = pagemap.scan(maps, target.address, 3 * PAGE)
        assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [(1, 3)]
    finally:
        os.close(maps)


def test_what_is_not_registered_is_no_place(target: Target, source: memory.Mapping) -> None:
    userfault.unregister(target.uffd, target.address, SIZE)
    assert place.copy(target.uffd, target.address, source.address, PAGE) == Placed(0, errno.ENOENT)
    assert errno.ENOENT in place.GONE


def test_a_mapping_that_was_split_takes_no_range_across(target: Target, source: memory.Mapping) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(target.address + 4 * PAGE, PAGE, 1) == 0
    assert place.copy(target.uffd, target.address, source.address, 8 * PAGE) == Placed(0, errno.ENOENT)
    assert place.copy(target.uffd, target.address, source.address, 4 * PAGE) == Placed(4 * PAGE)
    assert place.copy(target.uffd, target.address + 4 * PAGE, source.address, PAGE) == Placed(PAGE)


def test_our_own_mistakes_are_errors(target: Target, source: memory.Mapping) -> None:
    with pytest.raises(KernelError, match="UFFDIO_COPY: EINVAL"):
        place.copy(target.uffd, target.address + 1, source.address, PAGE)
    with pytest.raises(KernelError, match="UFFDIO_ZEROPAGE: EINVAL"):
        place.zeropage(target.uffd, target.address, 0)
    with pytest.raises(KernelError, match="UFFDIO_POISON: EINVAL"):
        place.poison(target.uffd, target.address, PAGE, 1 << 40)
    with pytest.raises(KernelError, match="UFFDIO_COPY: EFAULT"):
        place.copy(target.uffd, target.address, 0x1000, PAGE)
    with pytest.raises(KernelError, match="UFFDIO_COPY: ENOTTY"):
        place.copy(target.memfd, target.address, source.address, PAGE)


# -- features and events ---------------------------------------------------------------------------------------


def test_what_serves_missing_pages(target: Target) -> None:
    assert place.can_serve_missing(target.uffd)
    for features in (userfault.FEATURE_MISSING_SHMEM, userfault.FEATURES_TRACKING | EVENT_REMOVE):
        fd = userfault.open_userfaultfd(features)
        assert not place.can_serve_missing(fd)
        os.close(fd)
    with Path(os.devnull).open() as other:
        assert not place.can_serve_missing(other.fileno())


def test_nobody_waits(target: Target) -> None:
    assert place.read_faults(target.uffd) == []
    unfinished = userfault._syscall(os.O_CLOEXEC | os.O_NONBLOCK)  # no handshake yet
    with pytest.raises(KernelError, match=r"read: EINVAL \(userfaultfd\)"):
        place.read_faults(unfinished)
    os.close(unfinished)


def test_a_memory_map_that_goes_on_changing_is_an_obstacle(source: memory.Mapping) -> None:
    target = Target(userfault.FEATURES_TRACKING | EVENT_REMOVE)
    remover = threading.Thread(target=memory._libc.madvise, args=(target.address, SIZE, 4))  # MADV_DONTNEED
    remover.start()  # waits until its event was read
    wait_readable(target.uffd)
    assert place.copy(target.uffd, target.address, source.address, PAGE) == Placed(0, errno.EAGAIN)
    with pytest.raises(KernelError, match=r"EPROTO.*event 0x15 that nobody asked for"):
        place.read_faults(target.uffd)
    remover.join()
    assert place.copy(target.uffd, target.address, source.address, PAGE) == Placed(PAGE)
    target.close()


# -- who waits -------------------------------------------------------------------------------------------------

#: Registers its memory, hands over [userfaultfd, memfd] and its address, and looks at a page in a new thread for every
#: line on stdin. memcpy is called without the interpreter's lock. Every look is told as "PAGE THREAD BYTE".
WAITER = """
import ctypes, os, socket, sys, threading
from migrated.kernel import memory, userfault
size = 16 * 4096
memfd = memory.create_memfd("waiter", size)
mapping = memory.Mapping(memfd, size)
uffd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
userfault.register(uffd, mapping.address, size, userfault.MODE_MISSING | userfault.MODE_WP)
link = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(link, [str(mapping.address).encode()], [uffd, memfd])
libc = ctypes.CDLL(None)
libc.memcpy.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t

def look(page, write):
    byte = ctypes.create_string_buffer(b"w", 1)
    ends = mapping.address + page * 4096, ctypes.addressof(byte)
    libc.memcpy(*(ends if write else reversed(ends)), 1)
    os.write(1, b"%d %d %d\\n" % (page, threading.get_native_id(), byte.raw[0]))

for line in sys.stdin:
    page, _, write = line.partition(" ")
    threading.Thread(target=look, args=(int(page), bool(write)), daemon=True).start()
"""


class Waiter:
    """The other process, with its descriptors here."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WAITER, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            text, fds, _, _ = socket.recv_fds(ours, 100, 2, flags=socket.MSG_CMSG_CLOEXEC)
        self.address = int(text)
        self.uffd, self.memfd = fds

    def look(self, page: int, *, write: bool = False) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{page}{' write' * write}\n".encode())
        self.process.stdin.flush()

    def seen(self) -> list[int]:
        """Wait for the next look that came back: page, thread, byte."""
        assert self.process.stdout is not None
        return [int(word) for word in self.process.stdout.readline().split()]

    def faults(self, count: int) -> list[Fault]:
        """Wait for this many faults."""
        found: list[Fault] = []
        while len(found) < count:
            wait_readable(self.uffd)
            found += place.read_faults(self.uffd)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        os.close(self.uffd)
        os.close(self.memfd)


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    made = Waiter()
    yield made
    made.close()


def wait_readable(fd: int) -> None:
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    assert waiting.poll()


def test_a_fault_says_who_waits_where(waiter: Waiter, source: memory.Mapping) -> None:
    waiter.look(3)
    waiter.look(5, write=True)
    faults = {fault.address: fault for fault in waiter.faults(2)}
    read, write = faults[waiter.address + 3 * PAGE], faults[waiter.address + 5 * PAGE]
    assert (read.flags, write.flags) == (0, place.FAULT_WRITE)
    assert place.read_faults(waiter.uffd) == []
    for fault in (read, write):
        assert place.copy(waiter.uffd, fault.address, source.address + 8 * PAGE, PAGE) == Placed(PAGE)
    assert sorted([waiter.seen(), waiter.seen()]) == [[3, read.thread_id, 9], [5, write.thread_id, ord("w")]]
    assert os.pread(waiter.memfd, 2, 5 * PAGE) == b"w\x09"


def test_one_page_serves_everybody_who_waits_for_it(waiter: Waiter, source: memory.Mapping) -> None:
    for _ in range(5):
        waiter.look(7)
    faults = waiter.faults(5)
    assert {fault.address for fault in faults} == {waiter.address + 7 * PAGE}
    assert place.copy(waiter.uffd, waiter.address + 7 * PAGE, source.address, PAGE) == Placed(PAGE)
    seen = [waiter.seen() for _ in faults]
    assert sorted(seen) == sorted([7, fault.thread_id, 1] for fault in faults)


def test_no_more_faults_are_read_than_asked_for(waiter: Waiter) -> None:
    for page in range(3):
        waiter.look(page)
    pages = {fault.address for fault in waiter.faults(3)}
    userfault.wake(waiter.uffd, waiter.address, SIZE)
    again: set[int] = set()
    while len(again) < 3:
        wait_readable(waiter.uffd)
        found = place.read_faults(waiter.uffd, 1)
        assert len(found) <= 1
        again |= {fault.address for fault in found}
    assert again == pages  # a fault is told once, and again after a wake
    assert place.zeropage(waiter.uffd, waiter.address, SIZE) == Placed(SIZE)
    assert sorted(waiter.seen()[::2] for _ in range(3)) == [[0, 0], [1, 0], [2, 0]]


def test_who_waits_for_a_page_that_came_another_way_is_woken_by_hand(waiter: Waiter, source: memory.Mapping) -> None:
    waiter.look(3)
    (fault,) = waiter.faults(1)
    os.pwrite(waiter.memfd, b"\xaa", 3 * PAGE)
    assert place.copy(waiter.uffd, fault.address, source.address, PAGE) == Placed(0, errno.EEXIST)
    userfault.wake(waiter.uffd, fault.address, PAGE)
    assert waiter.seen() == [3, fault.thread_id, 0xAA]


def test_pages_placed_without_waking_wake_later(waiter: Waiter, source: memory.Mapping) -> None:
    waiter.look(3)
    (fault,) = waiter.faults(1)
    assert place.copy(waiter.uffd, waiter.address, source.address, SIZE, place.MODE_DONTWAKE) == Placed(SIZE)
    userfault.wake(waiter.uffd, waiter.address, SIZE)
    assert waiter.seen() == [3, fault.thread_id, 4]


def test_a_zero_page_is_an_answer(waiter: Waiter) -> None:
    waiter.look(3)
    (fault,) = waiter.faults(1)
    assert place.zeropage(waiter.uffd, fault.address, PAGE) == Placed(PAGE)
    assert waiter.seen() == [3, fault.thread_id, 0]
    assert memory.data_extents(waiter.memfd, 0, SIZE) == [(3 * PAGE, 4 * PAGE)]


def test_a_lost_page_ends_who_needs_it(waiter: Waiter) -> None:
    waiter.look(3)
    (fault,) = waiter.faults(1)
    assert place.poison(waiter.uffd, fault.address, PAGE) == Placed(PAGE)
    assert waiter.process.wait() == -signal.SIGBUS


def test_a_process_that_is_gone_is_an_obstacle(waiter: Waiter, source: memory.Mapping) -> None:
    waiter.look(3)
    waiter.faults(1)
    waiter.process.kill()
    waiter.process.wait()
    for done in (
        place.copy(waiter.uffd, waiter.address, source.address, 4 * PAGE),
        place.zeropage(waiter.uffd, waiter.address, PAGE),
        place.poison(waiter.uffd, waiter.address, PAGE),
    ):
        assert done == Placed(0, errno.ESRCH)
    assert errno.ESRCH in place.GONE
    assert place.read_faults(waiter.uffd) == []

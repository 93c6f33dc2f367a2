"""PAGEMAP_SCAN on the real kernel: nothing that was written may be missed."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from migrated.errors import KernelError
from migrated.kernel import memory, pagemap, userfault

PAGE = memory.PAGE_SIZE
PAGES = 2048
SIZE = PAGES * PAGE


class Tracked:
    """A mapping of this process with write tracking."""

    def __init__(self) -> None:
        self.memfd = memory.create_memfd("tracked", SIZE)
        self.mapping = memory.Mapping(self.memfd, SIZE)
        self.uffd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        userfault.register(self.uffd, self.mapping.address, SIZE, userfault.MODE_WP)

    def protect(self) -> None:
        pagemap.protect(self.pagemap, self.mapping.address, SIZE)

    def scan(self, buffer: NDArray[np.uint64] | None = None) -> list[int]:
        return pages_of(pagemap.scan_and_clear(self.pagemap, self.mapping.address, SIZE, buffer))

    def look(self) -> list[int]:
        return pages_of(pagemap.scan(self.pagemap, self.mapping.address, SIZE))

    def close(self) -> None:
        os.close(self.pagemap)
        os.close(self.uffd)
        self.mapping.close()
        os.close(self.memfd)


def pages_of(ranges: pagemap.Ranges) -> list[int]:
    return [page for start, end in zip(*ranges, strict=True) for page in range(start, end)]


def test_protection_needs_a_registration(tracked: Tracked) -> None:
    userfault.unregister(tracked.uffd, tracked.mapping.address, SIZE)
    with pytest.raises(KernelError, match="PAGEMAP_SCAN: EPERM"):
        tracked.protect()


@pytest.fixture
def tracked() -> Iterator[Tracked]:
    found = Tracked()
    yield found
    found.close()


def test_before_protection_everything_counts_as_written(tracked: Tracked) -> None:
    assert tracked.look() == list(range(PAGES))


def test_a_scan_reads_and_clears_a_look_only_reads(tracked: Tracked) -> None:
    tracked.protect()
    assert tracked.scan() == []
    for page in (0, 7, 8, PAGES - 1):
        tracked.mapping.view[page * PAGE] = 1
    assert tracked.look() == tracked.look() == [0, 7, 8, PAGES - 1]
    assert tracked.scan() == [0, 7, 8, PAGES - 1]
    assert tracked.scan() == []
    tracked.mapping.view[7 * PAGE] = 2
    assert tracked.scan() == [7]


def test_reading_is_not_writing(tracked: Tracked) -> None:
    tracked.protect()
    assert bytes(tracked.mapping.view[:PAGE]) == bytes(PAGE)
    assert tracked.scan() == []


def test_a_system_call_that_writes_is_seen(tracked: Tracked) -> None:
    tracked.protect()
    with open("/proc/self/comm", "rb", buffering=0) as comm:
        comm.readinto(tracked.mapping.view[3 * PAGE : 3 * PAGE + 4])
    assert tracked.scan() == [3]


@pytest.mark.parametrize("entries", [1, 2, 3, 1000, 65536])
def test_a_small_buffer_only_means_more_calls(tracked: Tracked, entries: int) -> None:
    tracked.protect()
    for page in range(0, PAGES, 2):
        tracked.mapping.view[page * PAGE] = 1
    assert tracked.scan(pagemap.new_buffer(entries)) == list(range(0, PAGES, 2))
    assert tracked.scan() == []


def test_a_part_of_a_mapping_counts_from_its_own_start(tracked: Tracked) -> None:
    tracked.protect()
    tracked.mapping.view[100 * PAGE] = 1
    starts, ends = pagemap.scan_and_clear(tracked.pagemap, tracked.mapping.address + 90 * PAGE, 20 * PAGE)
    assert (starts.tolist(), ends.tolist()) == ([10], [11])
    assert starts.dtype == np.int64


def test_a_lost_registration_is_an_error_not_clean(tracked: Tracked) -> None:
    tracked.protect()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED: the workload maps the same memory over a part of it
    address = tracked.mapping.address + 50 * PAGE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mmap(address, PAGE, protection, fixed, tracked.memfd, 50 * PAGE) == address
    tracked.mapping.view[50 * PAGE] = 1
    for look in (tracked.scan, tracked.look):
        with pytest.raises(KernelError) as caught:
            look()
        assert caught.value.errno == errno.EPERM
    with pytest.raises(KernelError, match="PAGEMAP_SCAN: EPERM"):
        pagemap.check_tracked(tracked.pagemap, tracked.mapping.address, SIZE)


def test_a_whole_tracked_range_passes_the_check_and_keeps_its_log(tracked: Tracked) -> None:
    tracked.protect()
    tracked.mapping.view[9 * PAGE] = 1
    pagemap.check_tracked(tracked.pagemap, tracked.mapping.address, SIZE)
    assert tracked.scan() == [9]


WRITER = """
import array, os, random, socket, sys
from migrated.kernel import memory, userfault
SIZE = int(sys.argv[1])
fd = memory.create_memfd("written", SIZE)
mapping = memory.Mapping(fd, SIZE)
uffd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
maps = os.open("/proc/self/pagemap", os.O_RDONLY)
sock = socket.socket(fileno=0)
socket.send_fds(sock, [mapping.address.to_bytes(8, "little")], [fd, uffd, maps])
sock.setblocking(False)
view, rounds, choice = mapping.view, 0, random.Random(int(sys.argv[2]))
while True:
    for _ in range(200):
        at = choice.randrange(SIZE)
        view[at] = (view[at] + 1 + choice.randrange(200)) & 255
    rounds += 1
    try:
        if sock.recv(1):
            break
    except BlockingIOError:
        pass
sock.setblocking(True)
sock.send(rounds.to_bytes(8, "little"))
sock.recv(1)
"""


class Writer:
    """A process that writes without pause, and the descriptors it handed over."""

    def __init__(self, seed: int) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-c", WRITER, str(SIZE), str(seed)], stdin=theirs.fileno())
        data, fds, _, _ = socket.recv_fds(self.sock, 8, 3)
        for fd in fds:
            os.set_inheritable(fd, False)  # Python 3.11's recv_fds ignores MSG_CMSG_CLOEXEC
        self.address = int.from_bytes(data, "little")
        self.memfd, self.uffd, self.pagemap = fds
        userfault.register(self.uffd, self.address, SIZE, userfault.MODE_WP)
        pagemap.protect(self.pagemap, self.address, SIZE)

    def stop(self) -> int:
        """Let it stop writing; return how many rounds it made."""
        self.sock.send(b"s")
        return int.from_bytes(self.sock.recv(8), "little")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.sock.close()
        for fd in (self.memfd, self.uffd, self.pagemap):
            os.close(fd)


async def test_no_write_is_lost_between_scan_and_copy() -> None:
    """Two processes write at random while their memory is copied by dirty pages; at the end the copies are equal."""
    writers = [Writer(seed) for seed in (1, 2)]
    try:
        views = [memory.Mapping(writer.memfd, SIZE) for writer in writers]
        live = [np.frombuffer(view.view, np.uint8).reshape(-1, PAGE) for view in views]
        copies = [pages.copy() for pages in live]

        def copy_dirty(index: int) -> int:
            writer = writers[index]
            copied = 0
            for start, end in zip(*pagemap.scan_and_clear(writer.pagemap, writer.address, SIZE), strict=True):
                np.copyto(copies[index][start:end], live[index][start:end])
                copied += int(end - start)
            return copied

        copied = 0
        for _ in range(300):
            for index in range(len(writers)):
                copied += await asyncio.to_thread(copy_dirty, index)
        rounds = [writer.stop() for writer in writers]
        for index in range(len(writers)):
            copy_dirty(index)
            assert copy_dirty(index) == 0, "a stopped writer writes"
            assert np.array_equal(copies[index], live[index])
        assert min(rounds) > 0
        assert copied > 0
    finally:
        for writer in writers:
            writer.close()


def test_a_process_that_is_gone_is_told_apart() -> None:
    writer = Writer(3)
    try:
        writer.process.kill()
        writer.process.wait()
        with pytest.raises(KernelError) as caught:
            pagemap.scan_and_clear(writer.pagemap, writer.address, SIZE)
        assert caught.value.errno == errno.ESRCH
        with pytest.raises(KernelError, match="ESRCH"):
            pagemap.check_tracked(writer.pagemap, writer.address, SIZE)
        with pytest.raises(KernelError, match="ESRCH"):
            pagemap.protect(writer.pagemap, writer.address, SIZE)
        with pytest.raises(KernelError, match="ENOMEM"):
            userfault.register(writer.uffd, writer.address, SIZE, userfault.MODE_WP)
    finally:
        writer.close()

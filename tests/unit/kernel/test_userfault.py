"""userfaultfd handshakes and registrations, on the real kernel."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.errors import KernelError
from migrated.kernel import memory, userfault

SIZE = 16 * memory.PAGE_SIZE


@pytest.fixture
def mapping() -> Iterator[memory.Mapping]:
    fd = memory.create_memfd("test", SIZE)
    found = memory.Mapping(fd, SIZE)
    os.close(fd)
    yield found
    found.close()


@pytest.fixture
def tracking() -> Iterator[int]:
    fd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
    yield fd
    os.close(fd)


@pytest.fixture
def sync() -> Iterator[int]:
    fd = userfault.open_userfaultfd(userfault.FEATURES_SYNC)
    yield fd
    os.close(fd)


def test_the_handshake_settles_the_features(tracking: int, sync: int) -> None:
    found = userfault.negotiated_features(tracking)
    assert found is not None
    assert found & userfault.FEATURES_TRACKING == userfault.FEATURES_TRACKING
    found = userfault.negotiated_features(sync)
    assert found is not None
    assert found & userfault.FEATURES_SYNC == userfault.FEATURES_SYNC
    assert not found & userfault.FEATURE_WP_ASYNC


def test_the_descriptor_is_close_on_exec_and_does_not_block(tracking: int) -> None:
    assert not os.get_inheritable(tracking)
    assert not os.get_blocking(tracking)


def test_features_nobody_has_are_refused_without_a_leak() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KernelError, match="UFFDIO_API: EINVAL"):
        userfault.open_userfaultfd(1 << 62)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_userfaultfd_is(tracking: int) -> None:
    assert userfault.is_userfaultfd(tracking)
    with Path(os.devnull).open() as other:
        assert not userfault.is_userfaultfd(other.fileno())
        assert userfault.negotiated_features(other.fileno()) is None
    assert not userfault.is_userfaultfd(-1)
    assert userfault.negotiated_features(-1) is None


def test_a_range_belongs_to_one_userfaultfd_at_a_time(mapping: memory.Mapping, tracking: int, sync: int) -> None:
    userfault.register(tracking, mapping.address, SIZE, userfault.MODE_WP)
    userfault.register(tracking, mapping.address, SIZE, userfault.MODE_WP)
    with pytest.raises(KernelError) as caught:
        userfault.register(sync, mapping.address, SIZE, userfault.MODE_WP)
    assert caught.value.errno == errno.EBUSY
    userfault.unregister(tracking, mapping.address, SIZE)
    userfault.register(sync, mapping.address, SIZE, userfault.MODE_WP)
    userfault.unregister(sync, mapping.address, SIZE)


def test_a_registration_is_of_whole_pages(mapping: memory.Mapping, tracking: int) -> None:
    userfault.register(tracking, mapping.address, SIZE, userfault.MODE_WP | userfault.MODE_MISSING)
    userfault.wake(tracking, mapping.address, SIZE)
    with pytest.raises(KernelError, match="EINVAL"):
        userfault.register(tracking, mapping.address + 1, SIZE, userfault.MODE_WP)


UNPRIVILEGED = """
import ctypes, os
from migrated.kernel import memory, pagemap, userfault
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: changing the user took /proc/self away
fd = memory.create_memfd("test", 16 * 4096)
mapping = memory.Mapping(fd, 16 * 4096)
uffd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
maps = os.open("/proc/self/pagemap", os.O_RDONLY)
userfault.register(uffd, mapping.address, 16 * 4096, userfault.MODE_WP)
pagemap.protect(maps, mapping.address, 16 * 4096)
mapping.view[5 * 4096] = 1
with open("/proc/self/comm", "rb", buffering=0) as comm:  # a write by the kernel on behalf of a system call
    comm.readinto(mapping.view[9 * 4096:9 * 4096 + 1])
print([int(page) for page in pagemap.scan_and_clear(maps, mapping.address, 16 * 4096)[0]])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root")
def test_an_ordinary_user_gets_one_that_tracks_system_calls_too() -> None:
    done = subprocess.run([sys.executable, "-c", UNPRIVILEGED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[5, 9]"


def test_an_architecture_whose_call_number_is_unknown_says_so() -> None:
    with pytest.raises(KernelError, match=r"ENOSYS.*pdp11"):
        userfault._syscall_number("pdp11")

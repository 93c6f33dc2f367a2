"""Memory in huge pages on the real kernel: what it can do and cannot, and what is said where there is none."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.errors import KernelError
from migrated.kernel import memory, pagemap, userfault, userfault_place
from migrated.kernel.huge_pages import HUGE_PAGE_SIZE, free_huge_pages, page_size_of, shortage
from tests.support.huge_pages import huge_pages

SIZE = 8 * HUGE_PAGE_SIZE
PAGES = HUGE_PAGE_SIZE // memory.PAGE_SIZE


@pytest.fixture
def reserved() -> Iterator[None]:
    with huge_pages(10):
        yield


@pytest.fixture
def memfd(reserved: None) -> Iterator[int]:
    fd = memory.create_memfd("huge", SIZE, HUGE_PAGE_SIZE)
    memory.seal_size(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def mapping(memfd: int) -> Iterator[memory.Mapping]:
    mapping = memory.Mapping(memfd, SIZE, dont_fork=True)
    yield mapping
    mapping.close()


@pytest.fixture
def tracking() -> Iterator[int]:
    fd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
    yield fd
    os.close(fd)


def used(memfd: int) -> int:
    return os.fstat(memfd).st_blocks * 512


def test_what_a_memfd_consists_of(memfd: int) -> None:
    plain = memory.create_memfd("plain", SIZE)
    assert (page_size_of(memfd), page_size_of(plain)) == (HUGE_PAGE_SIZE, memory.PAGE_SIZE)
    os.close(plain)
    with pytest.raises(KernelError, match="fstatvfs: EBADF"):
        page_size_of(plain)


def test_reading_a_hole_by_descriptor_fills_none(memfd: int, mapping: memory.Mapping) -> None:
    assert memory.data_extents(memfd, 0, SIZE) == []
    mapping.view[HUGE_PAGE_SIZE] = 1
    buffer = bytearray(SIZE)
    assert os.preadv(memfd, [buffer], 0) == SIZE
    assert buffer.count(0) == SIZE - 1
    assert used(memfd) == HUGE_PAGE_SIZE
    assert memory.data_extents(memfd, 0, SIZE) == [(0, SIZE)], "the kernel does not say where"


def test_a_mapping_reserves_and_a_hole_that_was_punched_is_reserved_again(memfd: int, mapping: memory.Mapping) -> None:
    assert free_huge_pages() == 2
    mapping.view[0] = 1
    assert free_huge_pages() == 2
    memory.punch_hole(memfd, 0, SIZE)
    assert (free_huge_pages(), used(memfd)) == (3, 0)
    memory.reserve(memfd, SIZE, "a test")
    assert free_huge_pages() == 2


def test_too_few_of_them(memfd: int, mapping: memory.Mapping) -> None:
    other = memory.create_memfd("other", SIZE, HUGE_PAGE_SIZE)
    text = (
        f"not enough huge pages of 2 MiB for RAM block heap of {SIZE} bytes: expected 8, found 2 free. Next: raise vm"
    )
    with pytest.raises(KernelError, match=text) as caught:
        memory.reserve(other, SIZE, "RAM block heap")
    assert (caught.value.errno, caught.value.error_id) == (errno.ENOMEM, "huge-pages-short")
    with pytest.raises(KernelError, match="not enough huge pages of 2 MiB for memory"):
        memory.Mapping(other, SIZE)
    os.close(other)
    with pytest.raises(KernelError, match="EBADF"):
        memory.reserve(other, SIZE, "RAM block heap")


def test_a_host_that_knows_no_huge_pages_has_none(tmp_path: Path) -> None:
    assert free_huge_pages(tmp_path) == 0
    (tmp_path / "free_hugepages").write_text("5\n")
    (tmp_path / "resv_hugepages").write_text("2\n")
    assert free_huge_pages(tmp_path) == 3
    assert "expected 4, found 3 free" in str(shortage(4 * HUGE_PAGE_SIZE, pool=tmp_path))


def test_writes_are_tracked_by_whole_huge_pages(mapping: memory.Mapping, tracking: int) -> None:
    maps = os.open("/proc/self/pagemap", os.O_RDONLY)
    userfault.register(tracking, mapping.address, SIZE, userfault.MODE_WP)
    pagemap.protect(maps, mapping.address, SIZE)
    mapping.view[HUGE_PAGE_SIZE + 5] = 1
    mapping.view[4 * HUGE_PAGE_SIZE] = 1
    starts, ends = pagemap.scan_and_clear(maps, mapping.address, SIZE)
    assert (starts.tolist(), ends.tolist()) == ([PAGES, 4 * PAGES], [2 * PAGES, 5 * PAGES])
    assert not len(pagemap.scan_and_clear(maps, mapping.address, SIZE)[0])
    userfault.unregister(tracking, mapping.address, SIZE)
    os.close(maps)


def test_what_is_missing_is_placed_whole_or_not_at_all(mapping: memory.Mapping, tracking: int) -> None:
    source = memory.create_memfd("source", HUGE_PAGE_SIZE)
    content = memory.Mapping(source, HUGE_PAGE_SIZE)
    content.view[7] = 9
    userfault.register(tracking, mapping.address, SIZE, userfault.MODE_MISSING)
    with pytest.raises(KernelError, match="UFFDIO_COPY: EINVAL"):
        userfault_place.copy(tracking, mapping.address, content.address, memory.PAGE_SIZE)
    with pytest.raises(KernelError, match="UFFDIO_ZEROPAGE: EINVAL"):
        userfault_place.zeropage(tracking, mapping.address, HUGE_PAGE_SIZE)
    placed = [userfault_place.copy(tracking, mapping.address, content.address, HUGE_PAGE_SIZE) for _ in range(2)]
    assert placed == [(HUGE_PAGE_SIZE, 0), (0, errno.EEXIST)]
    assert mapping.view[7] == 9
    userfault.unregister(tracking, mapping.address, SIZE)
    content.close()
    os.close(source)

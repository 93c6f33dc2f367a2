"""Memfds, seals, mappings and holes, on the real kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migrated.errors import KernelError
from migrated.kernel import memory

PAGE = memory.PAGE_SIZE
SIZE = 64 * PAGE


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = memory.create_memfd("test", SIZE)
    yield fd
    os.close(fd)


def test_a_memfd_has_its_size_and_does_not_survive_exec(memfd: int) -> None:
    assert os.fstat(memfd).st_size == SIZE
    assert not os.get_inheritable(memfd)


def test_a_size_the_host_cannot_have_is_refused() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KernelError, match="ftruncate: EINVAL"):
        memory.create_memfd("huge", -1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sealed_size_can_neither_shrink_nor_grow(memfd: int) -> None:
    memory.seal_size(memfd, SIZE)
    memory.seal_size(memfd, SIZE)  # twice does no harm
    for size in (0, SIZE - PAGE, SIZE + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(memfd, size)
    memory.punch_hole(memfd, 0, SIZE)


def test_another_size_than_claimed_is_refused(memfd: int) -> None:
    with pytest.raises(KernelError, match=f"the memfd has {SIZE} bytes, expected {2 * SIZE}"):
        memory.seal_size(memfd, 2 * SIZE)


def test_a_memfd_that_cannot_be_sealed_is_refused() -> None:
    fd = os.memfd_create("unsealable", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
        with pytest.raises(KernelError, match="MFD_ALLOW_SEALING"):
            memory.seal_size(fd, SIZE)
    finally:
        os.close(fd)


def test_an_ordinary_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(SIZE)
        with pytest.raises(KernelError, match="MFD_ALLOW_SEALING"):
            memory.seal_size(file.fileno(), SIZE)


def test_a_pipe_is_refused() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(KernelError, match="not a memfd"):
            memory.seal_size(reader, 0)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_memfd_sealed_against_writing_is_refused(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(KernelError, match="sealed against writing"):
        memory.seal_size(memfd, SIZE)


def test_a_descriptor_that_cannot_be_written_is_refused(memfd: int) -> None:
    reader = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    try:
        with pytest.raises(KernelError, match="not open for reading and writing"):
            memory.seal_size(reader, SIZE)
    finally:
        os.close(reader)


def test_finished_content_cannot_change_any_more(memfd: int) -> None:
    memory.seal_all(memfd)
    with pytest.raises(PermissionError):
        os.pwrite(memfd, b"x", 0)
    with pytest.raises(KernelError, match="EPERM"):
        memory.seal_all(memfd)


def test_two_descriptors_of_one_memory_are_identical(memfd: int) -> None:
    copy = os.dup(memfd)
    other = memory.create_memfd("test", SIZE)
    try:
        assert memory.memfd_identity(copy) == memory.memfd_identity(memfd)
        assert memory.memfd_identity(other) != memory.memfd_identity(memfd)
    finally:
        os.close(copy)
        os.close(other)


def test_a_mapping_shows_the_memfd_at_its_address(memfd: int) -> None:
    mapping = memory.Mapping(memfd, SIZE)
    mapping.view[PAGE : PAGE + 5] = b"hello"
    assert os.pread(memfd, 5, PAGE) == b"hello"
    with Path("/proc/self/maps").open() as maps:
        assert any(line.startswith(f"{mapping.address:x}-{mapping.address + SIZE:x} rw-s") for line in maps)
    mapping.close()
    assert mapping.closed


def test_a_view_outlives_the_mapping_that_gave_it(memfd: int) -> None:
    mapping = memory.Mapping(memfd, SIZE)
    pages = np.frombuffer(mapping.view, np.uint8)
    mapping.close()
    mapping.close()
    pages[0] = 7  # still mapped: somebody holds it
    assert os.pread(memfd, 1, 0) == b"\7"
    address = pages.ctypes.data
    assert f"{address:x}-" in Path("/proc/self/maps").read_text()
    del pages
    assert f"{address:x}-{address + SIZE:x}" not in Path("/proc/self/maps").read_text()


def test_a_closed_mapping_gives_no_views(memfd: int) -> None:
    mapping = memory.Mapping(memfd, SIZE)
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        _ = mapping.view


def test_a_mapping_that_cannot_be_made_says_so(memfd: int) -> None:
    reader = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    try:
        with pytest.raises(KernelError, match="mmap: EACCES"):
            memory.Mapping(reader, SIZE)
    finally:
        os.close(reader)


def test_a_child_does_not_inherit_a_mapping_that_is_not_to_be_forked(memfd: int) -> None:
    mapping = memory.Mapping(memfd, SIZE, dont_fork=True)
    flags = ""
    with Path("/proc/self/smaps").open() as smaps:
        inside = False
        for line in smaps:
            if "-" in line.split()[0]:
                inside = line.startswith(f"{mapping.address:x}-")
            if inside and line.startswith("VmFlags:"):
                flags = line
    mapping.close()
    assert "dc" in flags.split()


def test_populated_pages_keep_their_content(memfd: int) -> None:
    os.pwrite(memfd, b"kept", 0)
    mapping = memory.Mapping(memfd, SIZE)
    memory.populate_write(mapping.address, SIZE)
    assert os.pread(memfd, 4, 0) == b"kept"
    assert memory.data_extents(memfd, 0, SIZE) == [(0, SIZE)]
    with pytest.raises(KernelError, match="madvise"):
        memory.populate_write(mapping.address + 1, PAGE)
    mapping.close()


def test_holes_are_found_made_and_not_filled_by_looking(memfd: int) -> None:
    assert memory.data_extents(memfd, 0, SIZE) == []
    for page in (3, 4, 10):
        os.pwrite(memfd, b"x", page * PAGE)
    assert memory.data_extents(memfd, 0, SIZE) == [(3 * PAGE, 5 * PAGE), (10 * PAGE, 11 * PAGE)]
    assert memory.data_extents(memfd, 4 * PAGE, 10 * PAGE) == [(4 * PAGE, 5 * PAGE)]
    assert memory.data_extents(memfd, 5 * PAGE, 5 * PAGE) == []
    memory.punch_hole(memfd, 3 * PAGE, PAGE)
    memory.punch_hole(memfd, 0, 0)
    assert memory.data_extents(memfd, 0, SIZE) == [(4 * PAGE, 5 * PAGE), (10 * PAGE, 11 * PAGE)]
    assert os.pread(memfd, 1, 3 * PAGE) == b"\0"


def test_what_is_resident_is_known_without_filling_holes(memfd: int) -> None:
    mapping = memory.Mapping(memfd, SIZE)
    assert not memory.is_resident(mapping.address, PAGE)
    os.pwrite(memfd, b"\1" * SIZE, 0)
    assert memory.has_no_holes(memfd, SIZE)
    assert memory.is_resident(mapping.address, SIZE)
    memory.punch_hole(memfd, 5 * PAGE, PAGE)
    assert not memory.has_no_holes(memfd, SIZE)
    assert [memory.is_resident(mapping.address + page * PAGE, PAGE) for page in (4, 5, 6)] == [True, False, True]
    assert not memory.is_resident(mapping.address, SIZE)
    assert os.fstat(memfd).st_blocks * 512 == SIZE - PAGE
    mapping.close()
    with pytest.raises(KernelError, match="mincore: ENOMEM"):
        memory.is_resident(PAGE, PAGE)


def test_what_is_no_memory_has_no_holes() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(KernelError, match="fallocate") as caught:
            memory.punch_hole(writer, 0, PAGE)
        assert caught.value.errno in (errno.ESPIPE, errno.ENODEV, errno.EBADF)
        with pytest.raises(KernelError, match="lseek: ESPIPE"):
            memory.data_extents(reader, 0, PAGE)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("shown", "sizes", "word"),
    [
        ("always within_size advise [never] deny force", {}, "never"),
        (
            "always within_size [advise] never deny force",
            {"2048kB": "always [inherit] within_size advise never"},
            "advise",
        ),
        ("[always] within_size advise never deny force", {}, "always"),
        (
            "always within_size advise never deny [force]",
            {"64kB": "always inherit within_size advise [never]"},
            "force",
        ),
        ("always within_size advise never [deny] force", {"64kB": "[always] inherit within_size advise never"}, "deny"),
        (
            "always within_size advise [never] deny force",
            {
                "2048kB": "always [inherit] within_size advise never",
                "64kB": "always inherit [within_size] advise never",
                "8kB": "always inherit within_size [advise] never",
            },
            "within_size",
        ),
    ],
)
def test_huge_pages_of_shared_memory(tmp_path: Path, shown: str, sizes: dict[str, str], word: str) -> None:
    (tmp_path / "shmem_enabled").write_text(shown + "\n")
    for size, text in sizes.items():
        (tmp_path / f"hugepages-{size}").mkdir()
        (tmp_path / f"hugepages-{size}" / "shmem_enabled").write_text(text + "\n")
    assert memory.shmem_huge_pages(tmp_path) == word
    assert (word in memory.SHMEM_HUGE_UNASKED) == (word in ("always", "within_size", "force"))


def test_huge_pages_of_this_host(tmp_path: Path) -> None:
    assert memory.shmem_huge_pages() in {"never", "advise", "deny", *memory.SHMEM_HUGE_UNASKED}
    assert memory.shmem_huge_pages(tmp_path) == "never"
    (tmp_path / "shmem_enabled").mkdir()
    with pytest.raises(KernelError, match="read: EISDIR"):
        memory.shmem_huge_pages(tmp_path)


def test_a_retired_number_refers_to_nothing_that_matters(memfd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    copy = os.dup(memfd)
    memory.retire_descriptor(copy, null)
    os.close(null)
    assert os.pwrite(copy, b"x", 0) == 1
    assert memory.data_extents(memfd, 0, SIZE) == []
    with pytest.raises(KernelError):
        memory.punch_hole(copy, 0, PAGE)
    os.close(copy)


def test_populating_leaves_the_interpreter_to_others() -> None:
    size = 64 << 20
    fd = memory.create_memfd("populate", size)
    mapping = memory.Mapping(fd, size)
    started, ticks = threading.Event(), 0

    def populate() -> None:
        started.set()
        memory.populate_write(mapping.address, size)

    thread = threading.Thread(target=populate)
    thread.start()
    started.wait()
    while thread.is_alive():
        ticks += 1
    thread.join()
    mapping.close()
    os.close(fd)
    assert ticks > 0


def test_extents_of_what_is_no_memfd_any_more_come_to_an_end() -> None:
    with open(os.devnull, "rb") as null, pytest.raises(KernelError, match="what was a memfd is none any more"):
        memory.data_extents(null.fileno(), 0, 1 << 20)

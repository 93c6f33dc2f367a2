"""Shared memory of the host: memfds, their seals, mappings and holes.

The rule of the file: a memfd that came from somebody else is sealed against shrinking *before* it is mapped, because a
truncated one kills whoever touches the mapping with SIGBUS. No numpy here: the client library imports this module.

Source: memfd_create(2), fcntl(2) F_ADD_SEALS, madvise(2), fallocate(2), lseek(2) SEEK_DATA, mincore(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from migrated.errors import KernelError
from migrated.kernel.huge_pages import HUGE_PAGE_SIZE, HUGE_PAGES_FLAGS, page_size_of, shortage

PAGE_SIZE = 4096
#: Of what blocks may consist. A page of 1 GiB would keep who waits for it waiting for seconds.
PAGE_SIZES = (PAGE_SIZE, HUGE_PAGE_SIZE)

MADV_POPULATE_WRITE = 23
#: In what stat(2) counts.
STAT_BLOCK_BYTES = 512
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

SEAL_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# Newer than Python 3.11's fcntl: F_SEAL_FUTURE_WRITE.
SEAL_WRITE = fcntl.F_SEAL_WRITE | 0x0010

#: A populate call is uninterruptible; in steps of 4 MiB a cancelled thread ends within about a millisecond.
POPULATE_STEP_BYTES = 4 << 20

_TRANSPARENT_HUGEPAGE = Path("/sys/kernel/mm/transparent_hugepage")
#: Settings under which shared memory gets pages larger than PAGE_SIZE without its owner's asking (madvise).
SHMEM_HUGE_UNASKED = frozenset({"always", "within_size", "force"})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
#: Of a byte of mincore only the lowest bit counts.
_RESIDENT = bytes(value & 1 for value in range(256))
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def create_memfd(name: str, size: int, page_size: int = PAGE_SIZE) -> int:
    """Create a sealable memfd of ``size`` bytes in pages of PAGE_SIZES; ``name`` only shows in /proc.

    Huge pages are reserved when it is mapped, not here.
    """
    flags = HUGE_PAGES_FLAGS if page_size == HUGE_PAGE_SIZE else 0
    try:
        fd = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    except OSError as error:
        raise KernelError("memfd_create", error.errno or 0) from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise KernelError("ftruncate", error.errno or 0, f"a memfd of {size} bytes") from error
    return fd


def seal_size(fd: int, expected_size: int) -> None:
    """Seal a memfd against shrinking and growing, then check its size.

    Raises KernelError when it is not a sealable memfd, is sealed against writing, cannot be written, or has another
    size (the size is looked at after sealing, so it cannot change any more).
    """
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise KernelError("F_ADD_SEALS", errno.EINVAL, "not a memfd")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise KernelError("F_GETFL", errno.EACCES, "the memfd is not open for reading and writing")
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if seals & SEAL_WRITE:
            raise KernelError("F_GET_SEALS", errno.EPERM, "the memfd is sealed against writing")
        if seals & SEAL_SIZE != SEAL_SIZE:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEAL_SIZE)
        size = os.fstat(fd).st_size
    except OSError as error:
        hint = "not a memfd created with MFD_ALLOW_SEALING" if error.errno in (errno.EPERM, errno.EINVAL) else ""
        raise KernelError("F_ADD_SEALS", error.errno or 0, hint) from error
    if size != expected_size:
        raise KernelError("fstat", errno.EINVAL, f"the memfd has {size} bytes, expected {expected_size}")


def seal_all(fd: int) -> None:
    """Make a memfd that holds finished content immutable; it must not be mapped writable."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEAL_SIZE | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise KernelError("F_ADD_SEALS", error.errno or 0) from error


def memfd_identity(fd: int) -> tuple[int, int]:
    """Return (st_dev, st_ino): two descriptors of the same memory compare equal."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


class Mapping:
    """A shared writable mapping of a whole memfd.

    ``view`` stays valid as long as somebody holds it: `close` unmaps at once only if nobody does, else the memory is
    unmapped when the last view goes.
    """

    def __init__(self, fd: int, size: int, *, dont_fork: bool = False) -> None:
        try:
            memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            if dont_fork:
                memory.madvise(mmap.MADV_DONTFORK)
        except OSError as error:
            if error.errno == errno.ENOMEM and page_size_of(fd) == HUGE_PAGE_SIZE:
                raise shortage(size) from error
            raise KernelError("mmap", error.errno or 0, f"{size} bytes") from error
        self._memory: mmap.mmap | None = memory
        self.size = size
        # The address is taken once: as long as a from_buffer object lives, the mapping cannot be closed.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    @property
    def view(self) -> memoryview:
        """A writable view of all of it."""
        if self._memory is None:
            raise ValueError("this mapping is closed")
        return memoryview(self._memory)

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._memory is None

    def close(self) -> None:
        """Let go of the memory. Twice does no harm."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        try:
            memory.close()
        except BufferError:
            return  # somebody still holds a view; the last one to go unmaps


def reserve(fd: int, size: int, what: str) -> None:
    """Reserve huge pages for all of a memfd that consists of them, as long as it lives. Raises KernelError."""
    try:
        Mapping(fd, size).close()
    except KernelError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise shortage(size, what) from error


def populate_write(address: int, length: int) -> None:
    """Fault pages in for writing without changing their content; the GIL is free meanwhile."""
    for start in range(address, address + length, POPULATE_STEP_BYTES):
        size = min(POPULATE_STEP_BYTES, address + length - start)
        if _libc.madvise(start, size, MADV_POPULATE_WRITE):
            raise KernelError("madvise", ctypes.get_errno(), "MADV_POPULATE_WRITE")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give a range of a memfd back to the host; it reads as zeros afterwards."""
    if length == 0:
        return
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
        raise KernelError("fallocate", ctypes.get_errno(), "FALLOC_FL_PUNCH_HOLE")


def data_extents(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """Return the ranges of [start, end) that are not holes, as (start, end) byte offsets, ascending.

    Reading a hole through a mapping would allocate it; asking here does not. Of memory in huge pages the kernel says
    only how much of it there is: if there is any, all of it may be.
    """
    if page_size_of(fd) == HUGE_PAGE_SIZE and not os.fstat(fd).st_blocks:
        return []
    if start == 0 < end and has_no_holes(fd, end):
        return [(start, end)]  # to look for holes, the kernel walks all of it
    extents = []
    position = start
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing but hole from here on
            raise KernelError("lseek", error.errno or 0, "SEEK_DATA") from error
        if data >= end:
            break
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        if hole <= data:
            # /dev/null, where a retired descriptor leads, answers 0 to whatever is asked: without end.
            raise KernelError("lseek", errno.EBADF, "what was a memfd is none any more")
        extents.append((data, hole))
        position = hole
    return extents


def has_no_holes(fd: int, size: int) -> bool:
    """Say whether all ``size`` bytes of a memfd are there."""
    return size <= os.fstat(fd).st_blocks * STAT_BLOCK_BYTES


def is_resident(address: int, length: int) -> bool:
    """Say whether all of a mapping of ordinary pages is there, and none of it in a hole (or in swap).

    Unlike SEEK_HOLE, which goes on to the next hole, it looks no further than ``length``.
    """
    vector = bytearray(length // PAGE_SIZE)
    if _libc.mincore(address, length, (ctypes.c_char * len(vector)).from_buffer(vector)):
        raise KernelError("mincore", ctypes.get_errno())
    return 0 not in vector.translate(_RESIDENT)


def shmem_huge_pages(settings: Path = _TRANSPARENT_HUGEPAGE) -> str:
    """Return the host's setting for huge pages of shared memory: never, advise, deny, or one of SHMEM_HUGE_UNASKED.

    A huge page fills its neighbours too, so where pages must stay missing the setting must not be one of the latter.
    Newer kernels have a setting for each size besides; one of those that allows unasked what the first does not is the
    answer. "never" where the kernel knows no such thing.
    """
    word = _active_word(settings / "shmem_enabled")
    # force and deny of the first one overrule the settings of the sizes.
    if word in SHMEM_HUGE_UNASKED or word == "deny":
        return word
    sizes = [_active_word(path) for path in sorted(settings.glob("hugepages-*/shmem_enabled"))]
    return next((size for size in sizes if size in SHMEM_HUGE_UNASKED), word)


def _active_word(setting: Path) -> str:
    """Return the word in brackets."""
    try:
        text = setting.read_text(encoding="ascii")
    except FileNotFoundError:
        return "never"
    except OSError as error:
        raise KernelError("read", error.errno or 0, str(setting)) from error
    return text.partition("[")[2].partition("]")[0]


def retire_descriptor(fd: int, harmless: int) -> None:
    """Replace what ``fd`` refers to by ``harmless``, keeping the number taken.

    A thread that still uses the number then gets an error (or writes into /dev/null), never another file.
    """
    os.dup2(harmless, fd, inheritable=False)

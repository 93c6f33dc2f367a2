"""Huge pages of the host (hugetlbfs): which memory has them, and how many can be had.

The rule of the file: whoever gets no huge pages is told how many he needed, how many there are, and what to do next. No
numpy here: the client library imports this module.

What they cannot do: `pwrite` (EINVAL: use a mapping), UFFDIO_ZEROPAGE (EINVAL: copy zeros), a UFFDIO_COPY of less than
a whole one; SEEK_DATA calls everything data. A shared mapping reserves what it may need, so touching it never fails for
want of pages; a page that is punched out loses its reservation, and the next mapping, however short, renews it.

Source: Documentation/admin-guide/mm/hugetlbpage.rst, memfd_create(2), statvfs(3), fs/hugetlbfs/inode.c (6.18).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from migrated.errors import KernelError

HUGE_PAGE_SIZE = 2 << 20
HUGE_PAGES_FLAGS = os.MFD_HUGETLB | os.MFD_HUGE_2MB

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_NEXT = "raise vm.nr_hugepages (/proc/sys/vm/nr_hugepages), best soon after boot"


def page_size_of(fd: int) -> int:
    """Return the size of the pages that a memfd consists of: 4096, or that of its huge pages.

    Transparent huge pages do not count: they come and go.
    """
    try:
        return os.fstatvfs(fd).f_bsize
    except OSError as error:
        raise KernelError("fstatvfs", error.errno or 0) from error


def free_huge_pages(pool: Path = _POOL) -> int:
    """Return how many huge pages of 2 MiB the host can still give; 0 where it knows no such thing."""
    try:
        free, reserved = (int((pool / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
    except OSError:
        return 0
    return max(free - reserved, 0)


def shortage(size_bytes: int, what: str = "memory", pool: Path = _POOL) -> KernelError:
    """Return the error of memory in huge pages that cannot be had: of RAM block NAME, for example."""
    needed, free = size_bytes // HUGE_PAGE_SIZE, free_huge_pages(pool)
    hint = f"not enough huge pages of 2 MiB for {what} of {size_bytes} bytes: expected {needed}, found {free} free"
    return KernelError("mmap", errno.ENOMEM, f"{hint}. Next: {_NEXT}", error_id="huge-pages-short")

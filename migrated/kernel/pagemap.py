"""PAGEMAP_SCAN: which pages of a mapping were written since they were write-protected.

The rule of the file: ``CHECK_WPASYNC`` is always set. Without it, a range whose registration was lost (the process
mapped something over it) silently reads as clean; with it the scan fails with EPERM and the caller takes all as dirty.

The scan that clears reads and re-protects each page in one step of the kernel, so no write is lost between the two. A
page that was never populated counts as written at the first scan, and so does a page table entry that was zapped.

Source: Documentation/admin-guide/mm/pagemap.rst, linux/fs.h (6.18). Units: byte addresses in, page numbers relative to
the start of the range out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import numpy as np
from numpy.typing import NDArray

from migrated.errors import KernelError
from migrated.kernel.memory import PAGE_SIZE

# struct pm_scan_arg: size flags start end walk_end(out) vec vec_len max_pages, then the categories inverted, mask,
# anyof_mask and return_mask.
_PM_SCAN_ARG = struct.Struct("=12Q")
_WALK_END = struct.Struct("=Q")
_WALK_END_OFFSET = 4 * 8

PAGEMAP_SCAN = 0xC0606610
assert PAGEMAP_SCAN == (3 << 30) | (_PM_SCAN_ARG.size << 16) | (ord("f") << 8) | 16

PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
PAGE_IS_WRITTEN = 1 << 1

_PAGE_SHIFT = np.uint64(PAGE_SIZE.bit_length() - 1)

#: One entry of the file itself.
_ENTRY_BYTES = 8
#: Entries of 24 bytes (start, end, categories): with 64 Ki of them 1 GiB of alternating pages takes two calls, and the
#: buffer is never touched beyond what the kernel fills.
VECTOR_ENTRIES = 65536

Ranges = tuple[NDArray[np.int64], NDArray[np.int64]]


def new_buffer(entries: int = VECTOR_ENTRIES) -> NDArray[np.uint64]:
    """Return a buffer for `scan` and `scan_and_clear` that may be used again and again (by one thread at a time)."""
    return np.empty((entries, 3), np.uint64)


def scan_and_clear(pagemap: int, address: int, length: int, buffer: NDArray[np.uint64] | None = None) -> Ranges:
    """Return the written ranges [starts[i], ends[i]) of a registered mapping, and write-protect them again.

    Raises KernelError: EPERM the registration is lost (all may be dirty), ESRCH the process is gone.
    """
    return _scan(pagemap, address, length, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, buffer)


def scan(pagemap: int, address: int, length: int, buffer: NDArray[np.uint64] | None = None) -> Ranges:
    """Return the written ranges like `scan_and_clear`, but leave the log as it is."""
    return _scan(pagemap, address, length, PM_SCAN_CHECK_WPASYNC, buffer)


def protect(pagemap: int, address: int, length: int) -> None:
    """Write-protect all of a registered mapping, in a third of the time that UFFDIO_WRITEPROTECT takes.

    Raises KernelError as `scan_and_clear` does.
    """
    position, end = address, address + length
    while position < end:
        # Without a vector nothing is sorted into categories: the kernel's short way.
        _, position = _walk(pagemap, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, position, end)
    _require_process(pagemap, address)


def check_tracked(pagemap: int, address: int, length: int) -> None:
    """Raise KernelError EPERM unless all of a range is registered for asynchronous write-protection; changes nothing.

    Proves at the same time that ``pagemap`` and the userfaultfd that was used to register belong to one process.
    """
    _walk(pagemap, PM_SCAN_CHECK_WPASYNC, address, address + length)
    _require_process(pagemap, address)


def _scan(pagemap: int, address: int, length: int, flags: int, buffer: NDArray[np.uint64] | None) -> Ranges:
    vector = new_buffer() if buffer is None else buffer
    parts = []
    position, end = address, address + length
    while position < end:
        filled, position = _walk(pagemap, flags, position, end, vector)
        if filled:
            parts.append(((vector[:filled, :2] - np.uint64(address)) >> _PAGE_SHIFT).view(np.int64))
    _require_process(pagemap, address)
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ranges = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return ranges[:, 0], ranges[:, 1]


def _walk(pagemap: int, flags: int, start: int, end: int, vector: NDArray[np.uint64] | None = None) -> tuple[int, int]:
    """Walk over the written pages of a range; return how many entries of ``vector`` were filled, and where it ended."""
    where, room, returned = (vector.ctypes.data, len(vector), PAGE_IS_WRITTEN) if vector is not None else (0, 0, 0)
    argument = bytearray(
        _PM_SCAN_ARG.pack(_PM_SCAN_ARG.size, flags, start, end, 0, where, room, 0, 0, PAGE_IS_WRITTEN, 0, returned)
    )
    try:
        filled = fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
    except OSError as error:
        raise KernelError("PAGEMAP_SCAN", error.errno or 0) from error
    (walk_end,) = _WALK_END.unpack_from(argument, _WALK_END_OFFSET)
    return filled, walk_end


def _require_process(pagemap: int, address: int) -> None:
    """Raise KernelError ESRCH when the process is gone.

    Not every kernel says so in a scan: some walk the empty memory map, and a machine that lost its last writes is
    clean. An entry cannot be read where there is no page table.
    """
    if not os.pread(pagemap, _ENTRY_BYTES, address // PAGE_SIZE * _ENTRY_BYTES):
        raise KernelError("PAGEMAP_SCAN", errno.ESRCH)

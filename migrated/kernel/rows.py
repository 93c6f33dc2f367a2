"""Pages that lie apart in a buffer, written into a memfd as one run.

The rule of the file: nothing is copied on the way; the kernel is told where each page lies.

Source: writev(2); the kernel takes IOV_MAX pieces at most.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
from numpy.typing import NDArray

from migrated.errors import KernelError

IOV_MAX = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pwritev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_libc.pwritev.restype = ctypes.c_ssize_t
assert ctypes.sizeof(ctypes.c_void_p) == ctypes.sizeof(ctypes.c_size_t) == 8  # an iovec is two words of 64 bits


def write_rows(fd: int, rows: NDArray[np.uint8], offset: int) -> None:
    """Write the rows of an array, each of which lies in one piece, one behind the other from ``offset`` on.

    The GIL is free meanwhile. Raises KernelError.
    """
    if rows.strides[0] == rows.shape[1]:  # in one piece already
        _write(fd, rows.reshape(-1).data, offset)
        return
    count, width = rows.shape
    address, stride = rows.__array_interface__["data"][0], rows.strides[0]
    pieces = np.empty((count, 2), np.int64)
    pieces[:, 0] = address + stride * np.arange(count)
    pieces[:, 1] = width
    position = 0
    while position < count * width:
        first, begun = divmod(position, width)
        part = pieces[first : first + IOV_MAX]
        part[0] = address + stride * first + begun, width - begun
        written: int = _libc.pwritev(fd, part.__array_interface__["data"][0], len(part), offset + position)
        if written <= 0:
            raise KernelError("pwritev", ctypes.get_errno(), f"{len(part)} rows of {width} bytes")
        position += written


def _write(fd: int, data: memoryview, offset: int) -> None:
    try:
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        raise KernelError("pwrite", error.errno or 0, f"{len(data)} bytes") from error

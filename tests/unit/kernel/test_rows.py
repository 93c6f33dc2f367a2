"""Rows of a buffer that become one run in a file."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from migrated.errors import KernelError
from migrated.kernel.memory import create_memfd
from migrated.kernel.rows import IOV_MAX, write_rows

PAGE, STRIDE = 4096, 4104


def records(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Pages with eight bytes in front of each, which nobody wants."""
    buffer = np.random.default_rng(1).integers(0, 256, count * STRIDE, np.uint8)
    return np.ndarray((count, PAGE), np.uint8, buffer, 8, (STRIDE, 1))


@pytest.mark.parametrize("count", [1, 2, IOV_MAX, 2 * IOV_MAX + 3])
def test_rows_follow_each_other(count: int) -> None:
    rows = records(count)
    fd = create_memfd("rows", (count + 2) * PAGE)
    write_rows(fd, rows, PAGE)
    found = os.pread(fd, (count + 2) * PAGE, 0)
    os.close(fd)
    assert found == bytes(PAGE) + rows.tobytes() + bytes(PAGE)


def test_what_was_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    """A limit in the middle of a row: as much as there is room for is written, and then it is an error."""
    rows = records(4)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE + 100, before[1]))
    try:
        with pytest.raises(KernelError, match="pwritev: EFBIG"):
            write_rows(fd, rows, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        found = os.pread(fd, 4 * PAGE, 0)
        os.close(fd)
    assert found == rows.tobytes()[: 2 * PAGE + 100]

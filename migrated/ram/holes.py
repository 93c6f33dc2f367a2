"""Which pages of a block are holes, and giving pages back.

The rule of the file: asking allocates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from migrated.kernel.memory import data_extents, punch_hole, reserve
from migrated.model.bitmap import PageBitmap, consecutive
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PAGE


def split_holes(block: RamBlockPort) -> tuple[PageBitmap, PageBitmap]:
    """Return (pages with data, holes) of a block as two disjoint bitmaps."""
    total = block.size_bytes // PAGE
    dirty, holes = PageBitmap(total), PageBitmap(total)
    holes.set_all()
    for start, end in data_extents(block.memfd, 0, block.size_bytes):
        dirty.set_range(start // PAGE, -(-end // PAGE))
        holes.clear_range(start // PAGE, -(-end // PAGE))
    return dirty, holes


def make_holes(block: RamBlockPort, pages: NDArray[np.int64]) -> None:
    """Make pages zero, ascending, and give them back to the host if they are no parts of huge pages."""
    if block.page_size > PAGE:
        block.pages[pages] = 0
        return
    for start, end in consecutive(pages):
        punch_hole(block.memfd, int(pages[start]) * PAGE, (end - start) * PAGE)


def punch(block: RamBlockPort, ranges: Sequence[tuple[int, int]]) -> None:
    """Give (start, length) byte ranges of a block back; huge pages stay reserved for it. Raises KernelError."""
    for start, length in ranges:
        punch_hole(block.memfd, start, length)
    if block.page_size > PAGE:
        reserve(block.memfd, block.size_bytes, f"RAM block {block.name}")

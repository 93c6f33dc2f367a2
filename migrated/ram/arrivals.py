"""What has arrived of a block, and how it lands there before the machine runs.

The rule of the file: a page is added after it was placed. Runs that follow each other are kept as one until somebody
asks: the bits would cost as much as the copying, taken 64 at a time.

A page whose sum at the source was another than here is doubted: the machine may have written to it while it was sent,
and then it comes again. Whatever comes later ends the doubt.

Landing: runs are written by descriptor (``pwritev``: no fault, nothing is zeroed that is overwritten anyway), whether
there is memory or a hole; scattered pages are stored through the daemon's own mapping.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from migrated.kernel.rows import write_rows
from migrated.model.bitmap import PageBitmap, consecutive
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PAGE

#: Below this mean length, single pages are stored through the mapping instead of one pwritev per run.
SHORT_RUN_PAGES = 8
#: Pages that lie behind each other, or here and there.
Part = range | NDArray[np.int64]


class Arrivals:
    """What has arrived of one block."""

    def __init__(self, block: RamBlockPort) -> None:
        self.block = block
        self.host_pages = block.page_size // PAGE
        """How many pages are placed at once once the machine runs."""
        self._received = PageBitmap(block.size_bytes // PAGE)
        self._with_data = PageBitmap(block.size_bytes // PAGE)
        self._run = range(0)
        """Pages with data that are not in the bitmaps yet."""
        self._doubted = PageBitmap(block.size_bytes // PAGE)

    def doubt(self, pages: NDArray[np.int64]) -> None:
        """Count on it that these pages, which have arrived, come again."""
        self._settle()
        self._doubted.set_pages(pages)

    def _trust(self, pages: NDArray[np.int64]) -> None:
        if self._doubted.count:
            self._doubted.clear_pages(np.unique(pages))

    @property
    def doubted(self) -> PageBitmap:
        """The pages that differ from what was sent, and did not come again."""
        if self._run:
            self._settle()
        return self._doubted

    @property
    def count(self) -> int:
        """How many pages have arrived."""
        return self.received.count

    @property
    def received(self) -> PageBitmap:
        """The pages that have arrived."""
        if self._run:
            self._settle()
        return self._received

    def has(self, page: int) -> bool:
        """Say whether a page has arrived."""
        return page in self._run or self._received.test(page)

    def keep(self, extents: Sequence[tuple[int, int]]) -> None:
        """Say where the block has memory with something old in it: byte ranges."""
        for start, end in extents:
            self._with_data.set_range(start // PAGE, -(-end // PAGE))

    def remove(self, start: int, end: int) -> None:
        """Forget the pages start..end-1: they were dropped."""
        self._settle()
        for bitmap in (self._received, self._with_data, self._doubted):
            bitmap.clear_range(start, end)

    def add_run(self, start: int, end: int) -> None:
        """Add the pages start..end-1, which hold data."""
        if start != self._run.stop:
            self._settle()
            self._run = range(start, start)
        self._run = range(self._run.start, end)

    def land(self, pages: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """Put pages into memory that nobody uses yet, and add them. Raises KernelError."""
        for part in self.put(pages, rows):
            self.add(part)

    def put(self, pages: NDArray[np.int64], rows: NDArray[np.uint8]) -> list[Part]:
        """Put pages into memory that nobody uses yet; return them for `add`. In any thread. Raises KernelError."""
        runs = consecutive(pages)
        if len(runs) > 1 and len(pages) < SHORT_RUN_PAGES * len(runs):
            self.block.pages[pages] = rows
            return [pages]
        for start, end in runs:
            self._write(int(pages[start]), rows[start:end])
        return [range(int(pages[start]), int(pages[start]) + end - start) for start, end in runs]

    def add(self, part: Part) -> None:
        """Add pages that hold data."""
        if isinstance(part, range):
            self.add_run(part.start, part.stop)
        else:
            self.add_pages(part)

    def _write(self, first: int, rows: NDArray[np.uint8]) -> None:
        """Put pages that follow each other into memory; huge pages cannot be written by descriptor."""
        if self.host_pages == 1:
            write_rows(self.block.memfd, rows, first * PAGE)
        else:
            np.copyto(self.block.pages[first : first + len(rows)], rows)

    def add_page(self, page: int) -> None:
        """Add one page that holds data."""
        if self._run:
            self._settle()
        self._received.set(page)
        self._with_data.set(page)
        self._doubted.clear(page)

    def add_pages(self, pages: NDArray[np.int64]) -> None:
        """Add pages that hold data."""
        self._received.set_pages(pages)
        self._with_data.set_pages(pages)
        self._trust(pages)

    def add_holes(self, pages: NDArray[np.int64]) -> None:
        """Add pages that are zero."""
        self._received.set_pages(pages)
        self._trust(pages)

    def take_stale(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, ascending, which of ``pages`` hold something from before, and count on it that they become holes."""
        self._settle()
        stale = np.unique(pages[self._with_data.test_pages(pages)])
        self._with_data.clear_pages(stale)
        return stale

    def _settle(self) -> None:
        if not self._run:
            return
        for bitmap in (self._received, self._with_data):
            bitmap.set_range(self._run.start, self._run.stop)
        if self._doubted.count:
            self._doubted.clear_range(self._run.start, self._run.stop)
        self._run = range(0)

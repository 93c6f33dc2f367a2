"""Where pages belong that come over channels of their own: the blocks of a machine that does not run yet.

The rule of the file: a page is put into memory in the thread of its channel, and counts on the event loop, later. One
that differs from its sum at the source counts, too, but is doubted: the machine may have written to it while it was
sent, and then it comes again. Before it is said that all is here, and before anything runs, no doubt may be left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from migrated.errors import CHANGED, RemoteProtocolError
from migrated.ram.arrivals import Arrivals, Part
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PageRun


class BlockLanding:
    """Implements `ram.multifd_load.Landing`. ``account`` is told how many pages have arrived."""

    def __init__(self, arrivals: Mapping[str, Arrivals], account: Callable[[int], None]) -> None:
        self._arrivals = arrivals
        self._account = account

    def block(self, name: str) -> RamBlockPort:
        """Return a block by its name."""
        return self._arrivals[name].block

    def put(self, run: PageRun) -> list[Part]:
        """Place pages; return them for `arrived`. In any thread. Raises KernelError."""
        return self._arrivals[run.block].put(run.pages, run.data)

    def arrived(self, block: str, part: Part) -> None:
        """Count pages that were `put`, or written into the block's memfd."""
        self._arrivals[block].add(part)
        self._account(len(part))

    def doubt(self, block: str, pages: NDArray[np.int64]) -> None:
        """Count on it that pages that have `arrived` come again."""
        self._arrivals[block].doubt(pages)


def check_doubts(arrivals: Mapping[str, Arrivals]) -> None:
    """Raise RemoteProtocolError where a page differs from what was sent, and did not come again."""
    for name, one in arrivals.items():
        if doubted := one.doubted.count:
            raise RemoteProtocolError(
                CHANGED,
                section="ram",
                expected="pages with the sums that the source has sent",
                found=f"{doubted} others in block {name}, the first of them page {one.doubted.first_from(0)}",
            )

"""Huge pages in postcopy: they come in target pages of 4 KiB, and are placed whole.

The rule of the file: who waits for a huge page gets all of it or nothing. Its target pages come one behind the other
over one connection, in any order among themselves, each once; a page of another huge page in between is refused.

Source: QEMU's ram_load_postcopy; error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.ram.arrivals import Arrivals
from migrated.wire.ram import PAGE, PageRun, ZeroRun

#: Called with a block, the first target page of a host page, and its content, shape (pages, PAGE); None: all zeros.
Place = Callable[[Arrivals, int, NDArray[np.uint8] | None], None]


class HostPages:
    """Puts together what comes over one connection."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._content = np.empty((0, PAGE), np.uint8)
        self._here = np.zeros(0, bool)
        self._block = ""
        self._first = 0
        self._blank = True
        """All that is here of it is zero."""

    def take(self, arrivals: Arrivals, run: PageRun | ZeroRun) -> None:
        """Take pages of a block, and place what is whole by them. Raises RemoteProtocolError, WorkloadError."""
        pages, size = run.pages, arrivals.host_pages
        at = 0
        while at < len(pages):
            first = int(pages[at]) // size * size
            some = pages[at : at + size] - first
            outside = np.flatnonzero((some < 0) | (some >= size))
            some = some[: outside[0]] if len(outside) else some
            self._begin(arrivals, first)
            if self._here[some].any() or len(np.unique(some)) < len(some):
                raise _refused(f"a page of host page {first} of block {run.block} comes twice")
            if isinstance(run, PageRun):
                self._content[some] = run.data[at : at + len(some)]
                self._blank = False
            else:
                self._content[some] = run.fill
                self._blank &= not run.fill
            self._here[some] = True
            at += len(some)
            if self._here.all():
                self._end(arrivals)

    def _begin(self, arrivals: Arrivals, first: int) -> None:
        if self._here.any():
            if (arrivals.block.name, first) != (self._block, self._first):
                raise _refused(
                    f"Non-same host page detected: page {first} of block {arrivals.block.name}",
                    expected=f"what is missing of the host page at {self._first} of block {self._block}",
                )
            return
        self._block, self._first, self._blank = arrivals.block.name, first, True
        if len(self._here) != arrivals.host_pages:
            self._here = np.zeros(arrivals.host_pages, bool)
            self._content = np.empty((arrivals.host_pages, PAGE), np.uint8)

    def _end(self, arrivals: Arrivals) -> None:
        self._here[:] = False
        self._place(arrivals, self._first, None if self._blank else self._content)


def _refused(what: str, *, expected: str = "") -> RemoteProtocolError:
    return RemoteProtocolError(what, section="ram", expected=expected)

"""Pages of a block, read into somebody's buffer as they are at this moment.

The rule of the file: long runs are read by ``preadv`` (no fault, no page tables, the GIL is free), scattered pages are
gathered from the daemon's mapping. A memfd that is not read whole is none any more (`machine.retired`): then the
mapping has the pages, or says who took them along. In any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from migrated.model.bitmap import consecutive
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PAGE

#: From this mean run length on, reading by system call is faster than gathering from the mapping.
LONG_RUN_PAGES = 8

PIECE_PAGES = 128

#: The rows of an array as buffers, where it is not in one piece.
Views = Sequence[memoryview]


def read_pages(
    block: RamBlockPort, pages: NDArray[np.int64], out: NDArray[np.uint8], views: Callable[[], Views] | None = None
) -> None:
    """Read ``pages`` into ``out``, shape (n, PAGE); ``views`` makes its rows, if they are needed.

    Raises WorkloadError where the block is gone.
    """
    runs = consecutive(pages)
    if len(runs) > 1 and len(pages) < LONG_RUN_PAGES * len(runs):
        out[:] = block.pages[pages]
        return
    rows = views() if views is not None else None
    for start, end in runs:
        read_run(block, int(pages[start]), out[start:end], rows[start:end] if rows is not None else None)


def long_runs(pages: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the runs of pages as `consecutive` does; none where they are too short to be worth a system call each."""
    runs = consecutive(pages)
    return runs if len(pages) >= LONG_RUN_PAGES * len(runs) else []


def read_run(block: RamBlockPort, first: int, out: NDArray[np.uint8], views: Views | None = None) -> None:
    """Read pages that follow each other, from ``first`` on, into ``out``, shape (n, PAGE), whose rows are ``views``.

    Raises WorkloadError where the block is gone.
    """
    if os.preadv(block.memfd, views or [out.data], first * PAGE) != out.nbytes:
        out[:] = block.pages[first : first + len(out)]


def zero_pages(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return which pages, a row of ``words`` each, are all zero. One word rules out nearly every page that is not."""
    maybe = np.flatnonzero(words[:, 0] == 0)
    for word in (PAGE // 16, -1):
        if len(maybe):
            maybe = maybe[words[maybe, word] == 0]
    if len(maybe) == len(words):
        return np.flatnonzero(np.bitwise_or.reduce(words, axis=1) == 0)
    # Piece by piece: what is compared is copied, and stays in the cache.
    pieces = [maybe[at : at + PIECE_PAGES] for at in range(0, len(maybe), PIECE_PAGES)]
    return np.concatenate([piece[np.bitwise_or.reduce(words[piece], axis=1) == 0] for piece in pieces] or [maybe])

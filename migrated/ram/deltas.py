"""Pages that are sent again, as deltas from what was sent before (capability ``xbzrle``).

The rule of the file: a page in the cache is what the other end has, byte for byte, and nothing else is: it is kept as
it was sent, not as it lies in memory, and forgotten when it is sent in a way that is not seen here.

The cache has one place for each page, that of its number modulo the places. Who comes later takes it over only from a
page that was not sent for a while: passes go through memory in order, and a cache that is smaller would always hold
what comes last, and never what comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from migrated.model.stats import DeltaStats
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PAGE
from migrated.wire.xbzrle import encode_delta

#: Looks at the dirty log for which a page keeps its place without being sent, as in a QEMU.
LIFETIME = 2
#: Pages compared before others get their turn: about half a millisecond.
STEP_PAGES = 32


class Deltas:
    """What was sent of all blocks, as far as ``cache_bytes`` (a power of two) reach."""

    def __init__(self, blocks: Sequence[RamBlockPort], cache_bytes: int, stats: DeltaStats) -> None:
        self.cache_bytes = cache_bytes
        self.keeps = True
        """False where nothing is sent twice any more: what is sent need not be remembered."""
        self._stats = stats
        stats.cache_size = cache_bytes
        self._first: dict[str, int] = {}
        total = 0
        for block in blocks:
            self._first[block.name] = total
            total += block.size_bytes // PAGE
        # More places than pages are of no use. Memory is taken when a place is.
        places = min(cache_bytes // PAGE, 1 << max(0, total - 1).bit_length())
        self._mask = places - 1
        self._keys = np.full(places, -1, np.int64)
        self._ages = np.zeros(places, np.int64)
        self._look = 0
        self._content = np.empty((places, PAGE), np.uint8)

    def looked(self) -> None:
        """Count a look at the dirty log."""
        self._look += 1

    def forget(self, block: str, pages: NDArray[np.int64]) -> None:
        """Pages are sent in another way."""
        keys = pages + self._first[block]
        places = keys & self._mask
        self._keys[places[self._keys[places] == keys]] = -1

    async def split(
        self, block: str, pages: NDArray[np.int64], content: NDArray[np.uint8]
    ) -> tuple[NDArray[np.bool_], list[tuple[int, bytes]]]:
        """Return which of ``pages``, which hold ``content``, are to be sent whole, and (page, delta) of the others.

        What is the same as before is in neither. All of it counts as sent.
        """
        keys = pages + self._first[block]
        places = keys & self._mask
        is_known = self._keys[places] == keys
        known = np.flatnonzero(is_known)
        whole = np.ones(len(pages), bool)
        deltas = []
        for number, index in enumerate(known.tolist()):
            delta = encode_delta(self._content[places[index]], content[index])
            whole[index] = delta is None
            if delta:
                deltas.append((int(pages[index]), delta))
            if number % STEP_PAGES == STEP_PAGES - 1:
                await asyncio.sleep(0)
        self._stats.count(looked_up=len(pages), known=len(known), overflow=int(whole[known].sum()))
        if self.keeps:
            kept = is_known | (self._keys[places] < 0) | (self._ages[places] + LIFETIME < self._look)
            places = places[kept]
            self._keys[places], self._content[places], self._ages[places] = keys[kept], content[kept], self._look
        return whole, deltas

    def sent(self, records: Sequence[bytes]) -> None:
        """Count what deltas take on the wire."""
        self._stats.bytes += sum(map(len, records))

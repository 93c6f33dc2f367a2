"""The hash of a RAM block's content, as a snapshot's manifest has it: proof that what was loaded is what was saved.

The rule of the file: the content alone decides, not how it is kept: a hole and a page of zeros are the same, and a hole
is never read, so an empty terabyte costs next to nothing. A block's hash is the hash of its pieces' hashes.

What is all there is hashed where it lies, in the daemon's mapping, which costs half as much as reading it by
``preadv``; pieces with holes are read. The GIL is free in both, and in the hash.
"""

from __future__ import annotations

import asyncio
import bisect
import os
from functools import cache
from operator import itemgetter

from xxhash import xxh3_128_hexdigest

from migrated.errors import WorkloadError
from migrated.kernel.memory import data_extents
from migrated.savevm.ports import RamBlockPort
from migrated.transport.thread import in_thread
from migrated.wire.manifest import hash_of
from migrated.wire.ram import PAGE

PIECE_BYTES = 1 << 20
#: Pieces for one hop into a thread; a cancellation waits for about ten milliseconds.
STRETCH_PIECES = 64
#: Two threads that hash are as fast as memory here.
LANES = 2


async def hash_content(block: RamBlockPort) -> str:
    """Return the hash of a block that nobody writes to. Raises WorkloadError when it is gone."""
    hashes: list[str] = []
    # Once for the whole block: to find the end of an extent the kernel walks all of it, wherever the question begins.
    extents = await in_thread(data_extents, block.memfd, 0, block.size_bytes)
    size, stretch = block.size_bytes, STRETCH_PIECES * PIECE_BYTES
    for first in range(0, size, LANES * stretch):
        starts = range(first, min(first + LANES * stretch, size), stretch)
        lanes = (in_thread(_hash_stretch, block, start, min(start + stretch, size), extents) for start in starts)
        for found in await asyncio.gather(*lanes, return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
            hashes += found
    return hash_of(hashes)


def _hash_stretch(block: RamBlockPort, start: int, end: int, extents: list[tuple[int, int]]) -> list[str]:
    return [
        _hash_piece(block, offset, min(offset + PIECE_BYTES, end), extents) for offset in range(start, end, PIECE_BYTES)
    ]


def _hash_piece(block: RamBlockPort, start: int, end: int, extents: list[tuple[int, int]]) -> str:
    index = bisect.bisect_right(extents, start, key=itemgetter(1))  # the first that ends behind the piece's begin
    first, last = extents[index] if index < len(extents) else (end, end)
    if first >= end:
        return _hash_of_zeros(end - start)
    # Of memory in huge pages nobody says where it has holes.
    if first <= start and end <= last and block.page_size == PAGE:
        pages = block.pages[start // PAGE : end // PAGE]
        return xxh3_128_hexdigest(pages.data)
    buffer = bytearray(end - start)
    # A memfd is read whole, or it is none any more (`machine.retired`).
    if os.preadv(block.memfd, [buffer], start) != len(buffer):
        raise WorkloadError("(gone)", f"RAM block {block.name} went with it")
    return xxh3_128_hexdigest(buffer)


@cache
def _hash_of_zeros(length: int) -> str:
    return xxh3_128_hexdigest(bytes(length))

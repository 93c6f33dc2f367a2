"""What a source has left to send, and where its background goes on.

The rule of the file: a page is in one of the two bitmaps of its block, or sent; who takes one out sends it. Pages that
are holes in the memfd are kept apart: they are announced as zeros without being read; a write to one makes it dirty.
"""

from __future__ import annotations

from collections.abc import Sequence

from migrated.model.bitmap import PageBitmap
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PAGE

ZERO_RECORD_BYTES = 9


class Unsent:
    """Dirty pages and holes of all blocks, by block name, and a cursor."""

    def __init__(self, blocks: Sequence[RamBlockPort]) -> None:
        self.blocks = blocks
        self.dirty = {block.name: PageBitmap(block.size_bytes // PAGE) for block in blocks}
        self.holes = {block.name: PageBitmap(block.size_bytes // PAGE) for block in blocks}
        self._numbers = {block.name: number for number, block in enumerate(blocks)}
        self._number = 0
        self.page = 0
        """The cursor within `block`."""

    @property
    def block(self) -> RamBlockPort:
        """The block in which the background goes on."""
        return self.blocks[self._number]

    @property
    def bytes_left(self) -> int:
        """How much memory is not sent."""
        return (self._count(self.dirty) + self._count(self.holes)) * PAGE

    @property
    def wire_bytes(self) -> int:
        """About how much that is on the wire."""
        return self._count(self.dirty) * PAGE + self._count(self.holes) * ZERO_RECORD_BYTES

    @staticmethod
    def _count(bitmaps: dict[str, PageBitmap]) -> int:
        return sum(bitmap.count for bitmap in bitmaps.values())

    def split(self, name: str, dirty: PageBitmap, holes: PageBitmap) -> None:
        """Replace both bitmaps of a block."""
        self.dirty[name], self.holes[name] = dirty, holes

    @property
    def untouched(self) -> bool:
        """True where nothing was sent of any block."""
        return self.bytes_left == sum(block.size_bytes for block in self.blocks)

    def take_all_for_dirty(self) -> None:
        """Forget which pages are holes: of memory that was written since, nobody has looked."""
        for bitmap in self.dirty.values():
            bitmap.set_all()
        for bitmap in self.holes.values():
            bitmap.clear_all()

    def narrow(self, name: str, dirty: PageBitmap, holes: PageBitmap) -> None:
        """Take a block apart anew, where all that was not sent of it was taken for dirty."""
        for bitmap in (dirty, holes):
            bitmap.intersect(self.dirty[name])
        self.split(name, dirty, holes)

    def forget_holes(self) -> None:
        """Take dirty pages out of the holes, whose announcement could otherwise overwrite newer content."""
        for name, holes in self.holes.items():
            if holes.count:
                holes.subtract(self.dirty[name])

    def left(self, block: RamBlockPort) -> PageBitmap:
        """Return everything that is not sent of a block."""
        both = PageBitmap(block.size_bytes // PAGE)
        both.or_update(self.dirty[block.name])
        both.or_update(self.holes[block.name])
        return both

    # -- host pages larger than target pages -------------------------------------------------------------------

    def widen(self) -> None:
        """From now on such pages go whole: what is left of one in part is left of it all."""
        for block in self.blocks:
            if (group := block.page_size // PAGE) > 1:
                dirty, holes = self.dirty[block.name], self.holes[block.name]
                dirty.widen(group)
                holes.widen(group)
                holes.subtract(dirty)

    def take_host_page(self, block: RamBlockPort, page: int) -> tuple[int, int, bool] | None:
        """Take all of the host page around ``page``: its first page, the one behind it, and whether it is a hole.

        None where it is sent.
        """
        group = block.page_size // PAGE
        first = page // group * group
        end = first + group
        hole = self.holes[block.name].clear_range(first, end)
        return (first, end, bool(hole)) if hole or self.dirty[block.name].clear_range(first, end) else None

    # -- the cursor --------------------------------------------------------------------------------------------

    def rewind(self) -> None:
        """Go back to the beginning."""
        self._number = self.page = 0

    def next_block(self) -> None:
        """Go to the beginning of the next block."""
        self._number = (self._number + 1) % len(self.blocks)
        self.page = 0

    def go_behind(self, name: str, page: int) -> int | None:
        """Go on behind a page. Return how far away the cursor was; None: in another block."""
        number = self._numbers[name]
        distance = abs(page - self.page) if number == self._number else None
        self._number, self.page = number, page + 1
        return distance

    def named(self, name: str) -> RamBlockPort:
        """Return a block."""
        return self.blocks[self._numbers[name]]

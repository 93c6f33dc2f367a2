"""A bitmap with one bit per page, on numpy words.

The rule of the file: the cost of an operation grows with what it touches (words of 64 pages, ranges), never with the
number of pages in a Python loop, and `count` is kept, not counted. Bit order is that of RECV_BITMAP: page p is bit
p % 8 of byte p // 8, in little-endian words of 64 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError

Pages = NDArray[np.int64]
Words = NDArray[np.uint64]

_WORD = np.dtype("<u8")
_WORD_BITS = 64
_FULL = (1 << _WORD_BITS) - 1
#: Ranges are many where there is one for so many pages.
_DENSE_PAGES = 16
_NO_PAGES: Pages = np.empty(0, np.int64)
#: `take` looks at four times as many words each time it found too little, up to this many (16 GiB of 4 KiB pages).
_SCAN_MAX_WORDS = 1 << 16


class PageBitmap:
    """A set of page numbers below ``pages``."""

    __slots__ = ("_count", "_words", "pages")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._words: Words = np.zeros(-(-pages // _WORD_BITS), _WORD)
        self._count = 0

    @property
    def count(self) -> int:
        """How many pages are set."""
        return self._count

    # -- everything, one range, one page -----------------------------------------------------------------------

    def set_all(self) -> None:
        """Set every page."""
        self._words.fill(_FULL)
        if self.pages % _WORD_BITS:
            self._words[-1] = (1 << self.pages % _WORD_BITS) - 1
        self._count = self.pages

    def clear_all(self) -> None:
        """Clear every page."""
        self._words.fill(0)
        self._count = 0

    def set_range(self, start: int, end: int) -> int:
        """Set the pages start..end-1 and return how many of them were not."""
        before = self._count
        for first, last, mask in self._pieces(start, end):
            part = self._words[first:last]
            self._count += int(np.bitwise_count(~part & mask).sum())
            part |= mask
        return self._count - before

    def clear_range(self, start: int, end: int) -> int:
        """Clear the pages start..end-1 and return how many of them were set."""
        before = self._count
        for first, last, mask in self._pieces(start, end):
            part = self._words[first:last]
            self._count -= int(np.bitwise_count(part & mask).sum())
            part &= ~mask
        return before - self._count

    def _pieces(self, start: int, end: int) -> list[tuple[int, int, np.uint64]]:
        """Cut a range into (first word, word behind the last, mask)."""
        self._check_bounds(start, end)
        if start >= end:
            return []
        first, last = start // _WORD_BITS, (end - 1) // _WORD_BITS
        head = _FULL << start % _WORD_BITS & _FULL
        tail = _FULL >> (_WORD_BITS - 1 - (end - 1) % _WORD_BITS)
        if first == last:
            return [(first, first + 1, np.uint64(head & tail))]
        return [
            (first, first + 1, np.uint64(head)),
            (first + 1, last, np.uint64(_FULL)),
            (last, last + 1, np.uint64(tail)),
        ]

    def _check_bounds(self, low: int, end: int) -> None:
        if low < 0 or end > self.pages:
            raise IndexError(f"pages {low}..{end - 1} are not all below {self.pages}")

    def set(self, page: int) -> None:
        """Set one page."""
        self._check_bounds(page, page + 1)
        index, bit = page // _WORD_BITS, 1 << page % _WORD_BITS
        word = int(self._words[index])
        self._count += not word & bit
        self._words[index] = word | bit

    def clear(self, page: int) -> bool:
        """Clear one page and say whether it was set."""
        self._check_bounds(page, page + 1)
        index, bit = page // _WORD_BITS, 1 << page % _WORD_BITS
        word = int(self._words[index])
        if not word & bit:
            return False
        self._count -= 1
        self._words[index] = word & ~bit
        return True

    def test(self, page: int) -> bool:
        """Say whether a page is set."""
        self._check_bounds(page, page + 1)
        return bool(int(self._words[page // _WORD_BITS]) >> page % _WORD_BITS & 1)

    # -- many ranges, many pages -------------------------------------------------------------------------------

    def set_ranges(self, starts: Pages, ends: Pages) -> int:
        """Set the pages starts[i]..ends[i]-1 of every i, in any order; return how many were not set before."""
        starts, ends = _disjoint(np.asarray(starts, np.int64), np.asarray(ends, np.int64))
        if not len(starts):
            return 0
        self._check_bounds(int(starts[0]), int(ends[-1]))
        before = self._count
        if len(starts) * _DENSE_PAGES > ends[-1] - starts[0]:
            self._set_dense(starts, ends)
            return self._count - before
        first, last = starts >> 6, (ends - 1) >> 6
        head = np.uint64(_FULL) << (starts & 63).astype(np.uint64)
        tail = np.uint64(_FULL) >> (63 - (ends - 1 & 63)).astype(np.uint64)
        several = first != last
        self._or_words(first, np.where(several, head, head & tail))
        if several.any():
            self._or_words(last[several], tail[several])
            self._or_words(_expand(first[several] + 1, last[several]), np.uint64(_FULL))
        return self._count - before

    def _set_dense(self, starts: Pages, ends: Pages) -> None:
        """Set ranges that are so many that going through all pages between them costs less than going through them."""
        first, last = int(starts[0]) >> 6, (int(ends[-1]) - 1 >> 6) + 1
        low = first * _WORD_BITS
        steps = np.zeros((last - first) * _WORD_BITS + 1, np.int8)
        steps[starts - low] = 1
        steps[ends - low] -= 1  # where one ends and another one begins nothing changes
        inside = np.cumsum(steps[:-1], dtype=np.int8).view(bool)
        old = self._words[first:last]
        new = old | np.packbits(inside, bitorder="little").view(_WORD)
        self._count += int(np.bitwise_count(old ^ new).sum())
        self._words[first:last] = new

    def set_pages(self, pages: Pages) -> int:
        """Set pages, in any order and any number of times; return how many were not set before."""
        if not len(pages):
            return 0
        steps = np.diff(pages)
        if (steps == 1).all():
            return self.set_range(int(pages[0]), int(pages[-1]) + 1)
        if (steps < 0).any():
            pages = np.sort(pages)
        self._check_bounds(int(pages[0]), int(pages[-1]) + 1)
        before = self._count
        self._or_words(pages >> 6, np.uint64(1) << (pages & 63).astype(np.uint64))
        return self._count - before

    def _or_words(self, words: Pages, masks: Words | np.uint64) -> None:
        """Or masks into words; ``words`` ascends, equal ones side by side (all different for a single mask)."""
        if isinstance(masks, np.ndarray):
            starts = np.flatnonzero(np.diff(words, prepend=-1))
            if len(starts) < len(words):
                words, masks = words[starts], np.bitwise_or.reduceat(masks, starts)
        old = self._words[words]
        new = old | masks
        self._words[words] = new
        self._count += int(np.bitwise_count(old ^ new).sum())

    def clear_pages(self, pages: Pages) -> int:
        """Clear pages, which ascend; return how many were set."""
        if not len(pages):
            return 0
        self._check_bounds(int(pages[0]), int(pages[-1]) + 1)
        words = pages >> 6
        starts = np.flatnonzero(np.diff(words, prepend=-1))
        masks = np.bitwise_or.reduceat(np.uint64(1) << (pages & 63).astype(np.uint64), starts)
        old = self._words[words[starts]]
        self._words[words[starts]] = old & ~masks
        cleared = int(np.bitwise_count(old & masks).sum())
        self._count -= cleared
        return cleared

    def test_pages(self, pages: Pages) -> NDArray[np.bool_]:
        """Say of each page whether it is set."""
        bits: Words = self._words[pages >> 6] >> (pages & 63).astype(np.uint64)
        return (bits & np.uint64(1)).astype(np.bool_)

    def widen(self, group: int) -> None:
        """Set every page of each aligned group of pages that has one set; groups are whole words, ``pages`` groups."""
        words = self._words.reshape(-1, group // _WORD_BITS)
        self._combine(np.repeat(np.where(words.any(axis=1), np.uint64(_FULL), np.uint64(0)), words.shape[1]))

    # -- taking ------------------------------------------------------------------------------------------------

    def take(self, cursor: int, limit: int) -> tuple[Pages, int]:
        """Clear and return the first ``limit`` set pages from ``cursor`` on, ascending, and where to go on.

        The next cursor is ``pages`` once nothing was left behind it.
        """
        found: list[Pages] = []
        # As many words as hold `limit` pages where all are set, and one for a cursor within a word.
        step = limit // _WORD_BITS + 2
        while limit and cursor < self.pages and self._count:
            first = cursor // _WORD_BITS
            got = self._take_from(first, first + step, cursor, limit)
            found.append(got)
            limit -= len(got)
            if not limit:
                return _joined(found), int(got[-1]) + 1
            cursor = (first + step) * _WORD_BITS
            step = min(step * 4, _SCAN_MAX_WORDS)
        return _joined(found), (self.pages if limit else cursor)

    def take_run(self, cursor: int, count: int) -> int | None:
        """Clear the first set page from ``cursor`` on and those behind it, ``count`` in all, and return the first.

        None, with nothing cleared, where not all of them are set; that costs next to nothing.
        """
        first = self.first_from(cursor)
        if first is None or first + count > self.pages:
            return None
        low, high = first // _WORD_BITS, -(-(first + count) // _WORD_BITS)
        words = int.from_bytes(self._words[low:high].tobytes(), "little")
        mask = (1 << count) - 1 << first % _WORD_BITS
        if words & mask != mask:
            return None
        self._words[low:high] = np.frombuffer((words & ~mask).to_bytes((high - low) * 8, "little"), _WORD)
        self._count -= count
        return first

    def first_from(self, cursor: int) -> int | None:
        """Return the first set page from ``cursor`` on."""
        if not self._count or cursor >= self.pages:
            return None
        index, step = cursor // _WORD_BITS, _WORD_BITS
        word = int(self._words[index]) >> cursor % _WORD_BITS << cursor % _WORD_BITS
        while not word:
            index += 1
            if index >= len(self._words):
                return None
            used = np.flatnonzero(self._words[index : index + step])
            if len(used):
                index += int(used[0])
                word = int(self._words[index])
            else:
                index, step = index + step - 1, min(step * 4, _SCAN_MAX_WORDS)
        return index * _WORD_BITS + (word & -word).bit_length() - 1

    def _take_from(self, first: int, last: int, cursor: int, limit: int) -> Pages:
        """Clear and return up to ``limit`` set pages of the words first..last-1 that are not below ``cursor``."""
        words = self._words[first:last]
        used = np.flatnonzero(words)
        if not len(used):
            return _NO_PAGES
        # Each word that is not empty gives at least one page, the one with the cursor perhaps none.
        used = used[: limit + 1]
        values = words[used]
        if used[0] == 0:
            values[0] &= np.uint64(_FULL << cursor % _WORD_BITS & _FULL)
        bits = np.flatnonzero(np.unpackbits(values.view(np.uint8), bitorder="little"))[:limit]
        pages: Pages = (used[bits >> 6] + first << 6) + (bits & 63)
        taken = np.zeros(len(values) * _WORD_BITS, np.uint8)
        taken[bits] = 1
        words[used] &= ~np.packbits(taken, bitorder="little").view(_WORD)
        self._count -= len(pages)
        return pages

    # -- other bitmaps -----------------------------------------------------------------------------------------

    def or_update(self, other: PageBitmap) -> int:
        """Set every page that is set in ``other``; return how many were not set before."""
        return self._combine(self._words | self._same_size(other))

    def subtract(self, other: PageBitmap) -> int:
        """Clear every page that is set in ``other``; return how many were set before."""
        return -self._combine(self._words & ~self._same_size(other))

    def intersect(self, other: PageBitmap) -> int:
        """Clear every page that is not set in ``other``; return how many were set before."""
        return -self._combine(self._words & self._same_size(other))

    def _same_size(self, other: PageBitmap) -> Words:
        if other.pages != self.pages:
            raise ValueError(f"a bitmap of {other.pages} pages does not fit one of {self.pages}")
        return other._words

    def _combine(self, words: Words) -> int:
        before, self._words = self._count, words
        self._count = int(np.bitwise_count(words).sum())
        return self._count - before

    def ranges(self) -> tuple[Pages, Pages]:
        """Return the set pages as ascending ranges starts[i]..ends[i]-1."""
        # A bit that differs from the one before it: few words have one, where ranges are long.
        before = self._words << np.uint64(1)
        before[1:] |= self._words[:-1] >> np.uint64(_WORD_BITS - 1)
        edges = self._words ^ before
        used = np.flatnonzero(edges)
        bits = np.flatnonzero(np.unpackbits(edges[used].view(np.uint8), bitorder="little"))
        at = (used[bits >> 6] << 6) + (bits & 63)
        if len(at) % 2:
            at = np.append(at, self.pages)
        return at[::2], at[1::2]

    def to_bytes(self) -> bytes:
        """Return the bitmap as RECV_BITMAP carries it: whole words of 8 bytes."""
        return self._words.tobytes()

    @classmethod
    def from_bytes(cls, pages: int, raw: bytes) -> PageBitmap:
        """Make a bitmap of what RECV_BITMAP carried; bits behind the last page are dropped.

        Raises RemoteProtocolError when the size is not that of ``pages`` pages.
        """
        bitmap = cls(pages)
        if len(raw) != bitmap._words.nbytes:
            raise RemoteProtocolError(f"bitmap size mismatch ({len(raw):#x} != {bitmap._words.nbytes:#x})")
        bitmap.set_all()
        bitmap._combine(bitmap._words & np.frombuffer(raw, _WORD))
        return bitmap


def _disjoint(starts: Pages, ends: Pages) -> tuple[Pages, Pages]:
    """Return the same pages as ascending ranges that are not empty and do not overlap."""
    if (starts < ends).all() and (starts[1:] >= ends[:-1]).all():
        return starts, ends
    keep = starts < ends
    starts, ends = starts[keep], ends[keep]
    order = np.argsort(starts)
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    opens = np.ones(len(starts), bool)
    opens[1:] = starts[1:] > reach[:-1]
    return starts[opens], reach[np.append(opens[1:], True)[: len(opens)]]


def _expand(starts: Pages, ends: Pages) -> Pages:
    """Return all numbers of ascending ranges, some of which may be empty."""
    lengths = ends - starts
    ahead = np.cumsum(lengths) - lengths
    numbers: Pages = np.arange(int(lengths.sum())) + np.repeat(starts - ahead, lengths)
    return numbers


def _joined(parts: list[Pages]) -> Pages:
    return parts[0] if len(parts) == 1 else np.concatenate([_NO_PAGES, *parts])


def consecutive(pages: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the runs of pages that follow each other, as positions (start, end) in ``pages``."""
    breaks = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
    return list(zip([0, *breaks], [*breaks, len(pages)], strict=True))

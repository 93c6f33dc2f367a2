"""The page bitmap against a plain set of numbers, and the byte order of RECV_BITMAP."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.model.bitmap import PageBitmap, consecutive

#: Around word boundaries, and many words.
SIZES = st.sampled_from([0, 1, 7, 63, 64, 65, 128, 200, 1000])
SHARES = st.floats(0, 1)


def array(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


class BitmapIsASet(RuleBasedStateMachine):
    """Every operation does to the bitmap what it does to a set."""

    @initialize(pages=SIZES)
    def start(self, pages: int) -> None:
        self.pages = pages
        self.bitmap = PageBitmap(pages)
        self.model: set[int] = set()

    def at(self, share: float) -> int:
        return round(share * self.pages)

    def page(self, share: float) -> int:
        return min(self.at(share), self.pages - 1)

    def adds(self, added: set[int], count: int) -> None:
        assert count == len(added - self.model)
        self.model |= added

    @rule()
    def set_all(self) -> None:
        self.bitmap.set_all()
        self.model = set(range(self.pages))

    @rule()
    def clear_all(self) -> None:
        self.bitmap.clear_all()
        self.model = set()

    @rule(start=SHARES, end=SHARES)
    def set_range(self, start: float, end: float) -> None:
        pages = self.at(start), self.at(end)
        self.adds(set(range(*pages)), self.bitmap.set_range(*pages))

    @rule(share=SHARES)
    def set_one(self, share: float) -> None:
        if self.pages:
            self.bitmap.set(self.page(share))
            self.model.add(self.page(share))

    @rule(share=SHARES)
    def clear_one(self, share: float) -> None:
        if self.pages:
            assert self.bitmap.clear(self.page(share)) == (self.page(share) in self.model)
            self.model.discard(self.page(share))

    @rule(cursor=SHARES, count=st.sampled_from([1, 2, 63, 64, 65, 130]))
    def take_run(self, cursor: float, count: int) -> None:
        first = min((page for page in self.model if page >= self.at(cursor)), default=None)
        run = set() if first is None else set(range(first, first + count))
        whole = first if run and run <= self.model else None
        assert self.bitmap.take_run(self.at(cursor), count) == whole
        if whole is not None:
            self.model -= run

    @rule(start=SHARES, end=SHARES)
    def clear_range(self, start: float, end: float) -> None:
        pages = set(range(self.at(start), self.at(end)))
        assert self.bitmap.clear_range(self.at(start), self.at(end)) == len(pages & self.model)
        self.model -= pages

    @rule(ranges=st.lists(st.tuples(SHARES, SHARES), max_size=12))
    def set_ranges_in_any_order(self, ranges: list[tuple[float, float]]) -> None:
        starts = array(*(self.at(start) for start, _ in ranges))
        ends = array(*(self.at(end) for _, end in ranges))
        pages = {page for start, end in zip(starts, ends, strict=True) for page in range(start, end)}
        self.adds(pages, self.bitmap.set_ranges(starts, ends))

    @rule(shares=st.lists(SHARES, max_size=24))
    def set_ranges_as_a_scan_finds_them(self, shares: list[float]) -> None:
        edges = sorted({self.at(share) for share in shares})
        edges = edges[: len(edges) // 2 * 2]
        pages = {page for start, end in zip(edges[::2], edges[1::2], strict=True) for page in range(start, end)}
        self.adds(pages, self.bitmap.set_ranges(array(*edges[::2]), array(*edges[1::2])))

    @rule(shares=st.lists(SHARES, max_size=30), ordered=st.booleans())
    def set_pages(self, shares: list[float], ordered: bool) -> None:
        pages = [self.page(share) for share in shares] if self.pages else []
        if ordered:
            pages.sort()
        self.adds(set(pages), self.bitmap.set_pages(array(*pages)))

    @rule(cursor=SHARES, limit=st.integers(0, 1100))
    def take(self, cursor: float, limit: int) -> None:
        start = self.at(cursor)
        pages, following = self.bitmap.take(start, limit)
        ahead = sorted(page for page in self.model if page >= start)
        assert pages.tolist() == ahead[:limit]
        assert pages.dtype == np.int64
        if len(pages) < limit:
            assert following == self.pages
        else:
            assert following == (ahead[limit - 1] + 1 if limit else start)
        self.model -= set(ahead[:limit])

    @rule(pages=st.sets(st.integers(0, 999)), subtract=st.booleans())
    def combine(self, pages: set[int], subtract: bool) -> None:
        pages = {page for page in pages if page < self.pages}
        other = PageBitmap(self.pages)
        other.set_pages(array(*pages))
        if subtract:
            assert self.bitmap.subtract(other) == len(pages & self.model)
            self.model -= pages
        else:
            self.adds(pages, self.bitmap.or_update(other))

    @rule()
    def there_and_back(self) -> None:
        raw = self.bitmap.to_bytes()
        assert len(raw) == -(-self.pages // 64) * 8
        self.bitmap = PageBitmap.from_bytes(self.pages, raw)
        assert self.bitmap.to_bytes() == raw

    @invariant()
    def same_pages(self) -> None:
        if not hasattr(self, "bitmap"):
            return
        assert self.bitmap.count == len(self.model)
        tested = self.bitmap.test_pages(np.arange(self.pages))
        assert np.flatnonzero(tested).tolist() == sorted(self.model)
        for page in {0, self.pages // 2, self.pages - 1} & set(range(self.pages)):
            assert self.bitmap.test(page) == (page in self.model)


TestBitmapIsASet = BitmapIsASet.TestCase


@given(st.sets(st.integers(0, 511)), st.integers(1, 70))
def test_taking_in_portions_gives_every_page_once(pages: set[int], limit: int) -> None:
    bitmap = PageBitmap(512)
    bitmap.set_pages(array(*pages))
    taken: list[int] = []
    cursor = 0
    while cursor < bitmap.pages:
        portion, cursor = bitmap.take(cursor, limit)
        taken += portion.tolist()
    assert taken == sorted(pages)
    assert bitmap.count == 0


def test_take_finds_a_page_far_away() -> None:
    pages = 1 << 24  # 64 GiB
    bitmap = PageBitmap(pages)
    bitmap.set_range(pages - 2, pages)
    taken, cursor = bitmap.take(5, 1)
    assert (taken.tolist(), cursor) == ([pages - 2], pages - 1)
    assert bitmap.take(cursor, 10)[0].tolist() == [pages - 1]
    assert bitmap.take(0, 10)[1] == pages


def test_a_run_far_away() -> None:
    bitmap = PageBitmap(1 << 22)
    bitmap.set_range(3_000_000, 3_000_200)
    assert bitmap.take_run(70, 128) == 3_000_000
    assert bitmap.take_run(0, 128) is None, "72 are left"
    assert bitmap.take_run(0, 72) == 3_000_128
    assert bitmap.take_run(0, 1) is None


def test_groups_that_have_one_page_have_all() -> None:
    bitmap = PageBitmap(2048)
    bitmap.set(513)
    bitmap.set_range(1535, 1537)
    bitmap.widen(512)
    assert bitmap.count == 3 * 512
    starts, ends = bitmap.ranges()
    assert (starts.tolist(), ends.tolist()) == ([512], [2048])
    bitmap.clear_all()
    bitmap.widen(512)
    assert bitmap.count == 0


@given(st.sets(st.integers(0, 299)), st.sets(st.integers(0, 299)))
def test_pages_that_are_cleared_in_one_go(had: set[int], cleared: set[int]) -> None:
    bitmap = PageBitmap(300)
    bitmap.set_pages(array(*had))
    assert bitmap.clear_pages(array(*sorted(cleared))) == len(had & cleared)
    assert bitmap.count == len(had - cleared)
    assert set(bitmap.take(0, 300)[0].tolist()) == had - cleared
    with pytest.raises(IndexError):
        bitmap.clear_pages(array(300))


def test_the_first_page_from_somewhere() -> None:
    bitmap = PageBitmap(1000)
    assert bitmap.first_from(0) is None
    bitmap.set(70)
    assert (bitmap.first_from(0), bitmap.first_from(70), bitmap.first_from(71), bitmap.first_from(1000)) == (
        70, 70, None, None,
    )  # fmt: skip


def test_many_single_page_ranges() -> None:
    bitmap = PageBitmap(262144)
    starts = np.arange(131072) * 2
    assert bitmap.set_ranges(starts, starts + 1) == 131072
    assert bitmap.to_bytes() == b"\x55" * (262144 // 8)


def test_byte_order_is_that_of_recv_bitmap() -> None:
    bitmap = PageBitmap(70)
    bitmap.set_pages(array(0, 9, 64, 69))
    assert bitmap.to_bytes() == bytes.fromhex("0102000000000000 2100000000000000")
    # [V] 64 MiB of pc.ram are 2048 bytes; blocks of one page 8
    assert len(PageBitmap((64 << 20) // 4096).to_bytes()) == 2048
    assert len(PageBitmap(1).to_bytes()) == 8


def test_received_bitmap_is_checked() -> None:
    assert PageBitmap.from_bytes(3, b"\xff" * 8).count == 3
    with pytest.raises(RemoteProtocolError, match=r"bitmap size mismatch \(0x7 != 0x8\)"):
        PageBitmap.from_bytes(3, bytes(7))


def test_pages_that_do_not_exist() -> None:
    bitmap = PageBitmap(70)
    for wrong in (-1, 70, 127, 10**9):
        with pytest.raises(IndexError, match="not all below 70"):
            bitmap.test(wrong)
        with pytest.raises(IndexError):
            bitmap.set_pages(array(3, wrong))
        with pytest.raises(IndexError):
            bitmap.set_ranges(array(wrong), array(wrong + 1))
        with pytest.raises(IndexError):
            bitmap.set_range(wrong, wrong + 1)
    with pytest.raises(IndexError):
        bitmap.clear_range(0, 71)
    assert bitmap.count == 0


def test_bitmaps_of_another_size() -> None:
    with pytest.raises(ValueError, match="64 pages does not fit one of 65"):
        PageBitmap(65).or_update(PageBitmap(64))


@given(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 199)))
def test_what_two_bitmaps_have_in_common(one: set[int], other: set[int]) -> None:
    bitmap, second = PageBitmap(200), PageBitmap(200)
    bitmap.set_pages(array(*one))
    second.set_pages(array(*other))
    assert bitmap.intersect(second) == len(one - other)
    assert bitmap.count == len(one & other)
    starts, ends = bitmap.ranges()
    assert {page for start, end in zip(starts, ends, strict=True) for page in range(start, end)} == one & other


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ([7], [(0, 1)]),
        ([7, 8, 9], [(0, 3)]),
        ([7, 8, 10, 11, 3], [(0, 2), (2, 4), (4, 5)]),
        ([9, 8], [(0, 1), (1, 2)]),
    ],
)
def test_pages_that_follow_each_other(pages: list[int], runs: list[tuple[int, int]]) -> None:
    assert consecutive(np.array(pages)) == runs

"""Huge pages are put together from target pages: whole, once, and not mixed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.kernel.huge_pages import HUGE_PAGE_SIZE
from migrated.ram.arrivals import Arrivals
from migrated.ram.host_pages import HostPages
from migrated.ram.unsent import Unsent
from migrated.wire.ram import PAGE, PageRun, ZeroRun
from tests.support.huge_pages import huge_pages
from tests.support.memory_block import Block, memory_block

GROUP = HUGE_PAGE_SIZE // PAGE


class Placed:
    def __init__(self) -> None:
        self.pages: list[tuple[int, bytes | None]] = []
        self.host_pages = HostPages(self._place)

    def _place(self, arrivals: Arrivals, first: int, data: NDArray[np.uint8] | None) -> None:
        self.pages.append((first, None if data is None else data.tobytes()))


@pytest.fixture
def placed() -> Placed:
    return Placed()


@pytest.fixture
def block() -> Iterator[Block]:
    with huge_pages(4), memory_block(4 * GROUP, page_size=HUGE_PAGE_SIZE) as block:
        yield block


@pytest.fixture
def arrivals(block: Block) -> Arrivals:
    return Arrivals(block)


def data(*pages: int) -> PageRun:
    rows = np.repeat(np.array(pages, np.int64)[:, None] % 251 + 1, PAGE, axis=1).astype(np.uint8)
    return PageRun("heap", np.array(pages, np.int64), rows)


def zeros(*pages: int, fill: int = 0) -> ZeroRun:
    return ZeroRun("heap", np.array(pages, np.int64), fill)


def content(first: int) -> bytes:
    return b"".join(bytes([page % 251 + 1]) * PAGE for page in range(first, first + GROUP))


def test_in_pieces_and_several_in_one_run(placed: Placed, arrivals: Arrivals) -> None:
    placed.host_pages.take(arrivals, data(*range(100)))
    assert placed.pages == []
    placed.host_pages.take(arrivals, data(*range(100, 2 * GROUP + 1)))
    assert placed.pages == [(0, content(0)), (GROUP, content(GROUP))]
    placed.host_pages.take(arrivals, data(*range(2 * GROUP + 1, 3 * GROUP)))
    assert placed.pages[2:] == [(2 * GROUP, content(2 * GROUP))]


def test_zeros_among_data_and_in_any_order(placed: Placed, arrivals: Arrivals) -> None:
    placed.host_pages.take(arrivals, data(*range(GROUP)))  # what is left in the buffer must not show
    placed.host_pages.take(arrivals, data(*range(GROUP + 256, 2 * GROUP)))
    placed.host_pages.take(arrivals, zeros(*range(GROUP, GROUP + 256)))
    assert placed.pages[1] == (GROUP, bytes(256 * PAGE) + content(GROUP)[256 * PAGE :])


def test_all_zeros_are_told_as_such(placed: Placed, arrivals: Arrivals) -> None:
    placed.host_pages.take(arrivals, zeros(*range(GROUP)))
    placed.host_pages.take(arrivals, zeros(*range(GROUP, 2 * GROUP), fill=3))
    assert placed.pages == [(0, None), (GROUP, b"\3" * HUGE_PAGE_SIZE)]


def test_what_does_not_belong_together_is_refused(placed: Placed, arrivals: Arrivals) -> None:
    placed.host_pages.take(arrivals, data(0, 1, 2))
    with pytest.raises(RemoteProtocolError, match=f"Non-same host page detected: page {GROUP} of block heap"):
        placed.host_pages.take(arrivals, data(GROUP))
    with pytest.raises(RemoteProtocolError, match="Non-same host page detected"):
        placed.host_pages.take(arrivals, data(3, GROUP + 4))
    with pytest.raises(RemoteProtocolError, match="a page of host page 0 of block heap comes twice"):
        placed.host_pages.take(arrivals, data(2))
    with pytest.raises(RemoteProtocolError, match="comes twice"):
        placed.host_pages.take(arrivals, zeros(9, 9))
    assert placed.pages == []


def test_they_land_through_the_mapping_before_anybody_listens(block: Block, arrivals: Arrivals) -> None:
    for run in (data(5), data(*range(20, 40), *range(600, 620)), data(700, 702, 704)):
        arrivals.land(run.pages, run.data)
    here = [5, *range(20, 40), *range(600, 620), 700, 702, 704]
    assert np.flatnonzero(block.pages[: 2 * GROUP, 9]).tolist() == here
    assert [page for page in here if block.pages[page, 0] != page % 251 + 1] == []
    assert arrivals.count == len(here)


def test_what_is_left_in_part_is_left_whole_and_taken_whole(block: Block) -> None:
    unsent = Unsent([block])
    dirty, holes = unsent.dirty["heap"], unsent.holes["heap"]
    dirty.set(GROUP + 7)
    holes.set_range(GROUP + 8, 3 * GROUP)
    unsent.widen()
    assert [bitmap.count for bitmap in (dirty, holes)] == [GROUP, GROUP]
    assert unsent.take_host_page(block, 3) is None
    assert unsent.take_host_page(block, GROUP + 3) == (GROUP, 2 * GROUP, False)
    assert unsent.take_host_page(block, 2 * GROUP) == (2 * GROUP, 3 * GROUP, True)
    assert unsent.take_host_page(block, 2 * GROUP) is None
    assert unsent.bytes_left == 0

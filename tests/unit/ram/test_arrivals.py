"""Landing before a machine runs: into holes, and into memory with something old in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.kernel.memory import data_extents
from migrated.ram.arrivals import Arrivals
from migrated.ram.holes import make_holes
from migrated.ram.landing import check_doubts
from migrated.wire.ram import PAGE
from tests.support.memory_block import Block, memory_block

PAGES = 64


@pytest.fixture
def block() -> Iterator[Block]:
    with memory_block(PAGES) as block:
        yield block


def rows(*pages: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Pages in records, as they lie in a stream: not one right behind the other."""
    records = np.zeros((len(pages), 8 + PAGE), np.uint8)
    records[:, 8:] = np.array(pages, np.uint8)[:, None] + 1
    return np.array(pages, np.int64), records[:, 8:]


def there(block: Block) -> list[tuple[int, int]]:
    return [(start // PAGE, end // PAGE) for start, end in data_extents(block.memfd, 0, block.size_bytes)]


def test_old_memory_is_overwritten_and_what_is_zero_becomes_a_hole(block: Block) -> None:
    os.pwrite(block.memfd, b"old!" * (16 * PAGE), 0)  # the pages 0..63, less what is punched here
    make_holes(block, np.arange(40, 64))
    assert there(block) == [(0, 40)]
    arrivals = Arrivals(block)
    arrivals.keep(data_extents(block.memfd, 0, block.size_bytes))
    assert arrivals.count == 0, "what is old has not arrived"
    for pages in (range(10), range(38, 45), (50, 52, 54)):
        arrivals.land(*rows(*pages))
    zeros = np.array([*range(10, 38), *range(45, 50), 51, 53, *range(55, 64)])
    stale = arrivals.take_stale(zeros)
    assert stale.tolist() == list(range(10, 38))
    make_holes(block, stale)
    arrivals.add_holes(zeros)
    assert arrivals.count == PAGES
    assert there(block) == [(0, 10), (38, 45), (50, 51), (52, 53), (54, 55)]
    data = [*range(10), *range(38, 45), 50, 52, 54]
    assert [os.pread(block.memfd, PAGE, page * PAGE) for page in data] == [bytes([page + 1]) * PAGE for page in data]


def test_a_page_that_came_and_is_zero_now_is_a_hole_again(block: Block) -> None:
    arrivals = Arrivals(block)
    arrivals.land(*rows(3, 4, 5))
    arrivals.land(*rows(4))
    assert there(block) == [(3, 6)]
    stale = arrivals.take_stale(np.array([6, 4, 4]))
    assert stale.tolist() == [4]
    make_holes(block, stale)
    assert not len(arrivals.take_stale(np.array([4])))
    arrivals.land(*rows(4, 5))
    assert there(block) == [(3, 6)]
    assert arrivals.count == 3
    assert block.pages[3:6, 0].tolist() == [4, 5, 6]


def one_by_one(arrivals: Arrivals) -> None:
    for page in range(10, 30):
        arrivals.add_page(page)


COMES_AGAIN: dict[str, Callable[[Arrivals], None]] = {
    "a run": lambda arrivals: arrivals.add_run(10, 30),
    "one after the other": one_by_one,
    "scattered pages, in any order": lambda arrivals: arrivals.add_pages(np.array([*range(29, 9, -1), 0, 63])),
    "zeros": lambda arrivals: arrivals.add_holes(np.arange(10, 30)),
    "nothing, for it was dropped": lambda arrivals: arrivals.remove(10, 30),
}


@pytest.mark.parametrize("what", COMES_AGAIN)
def test_a_page_is_doubted_until_it_comes_again(block: Block, what: str) -> None:
    arrivals = Arrivals(block)
    arrivals.add_run(0, PAGES)
    check_doubts({"heap": arrivals})
    arrivals.doubt(np.array([12, 25, 40]))
    assert arrivals.count == PAGES, "what is doubted has arrived"
    COMES_AGAIN[what](arrivals)
    with pytest.raises(RemoteProtocolError, match=r"changed on the way.*1 others in block heap.* page 40") as caught:
        check_doubts({"heap": arrivals})
    assert caught.value.section == "ram"
    arrivals.add_page(40)
    check_doubts({"heap": arrivals})

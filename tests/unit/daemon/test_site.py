"""The host as a migration sees it: its memory, and who else counts on that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrated.daemon.site import RESERVATION, RESERVED_FOR_S, HostSite
from migrated.kernel.huge_pages import HUGE_PAGE_SIZE
from migrated.kernel.memory import create_memfd
from migrated.machine.block import MachineBlock
from tests.support.huge_pages import huge_pages

GIB = 1 << 30


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def site(path: Path, name: str, clock: Clock, blocks: tuple[MachineBlock, ...] = ()) -> HostSite:
    (path / name).mkdir(exist_ok=True)
    return HostSite(path, path / name, lambda: blocks, "migrated", clock)


def test_two_do_not_count_on_the_same_memory(tmp_path: Path, clock: Clock) -> None:
    a, b = site(tmp_path, "a", clock), site(tmp_path, "b", clock)
    a.reserve(1 << 50)
    assert b.free_bytes() == 0
    assert a.free_bytes() > 0
    a.reserve(0)
    a.reserve(0)
    assert b.free_bytes() > 0
    assert not (tmp_path / "a" / RESERVATION).exists()


def test_a_reservation_that_is_not_renewed_ends(tmp_path: Path, clock: Clock) -> None:
    a, b = site(tmp_path, "a", clock), site(tmp_path, "b", clock)
    a.reserve(1 << 50)
    clock.now += RESERVED_FOR_S / 2
    a.reserve(1 << 50)
    clock.now += RESERVED_FOR_S / 2
    assert b.free_bytes() == 0
    clock.now += RESERVED_FOR_S / 2
    assert b.free_bytes() > 0


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "\xff", '{"size_bytes": -1, "until_s": 1010}', '{"size_bytes": 1e99}']
)
def test_what_is_no_reservation_reserves_nothing(tmp_path: Path, clock: Clock, text: str) -> None:
    a, b = site(tmp_path, "a", clock), site(tmp_path, "b", clock)
    before = b.free_bytes()
    a.reserve(1)
    (tmp_path / "a" / RESERVATION).write_text(text, encoding="latin-1")
    assert abs(b.free_bytes() - before) < GIB


def test_one_of_before_the_host_was_started_anew_reserves_nothing(tmp_path: Path, clock: Clock) -> None:
    a, b = site(tmp_path, "a", clock), site(tmp_path, "b", clock)
    a.reserve(1 << 50)
    clock.now = 5.0
    assert b.free_bytes() > 0


def test_holes_are_not_used(tmp_path: Path, clock: Clock) -> None:
    memfd = create_memfd("heap", 1 << 20)
    block = MachineBlock("heap", 1 << 20, memfd)
    here = site(tmp_path, "a", clock, (block,))
    assert here.used_bytes(block) == 0
    os.pwrite(memfd, b"x", 4096)
    assert here.used_bytes(block) == 4096
    os.close(memfd)


def test_huge_pages_are_reserved_or_what_is_missing_is_said(tmp_path: Path, clock: Clock) -> None:
    size = 4 * HUGE_PAGE_SIZE
    memfds = [create_memfd("heap", size, HUGE_PAGE_SIZE) for _ in range(2)]
    blocks = tuple(MachineBlock(f"heap{number}", size, memfd) for number, memfd in enumerate(memfds))
    here = site(tmp_path, "a", clock, blocks)
    before = here.free_bytes()
    with huge_pages(6):
        (obstacle,) = here.huge_page_obstacles()
        assert "RAM block heap1" in str(obstacle)
        assert "expected 4, found 2 free" in str(obstacle)
        assert obstacle.error_id == "huge-pages-short"
        assert abs(here.free_bytes() - before) < GIB, "they are no part of what else is free"
    for memfd in memfds:
        os.close(memfd)


def test_a_directory_that_can_be_written_is_no_obstacle(tmp_path: Path, clock: Clock) -> None:
    assert site(tmp_path, "a", clock).record_obstacles() == []

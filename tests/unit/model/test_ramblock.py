"""RAM blocks, and announced against local ones."""

from __future__ import annotations

import pytest

from migrated.errors import RemoteProtocolError
from migrated.model.ramblock import RamBlock, check_block_list, page_size_summary

LOCAL = [RamBlock("heap", 1 << 20), RamBlock("rom", 8192)]


def test_pages() -> None:
    assert RamBlock("heap", 1 << 20).pages == 256
    assert RamBlock("huge", 4 << 20, 2 << 20).pages == 2
    assert RamBlock("x" * 255, 1 << 46).pages == 1 << 34


@pytest.mark.parametrize("name", ["", "x" * 256, "ä" * 128])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        RamBlock(name, 4096)


@pytest.mark.parametrize("size", [0, -4096, 100, 4097, (1 << 46) + 4096])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="no multiple of 4096 up to 64 TiB"):
        RamBlock("heap", size)


@pytest.mark.parametrize("page_size", [0, 512, 4097, 12288])
def test_bad_page_sizes(page_size: int) -> None:
    with pytest.raises(ValueError, match="no power of two from 4096 on"):
        RamBlock("heap", 12288, page_size)


def test_a_fitting_list() -> None:
    check_block_list([("rom", 8192), ("heap", 1 << 20)], LOCAL)
    # A block that only exists here is no error, it is just never filled.
    check_block_list([("rom", 8192)], LOCAL)
    check_block_list([], [])


def test_all_problems_are_named() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        check_block_list([("pc.ram", 4096), ("heap", 1 << 21), ("rom", 8192)], LOCAL)
    error = caught.value
    assert error.what == (
        'Unknown ramblock "pc.ram", cannot accept migration;'
        " Size mismatch: heap: 0x200000 != 0x100000: Invalid argument"
    )
    assert error.section == "ram"
    assert error.expected == "blocks heap (0x100000), rom (0x2000)"


PAGE_SIZES = [RamBlock("heap", 4 << 20, 2 << 20), RamBlock("rom", 8192)]


def test_page_sizes_are_compared_where_they_are_said() -> None:
    check_block_list([("heap", 4 << 20)], PAGE_SIZES)
    check_block_list([("heap", 4 << 20), ("rom", 8192)], PAGE_SIZES, {"heap": 2 << 20})
    with pytest.raises(RemoteProtocolError, match=r"Mismatched RAM page size heap \(local\) 2097152 != 4096"):
        check_block_list([("heap", 4 << 20)], PAGE_SIZES, {})
    with pytest.raises(RemoteProtocolError, match=r"Mismatched RAM page size rom \(local\) 4096 != 2097152"):
        check_block_list([("rom", 8192)], PAGE_SIZES, {"rom": 2 << 20})


def test_a_summary_has_every_page_size() -> None:
    assert page_size_summary([]) == 0
    assert page_size_summary(block.page_size for block in PAGE_SIZES) == 0x201000


def test_nothing_declared_here() -> None:
    with pytest.raises(RemoteProtocolError, match="expected blocks none"):
        check_block_list([("heap", 4096)], [])

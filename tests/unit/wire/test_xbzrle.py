"""A page as a delta: QEMU's bytes, both ways, and whatever else may come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from migrated.errors import RemoteProtocolError
from migrated.wire.ram import PAGE
from migrated.wire.xbzrle import apply_delta, encode_delta

ZERO = np.zeros(PAGE, np.uint8)


def page(**changes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """A page of zeros with some bytes set: ``at5=0xBB``."""
    new = ZERO.copy()
    for name, value in changes.items():
        new[int(name.removeprefix("at"))] = value
    return new


@pytest.mark.parametrize(
    ("new", "delta"),
    [
        (page(), ""),
        (page(at5=0xBB), "05 01 bb"),
        (page(at0=0xBB), "00 01 bb"),
        (page(at0=1, at1=2, at2=3), "00 03 010203"),
        (page(at127=1), "7f 01 01"),
        (page(at128=1), "80 01 01 01"),
        (page(at300=1), "ac 02 01 01"),
        (page(at4095=1), "ff 1f 01 01"),
        # Three bytes between two changes cost less than two lengths do; two cost as much.
        (page(at5=1, at8=2), "05 04 01000002"),
        (page(at5=1, at9=2), "05 01 01 03 01 02"),
        (page(**{f"at{at}": 7 for at in range(10, 210)}), "0a c8 01" + " 07" * 200),
    ],
)
def test_the_bytes(new: np.ndarray[tuple[int], np.dtype[np.uint8]], delta: str) -> None:
    assert encode_delta(ZERO, new) == bytes.fromhex(delta)
    found = ZERO.copy()
    apply_delta(memoryview(bytes.fromhex(delta)), found)
    assert np.array_equal(found, new)


def test_what_is_no_shorter_than_a_page_is_no_delta() -> None:
    assert encode_delta(ZERO, np.full(PAGE, 1, np.uint8)) is None
    almost = np.full(PAGE, 1, np.uint8)
    almost[:3] = almost[-3:] = 0  # 4090 bytes and three of lengths
    found = encode_delta(ZERO, almost)
    assert found is not None
    assert len(found) == PAGE - 6 + 3
    almost[:3] = 1  # one run, with which the lengths make a page
    almost[-3:] = [1, 1, 0]
    assert encode_delta(ZERO, almost) is None


@given(
    arrays.arrays(np.uint8, PAGE, elements=st.integers(0, 3), fill=st.just(0)),
    st.lists(st.tuples(st.integers(0, PAGE - 1), st.integers(1, 300), st.integers(0, 255)), max_size=40),
)
def test_there_and_back(old: np.ndarray[tuple[int], np.dtype[np.uint8]], changes: list[tuple[int, int, int]]) -> None:
    new = old.copy()
    for at, length, value in changes:
        new[at : at + length] = value
    delta = encode_delta(old, new)
    if delta is not None:
        assert len(delta) < PAGE
        found = old.copy()
        apply_delta(memoryview(delta), found)
        assert np.array_equal(found, new)


@pytest.mark.parametrize(
    ("delta", "found"),
    [
        ("05", "an end before a length"),
        ("05 80", "a length of more than two bytes"),
        ("05 80 80", "a length of more than two bytes"),
        ("05 00", "an empty run"),
        ("05 01 aa 00 01 aa", "an empty run"),
        ("05 02 aa", "an end within a run"),
        ("ff 1f 02 aa aa", "a run up to byte 4097 of the page"),
        ("ff 7f 01 aa", "a run up to byte 16384 of the page"),
    ],
)
def test_what_is_no_delta(delta: str, found: str) -> None:
    with pytest.raises(RemoteProtocolError, match="Failed to load XBZRLE page - decode error!") as caught:
        apply_delta(memoryview(bytes.fromhex(delta)), ZERO.copy())
    assert caught.value.found == found


@given(st.binary(max_size=PAGE))
def test_any_bytes_are_applied_or_refused(delta: bytes) -> None:
    page = ZERO.copy()
    try:
        apply_delta(memoryview(delta), page)
    except RemoteProtocolError:
        return
    # What was taken can be said again, in no more bytes.
    again = encode_delta(ZERO, page)
    assert again is None or len(again) <= len(delta)

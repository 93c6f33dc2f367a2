"""The driver of pull parsers: exactly what was asked for, however the bytes arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import RemoteProtocolError
from migrated.wire.pull import Parser, feed
from tests.unit.wire.cuts import CUTS, cut


def take(*counts: int) -> Parser[list[bytes]]:
    pieces = []
    for count in counts:
        pieces.append((yield count))  # noqa: PERF401 (a comprehension cannot yield)
    return pieces


@given(st.lists(st.integers(1, 9), max_size=6), CUTS)
def test_gives_exactly_what_is_asked_for(counts: list[int], cuts: list[float]) -> None:
    data = bytes(range(sum(counts)))
    pieces = feed(take(*counts), cut(data, cuts))
    assert [len(piece) for piece in pieces] == counts
    assert b"".join(pieces) == data


def test_leaves_alone_what_is_not_asked_for() -> None:
    chunks = iter([b"ab", b"cd", b"ef"])
    assert feed(take(1), chunks) == [b"a"]
    assert list(chunks) == [b"cd", b"ef"]


def test_asks_for_nothing_when_nothing_is_needed() -> None:
    assert feed(take(), []) == []


def test_says_where_the_bytes_ended() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        feed(take(2, 4), [b"abc"])
    error = caught.value
    assert (error.what, error.offset, error.expected, error.found) == ("truncated", 2, "4 bytes", "1 bytes")


@given(st.binary(max_size=6), st.integers(1, 9), CUTS)
def test_shows_what_comes_and_leaves_it(data: bytes, count: int, cuts: list[float]) -> None:
    assert feed(take(-count), cut(data, cuts)) == [data[:count]]
    whole = data + b"more"
    assert feed(take(-count, len(whole)), cut(whole, cuts)) == [whole[:count], whole]

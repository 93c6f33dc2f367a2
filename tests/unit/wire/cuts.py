"""Ways to cut bytes and to watch a pull parser work: shared by the tests of all codecs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import pytest
from hypothesis import strategies as st

from migrated.errors import RemoteProtocolError
from migrated.wire.pull import Parser, feed

T = TypeVar("T")

#: Where to cut, as shares of the length.
CUTS = st.lists(st.floats(0, 1), max_size=8)


def cut(data: bytes, cuts: list[float]) -> list[bytes]:
    """Cut data at the given shares of its length; empty pieces are possible."""
    at = [0, *sorted(round(share * len(data)) for share in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(at)]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def parse(make: Callable[[], Parser[T]], data: bytes) -> T:
    """Parse data fed whole and byte by byte, and require the same result."""
    result = feed(make(), [data])
    assert feed(make(), single_bytes(data)) == result
    return result


def refusal(make: Callable[[], Parser[object]], data: bytes) -> str:
    """Return what is said against data, which must be the same however it arrives."""
    with pytest.raises(RemoteProtocolError) as whole:
        feed(make(), [data])
    with pytest.raises(RemoteProtocolError) as pieces:
        feed(make(), single_bytes(data))
    assert str(whole.value) == str(pieces.value)
    return whole.value.what


def assert_truncation_is_noticed(make: Callable[[], Parser[object]], data: bytes) -> None:
    """Require that every true prefix of data is called truncated, never accepted."""
    for length in range(len(data)):
        with pytest.raises(RemoteProtocolError, match="truncated"):
            feed(make(), [data[:length]])


def largest_piece(parser: Parser[object], data: bytes) -> int:
    """Feed any bytes, tolerate refusal and truncation, and return the most that was asked for in one piece."""
    largest = need = 0
    at = 0
    try:
        need = next(parser)
        while True:
            assert need
            largest = max(largest, abs(need))
            if at + need > len(data):
                return largest
            piece = data[at : at + abs(need)]
            at += max(need, 0)
            need = parser.send(piece)
    except (StopIteration, RemoteProtocolError):
        return largest

"""Numbers and counted strings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError
from migrated.wire import primitives
from migrated.wire.pull import Parser
from tests.unit.wire.cuts import assert_truncation_is_noticed, parse, refusal

NUMBERS: list[tuple[int, Callable[[int], bytes], Callable[[], Parser[int]]]] = [
    (8, primitives.encode_be8, primitives.parse_be8),
    (16, primitives.encode_be16, primitives.parse_be16),
    (32, primitives.encode_be32, primitives.parse_be32),
    (64, primitives.encode_be64, primitives.parse_be64),
]


@pytest.mark.parametrize(("bits", "encode", "parser"), NUMBERS)
def test_numbers(bits: int, encode: Callable[[int], bytes], parser: Callable[[], Parser[int]]) -> None:
    for value in (0, 1, 0x12, (1 << bits) - 2, (1 << bits) - 1):
        raw = encode(value)
        assert raw == value.to_bytes(bits // 8, "big")
        assert parse(parser, raw) == value
    for value in (-1, 1 << bits):
        with pytest.raises(LocalProtocolError, match=f"{bits} unsigned bits"):
            encode(value)


@given(st.text().filter(lambda text: len(text.encode()) <= 255))
def test_counted_string_comes_back(text: str) -> None:
    raw = primitives.encode_counted_string(text)
    assert raw[0] == len(raw) - 1
    assert parse(primitives.parse_counted_string, raw) == text
    assert_truncation_is_noticed(primitives.parse_counted_string, raw)


def test_counted_string_bytes() -> None:
    assert primitives.encode_counted_string("ram") == b"\x03ram"
    assert primitives.encode_counted_string("x" * 255)[:2] == b"\xffx"
    with pytest.raises(LocalProtocolError, match="at most 255 bytes, not 256"):
        primitives.encode_counted_string("ä" * 128)


def test_counted_string_that_is_not_utf8() -> None:
    assert refusal(primitives.parse_counted_string, b"\x02\xff\xfe") == "a counted string is not UTF-8"

"""Kinds of values that have no parts: numbers, flags, buffers, bitmaps, texts.

The rule of the file: one class for each way to look on the wire; the names are QEMU's (``info`` names). A value that
does not fit is our bug when it is saved, theirs when it is loaded. Standard library only: the client imports this.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from migrated.errors import LocalProtocolError
from migrated.wire.primitives import COUNTED_STRING_MAX_BYTES, decode_name, encode_counted_string
from migrated.wire.pull import Parser
from migrated.wire.vmstate_rows import Count, Described, Kind, Loading

#: QEMU's word of a bitmap on the wire.
_BITMAP_WORD_BITS = 64
#: A timer that is not armed: all ones.
_NOT_ARMED = -1


class Scalar(Kind):
    """A number of fixed width, big-endian; ``code`` is that of `struct`."""

    def __init__(self, type_name: str, code: str) -> None:
        self.type_name = type_name
        self._code = code
        self._struct = struct.Struct(f">{code}")
        self._described = {"type": type_name, "size": self._struct.size}

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return a number's bytes."""
        return self._packed(self._struct, value), self._described

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[Any]:
        """Take a number."""
        return self._struct.unpack((yield from loading.take(self._struct.size)))[0]

    def save_all(self, values: Sequence[Any], owner: Any) -> tuple[bytes, list[Described]]:
        """Pack a whole array at once."""
        packer = struct.Struct(f">{len(values)}{self._code}")
        return self._packed(packer, *values), [self._described] * len(values)

    def load_all(self, currents: Sequence[Any], owner: Any, loading: Loading) -> Parser[list[Any]]:
        """Unpack a whole array at once."""
        packer = struct.Struct(f">{len(currents)}{self._code}")
        return list(packer.unpack((yield from loading.take(packer.size))))

    def _packed(self, packer: struct.Struct, *values: Any) -> bytes:
        try:
            return packer.pack(*values)
        except (struct.error, OverflowError) as error:
            raise LocalProtocolError(f"no {self.type_name}: {error}") from error


class Boolean(Kind):
    """One byte, 0 or 1."""

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return a flag's byte."""
        return bytes([bool(value)]), {"type": "bool", "size": 1}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[bool]:
        """Take a flag."""
        byte = yield from loading.take_number(1)
        if byte > 1:
            raise loading.refusal("no bool", expected="0 or 1", found=str(byte))
        return bool(byte)


class Timer(Scalar):
    """When it expires, in ns of its clock; None: it is not armed."""

    def __init__(self) -> None:
        super().__init__("timer", "q")

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return an expiry's bytes."""
        return super().save(_NOT_ARMED if value is None else value, owner)

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[int | None]:
        """Take an expiry."""
        expiry: int = yield from super().load(current, owner, loading)
        return None if expiry == _NOT_ARMED else expiry

    save_all = Kind.save_all
    load_all = Kind.load_all


class Checked(Scalar):
    """A number that both ends must agree on: ``fits(from the stream, ours)``. What is ours stays."""

    def __init__(self, type_name: str, code: str, fits: Callable[[int, int], bool], sign: str) -> None:
        super().__init__(type_name, code)
        self._fits = fits
        self._sign = sign

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[Any]:
        """Take a number and hold it against ours."""
        value: int = yield from super().load(current, owner, loading)
        if current is None:
            raise LocalProtocolError(f"there is nothing to hold the {self.type_name} of the stream against")
        if not self._fits(value, current):
            raise loading.refusal(f"{value:x} != {current:x}", expected=f"{self._sign}{current}", found=str(value))
        return value

    load_all = Kind.load_all


class Buffer(Kind):
    """Bytes of a fixed size, or of one that an earlier row gave. A bytearray is filled in place."""

    def __init__(self, count: Count) -> None:
        self._count = count

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the bytes as they are."""
        state, size = bytes(value), self._count.of(owner)
        if len(state) != size:
            raise LocalProtocolError(f"expected {size} bytes, found {len(state)}")
        return state, {"type": "buffer", "size": size}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[bytes | bytearray]:
        """Take the bytes."""
        state = yield from loading.take(_size(self._count, owner, loading))
        if isinstance(current, bytearray):
            current[:] = state
            return current
        return state


def _size(count: Count, owner: Any, loading: Loading) -> int:
    """Return a size that the stream may have given. Bytes are no elements: their number is bounded by what arrives."""
    size = count.of(owner) if isinstance(count.value, int) else getattr(owner, count.value) * count.multiply
    if not 0 <= size <= count.limit:
        raise loading.refusal("a size out of range", expected=f"0 to {count.limit}", found=str(size))
    return size


class Unused(Kind):
    """Zeros in the place of what was there once; whatever arrives there is ignored."""

    def __init__(self, size: int) -> None:
        self._size = size

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the zeros."""
        return bytes(self._size), {"type": "unused_buffer", "size": self._size}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[None]:
        """Take so many bytes."""
        yield from loading.take(self._size)


class Bitmap(Kind):
    """So many bits, in whole words of 64, the lowest bit first; here they are an int."""

    def __init__(self, bits: Count) -> None:
        self._bits = bits

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the words."""
        bits = self._bits.of(owner)
        if not 0 <= value < 1 << bits:
            raise LocalProtocolError(f"no bitmap of {bits} bits: {value:#x}")
        words = -(-bits // _BITMAP_WORD_BITS)
        state = b"".join(
            (value >> at * _BITMAP_WORD_BITS & (1 << _BITMAP_WORD_BITS) - 1).to_bytes(8, "big") for at in range(words)
        )
        return state, {"type": "bitmap", "size": len(state)}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[int]:
        """Take the words; bits beyond the last one must not be set."""
        bits = _size(self._bits, owner, loading)
        state = yield from loading.take(-(-bits // _BITMAP_WORD_BITS) * 8)
        # The words lie lowest first, each of them big-endian: turned round, all of it is one little-endian number.
        words = (state[at : at + 8][::-1] for at in range(0, len(state), 8))
        value = int.from_bytes(b"".join(words), "little")
        if value >> bits:
            raise loading.refusal("bits beyond the end of a bitmap", expected=f"{bits} bits", found=f"{value:#x}"[:40])
        return value


class Capability(Kind):
    """A text behind one byte that says how long it is."""

    #: Two texts differ in length.
    varies = True

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return length and text."""
        state = encode_counted_string(value)
        return state, {"type": "capability", "size": len(state)}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[str]:
        """Take a text that can be printed."""
        length = yield from loading.take_number(1)
        assert length <= COUNTED_STRING_MAX_BYTES
        return decode_name((yield from loading.take(length)), "a text")

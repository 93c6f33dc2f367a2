"""Big-endian numbers and counted strings: what every other format of this stream is made of.

The rule of the file: a value that does not fit is our bug when we encode it (LocalProtocolError) and theirs when we
parse it (RemoteProtocolError). Source: QEMU's qemu_put_be*, qemu_put_counted_string.
"""

from __future__ import annotations

import struct

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.pull import Parser

#: A counted string has one length byte.
COUNTED_STRING_MAX_BYTES = 0xFF


def _pack(code: str, bits: int, value: int) -> bytes:
    try:
        return struct.pack(code, value)
    except struct.error as error:
        raise LocalProtocolError(f"{value} does not fit into {bits} unsigned bits") from error


def encode_be8(value: int) -> bytes:
    return _pack(">B", 8, value)


def encode_be16(value: int) -> bytes:
    return _pack(">H", 16, value)


def encode_be32(value: int) -> bytes:
    return _pack(">I", 32, value)


def encode_be64(value: int) -> bytes:
    return _pack(">Q", 64, value)


def parse_be8() -> Parser[int]:
    return int.from_bytes((yield 1), "big")


def parse_be16() -> Parser[int]:
    return int.from_bytes((yield 2), "big")


def parse_be32() -> Parser[int]:
    return int.from_bytes((yield 4), "big")


def parse_be64() -> Parser[int]:
    return int.from_bytes((yield 8), "big")


def encode_counted_string(text: str) -> bytes:
    """Encode as one length byte and that many UTF-8 bytes."""
    raw = text.encode()
    if len(raw) > COUNTED_STRING_MAX_BYTES:
        raise LocalProtocolError(f"a counted string has at most {COUNTED_STRING_MAX_BYTES} bytes, not {len(raw)}")
    return bytes([len(raw)]) + raw


def decode_name(raw: bytes, what: str) -> str:
    """Decode a name that came in; names are UTF-8 here (QEMU's are ASCII), without control characters.

    A name ends up in logs, on terminals and in QMP answers, some readers of which stumble over a NUL.
    """
    name = _decode(raw, what)
    if not name.isprintable():
        raise RemoteProtocolError(f"{what} has characters that cannot be printed", found=repr(raw))
    return name


def _decode(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError(f"{what} is not UTF-8", found=repr(raw)) from error


def printable(raw: bytes) -> str:
    """Decode a text that is only shown; "?" stands for each character that could do harm where it is shown."""
    text = raw.decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text)


def parse_counted_string() -> Parser[str]:
    length = yield from parse_be8()
    return _decode((yield length), "a counted string") if length else ""


def parse_name() -> Parser[str]:
    """Read a counted string that names something (`decode_name`)."""
    length = yield from parse_be8()
    return decode_name((yield length), "a name") if length else ""

"""Pull parsers: generators that ask for exactly the bytes they need.

The rule of the file: a parser never sees more than it asked for, so the bytes behind it belong to whoever comes next.
``data = yield n`` means "give me exactly n bytes" with n > 0; the generator's return value is the result. Parsers raise
RemoteProtocolError and never wait: `stream` drives them from a channel, `feed` from bytes in memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar, cast

from migrated.errors import RemoteProtocolError

T = TypeVar("T")

#: A generator that yields byte counts, is sent exactly that many bytes each time, and returns a T.
Parser = Generator[int, bytes, T]


def feed(parser: Parser[T], chunks: Iterable[bytes]) -> T:
    """Run ``parser`` over bytes that were cut anywhere; what it does not ask for is left alone.

    Raises RemoteProtocolError("truncated") when the chunks end before the parser does.
    """
    rest = iter(chunks)
    buffer = bytearray()
    consumed = 0
    try:
        need = next(parser)
        while True:
            while len(buffer) < need:
                chunk = next(rest, None)
                if chunk is None:
                    raise RemoteProtocolError(
                        "truncated", offset=consumed, expected=f"{need} bytes", found=f"{len(buffer)} bytes"
                    )
                buffer += chunk
            data = bytes(buffer[:need])
            del buffer[:need]
            consumed += need
            need = parser.send(data)
    except StopIteration as done:
        return cast("T", done.value)

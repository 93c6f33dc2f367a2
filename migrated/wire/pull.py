"""Pull parsers: generators that ask for exactly the bytes they need.

The rule of the file: a parser takes no more than it asked for, so the bytes behind it belong to whoever comes next.
``data = yield n`` means "give me exactly n bytes" with n > 0; ``yield -n`` means "show me the next n bytes and leave
them", of which there may be fewer at the end of bytes in memory. The generator's return value is the result. Parsers
raise RemoteProtocolError and never wait: `stream` drives them from a channel, `feed` from bytes in memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar, cast

from migrated.errors import RemoteProtocolError

T = TypeVar("T")

#: A generator that yields byte counts (negative: only to look at), is sent that many bytes each time, and returns a T.
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
            count = abs(need)
            while len(buffer) < count:
                chunk = next(rest, None)
                if chunk is not None:
                    buffer += chunk
                elif need < 0:
                    break
                else:
                    raise RemoteProtocolError(
                        "truncated", offset=consumed, expected=f"{need} bytes", found=f"{len(buffer)} bytes"
                    )
            data = bytes(buffer[:count])
            if need > 0:
                del buffer[:need]
                consumed += need
            need = parser.send(data)
    except StopIteration as done:
        return cast("T", done.value)

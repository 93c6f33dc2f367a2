"""A file is read by a thread while what came before is used; whoever reads the stream does not notice."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from migrated.errors import RemoteProtocolError
from migrated.stream.incoming import FRONT_BYTES, PIECE_MAX_BYTES, IncomingStream
from migrated.transport.file import READ_AHEAD_BYTES, FileChannel, open_file

CONTENT = random.Random(2).randbytes(3 * READ_AHEAD_BYTES + 4321)


async def opened(path: Path) -> tuple[FileChannel, IncomingStream]:
    path.write_bytes(CONTENT)
    channel = await open_file(str(path), 0, writes=False)
    return channel, IncomingStream(channel, silence_timeout_s=lambda: 5.0)


@pytest.mark.parametrize("size", [1, 4097, PIECE_MAX_BYTES - 1, PIECE_MAX_BYTES])
async def test_pieces_of_any_size_come_whole_and_in_order(tmp_path: Path, size: int) -> None:
    channel, stream = await opened(tmp_path / "stream")
    await stream.wait_for_element()
    content = CONTENT if size > 1 else CONTENT[: 2 * PIECE_MAX_BYTES]
    found = bytearray()
    while len(found) < len(content):
        piece = min(size, len(content) - len(found))
        assert await stream.look_at(piece) == content[len(found) : len(found) + piece]
        found += await stream.read_exactly(piece)
        assert stream.offset == len(found)
    assert found == content
    if size > 1:
        with pytest.raises(RemoteProtocolError, match="ends too early"):
            await stream.get_be8()
        with pytest.raises(RemoteProtocolError, match="ends too early"):
            await stream.wait_for_element()
    stream.close()
    await channel.close()


async def test_records_are_parsed_where_they_lie(tmp_path: Path) -> None:
    """As the bulk path does: all whole records are consumed, the rest moves in front of what comes."""
    channel, stream = await opened(tmp_path / "stream")
    found, record = bytearray(), 4104
    while len(found) + record <= len(CONTENT):
        await stream.fill()
        whole = len(stream.peek()) // record * record
        assert len(stream.peek()) - whole < FRONT_BYTES
        found += stream.peek()[:whole]
        stream.consume(whole)
    assert CONTENT.startswith(found)
    stream.close()
    await channel.close()


async def test_a_stream_that_is_left_in_the_middle_leaves_nothing_open(tmp_path: Path) -> None:
    channel, stream = await opened(tmp_path / "stream")
    await stream.get_be8()
    stream.close()
    await channel.close()
    while any(os.path.samefile(fd, tmp_path / "stream") for fd in Path("/proc/self/fd").iterdir() if fd.exists()):
        await asyncio.sleep(0)  # until the thread is through


async def test_only_a_regular_file_is_read_ahead() -> None:
    channel = await open_file("/dev/zero", 0, writes=False)
    assert not channel.piece_bytes
    stream = IncomingStream(channel, silence_timeout_s=lambda: 5.0)
    assert await stream.read_exactly(3) == bytes(3)
    await channel.close()

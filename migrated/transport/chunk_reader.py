"""The stream of a snapshot on its way back, under the eyes of its manifest.

The rule of the file: no byte is given away before the chunk it is in was found right. Reading and comparing are one
hop into a thread, with many bytes to a hop: a thread that begins or ends takes the GIL for longer than it needs it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from migrated.errors import ChannelClosed, RemoteProtocolError
from migrated.transport.channel import Buffer
from migrated.transport.thread import in_thread, to_the_end
from migrated.wire.manifest import CHUNK_MAX_BYTES, Chunk, Manifest, check_chunk, check_length, section_at

#: What is read ahead at a time.
READ_BYTES = 2 * CHUNK_MAX_BYTES
#: Two threads that read and hash are as fast as memory here; more only wait for each other.
LANES = 2
#: How much such a thread compares before it reports: some ten milliseconds.
STRETCH_CHUNKS = 16


class ChunkReader:
    """A Channel out of a file: every chunk is compared with the manifest before it is given away.

    Made by `open_chunk_file`. The comparison happens in the thread that reads ahead.
    """

    has_return_path = False
    bytes_sent = 0
    piece_bytes = READ_BYTES

    def __init__(self, fd: int, path: Path, manifest: Manifest) -> None:
        self.peer = f"file:{path}"
        self.bytes_received = 0
        self.silence_timeout_s = 0.0
        """Not used: a disk may be slow, but it does not go silent."""
        self._fd = fd
        self._manifest = manifest
        self._next = 0
        """The chunk that is read next."""
        self._ahead: asyncio.Future[int] | None = None

    def begin_receive(self, view: memoryview) -> None:
        first, room = self._next, len(view)
        while self._next < len(self._manifest.chunks):
            if (room := room - self._manifest.chunks[self._next].length) < 0:
                break
            self._next += 1
        chunks = self._manifest.chunks[first : self._next]
        self._ahead = asyncio.get_running_loop().run_in_executor(None, _read, self._fd, self._manifest, chunks, view)

    async def end_receive(self) -> int:
        assert self._ahead is not None
        count = await to_the_end(self._ahead)
        self._ahead = None
        self.bytes_received += count
        return count

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        """Receive whole chunks: there has to be room for `piece_bytes`."""
        self.begin_receive(view)
        return await self.end_receive()

    async def send(self, data: Buffer) -> None:
        raise ChannelClosed("nothing goes into a file that is read", peer=self.peer)

    def shutdown_write(self) -> None:
        """Do nothing: a file is not told."""

    async def close(self) -> None:
        """Let go of the file, once no thread uses it. Twice does no harm, and it does not raise."""
        if self._ahead is not None:
            await asyncio.gather(self._ahead, return_exceptions=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        """Do nothing: whoever opened this file closes it."""


async def open_chunk_file(path: Path, manifest: Manifest) -> ChunkReader:
    """Open a file to read it from the beginning. Raises RemoteProtocolError, also for one of another length."""
    return ChunkReader(await in_thread(_open, path, manifest), path, manifest)


def _open(path: Path, manifest: Manifest) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RemoteProtocolError(f"the stream cannot be read: {error.strerror or error}", found=str(path)) from error
    try:
        check_length(manifest, os.fstat(fd).st_size)
    except RemoteProtocolError:
        os.close(fd)
        raise
    return fd


async def verify_chunks(path: Path, manifest: Manifest, on_read: Callable[[int], None] = lambda count: None) -> None:
    """Read a stream and compare it with its manifest. Raises RemoteProtocolError, which names section and offset.

    ``on_read`` is told how many bytes were found right.
    """
    fd = await in_thread(_open, path, manifest)
    try:
        lanes = (_verify_lane(fd, manifest, number, on_read) for number in range(LANES))
        results = await asyncio.gather(*lanes, return_exceptions=True)
    finally:
        os.close(fd)
    wrong = [result for result in results if isinstance(result, BaseException)]
    if wrong:
        raise min(wrong, key=_place)


def _place(error: BaseException) -> int:
    return (error.offset or 0) if isinstance(error, RemoteProtocolError) else -1


async def _verify_lane(fd: int, manifest: Manifest, number: int, on_read: Callable[[int], None]) -> None:
    """Compare every LANES-th stretch of chunks, up to the first chunk that is wrong."""
    buffer = memoryview(bytearray(CHUNK_MAX_BYTES))
    for start in range(number * STRETCH_CHUNKS, len(manifest.chunks), LANES * STRETCH_CHUNKS):
        on_read(await in_thread(_verify_stretch, fd, manifest, start, buffer))


def _verify_stretch(fd: int, manifest: Manifest, start: int, buffer: memoryview) -> int:
    chunks = manifest.chunks[start : start + STRETCH_CHUNKS]
    return sum(_read(fd, manifest, [chunk], buffer) for chunk in chunks)


def _read(fd: int, manifest: Manifest, chunks: Sequence[Chunk], view: memoryview) -> int:
    """Read chunks that follow each other, and compare them; return how many bytes they have."""
    rest = view
    for chunk in chunks:
        target, rest = rest[: chunk.length], rest[chunk.length :]
        try:
            count = os.preadv(fd, [target], chunk.offset)
        except OSError as error:
            raise RemoteProtocolError(
                f"the stream cannot be read: {error.strerror or error}",
                section=section_at(manifest, chunk.offset), offset=chunk.offset,
            ) from error  # fmt: skip
        if count < chunk.length:  # a regular file is read whole, up to its end
            check_length(manifest, chunk.offset + count)
        check_chunk(manifest, chunk, xxh3_128_hexdigest(target))
    return len(view) - len(rest)

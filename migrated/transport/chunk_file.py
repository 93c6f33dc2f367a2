"""The stream of a snapshot on its way to the disk, and back under the eyes of its manifest.

The rule of the file: bytes are hashed between the buffer they were collected in and the disk, in the same pass, and
never on the event loop. Threads work on some buffers while the next one fills; the disk is set to work all the time,
so that the fsync at the end finds little left to do.

The stream goes through aiofiles' threads, a comparison through its own, with many chunks to a hop. A thread cannot be
cancelled, so a descriptor is closed, and a buffer let go, only when the last operation on it has returned.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import aiofiles
import numpy as np
from aiofiles.threadpool.binary import AsyncFileIO
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from migrated.errors import ChannelClosed, RemoteProtocolError
from migrated.transport.channel import Buffer
from migrated.transport.file import FILE_MODE
from migrated.transport.thread import in_thread, to_the_end
from migrated.wire.manifest import CHUNK_MAX_BYTES, Chunk, Manifest, check_chunk, check_length, section_at

T = TypeVar("T")

#: Dirty bytes after which the disk is set to work. From 64 to 256 MiB made no difference, without it a fifth was lost.
SYNC_BYTES = 128 << 20
#: Buffers of a writer: with two, each waits for the other's bad moments, and an eighth is lost.
BUFFERS = 5
#: What is given at a time: a little less than a stream's buffer, so that it fits behind what is left of a record.
PIECE_BYTES = 960 << 10
#: What is read ahead, with one hop into a thread.
READ_BYTES = 4 * PIECE_BYTES
#: Two threads that read and hash are as fast as memory here; more only wait for each other.
LANES = 2
#: How much such a thread reads before it reports: some ten milliseconds.
STRETCH_CHUNKS = 16


class ChunkWriter:
    """A Channel into a new file, which remembers what it wrote as chunks. Made by `create_chunk_file`."""

    has_return_path = False
    bytes_received = 0

    def __init__(self, file: AsyncFileIO, path: Path) -> None:
        self.peer = f"file:{path}"
        self.chunks: list[Chunk] = []
        """What is on its way to the disk, in order; complete once `finish` has returned."""
        self.bytes_sent = 0
        self.silence_timeout_s = 0.0
        """Not used: a disk may be slow, but it does not go silent."""
        self._file = file
        self._fd = file.fileno()
        self._free = [np.empty(CHUNK_MAX_BYTES, np.uint8) for _ in range(BUFFERS)]
        """The last one is being filled."""
        self._filled = 0
        self._cut = False
        self._writing: deque[asyncio.Future[None]] = deque()
        self._syncing: asyncio.Future[None] | None = None
        self._unsynced = 0

    def cut(self) -> None:
        """Begin a new chunk with the next byte: another section begins there."""
        self._cut = True

    async def send(self, data: Buffer) -> None:
        """Take bytes. Raises ChannelClosed when the disk does not take them."""
        if not len(data):
            return  # a device without state
        rest = np.frombuffer(data, np.uint8)
        if self._cut and self._filled:
            await self._hand_over()
        self._cut = False
        while len(rest):
            count = min(len(rest), CHUNK_MAX_BYTES - self._filled)
            np.copyto(self._free[-1][self._filled : self._filled + count], rest[:count])
            self._filled += count
            self.bytes_sent += count
            rest = rest[count:]
            if self._filled == CHUNK_MAX_BYTES:
                await self._hand_over()

    async def finish(self) -> None:
        """Write what is left; the bytes would survive a crash when this returns (their name, if its owner sees to it).

        Raises ChannelClosed.
        """
        if self._filled:
            await self._hand_over()
        while self._writing:
            await self._settle()
        await self._synced()
        await self._to_disk(self._file.truncate(self.bytes_sent))
        await self._to_disk(asyncio.to_thread(os.fsync, self._fd))

    async def _hand_over(self) -> None:
        """Let threads hash and write the buffer; wait until there is another one to fill."""
        buffer, length = self._free.pop(), self._filled
        before = self._writing[-1] if self._writing else None
        self._writing.append(asyncio.ensure_future(self._store(buffer, length, self.bytes_sent - length, before)))
        self._filled = 0
        while not self._free:
            await self._settle()

    async def _settle(self) -> None:
        await to_the_end(self._writing.popleft())

    async def _store(
        self, buffer: NDArray[np.uint8], length: int, offset: int, before: asyncio.Future[None] | None
    ) -> None:
        full = buffer[:length]
        hashing = asyncio.ensure_future(asyncio.to_thread(xxh3_128_hexdigest, full.data))
        try:
            if before is not None:
                await before  # its error is this one's, too: nothing goes behind a gap
            await self._to_disk(self._write(full))
        finally:
            digest = await hashing
        self.chunks.append(Chunk(offset, length, digest))
        self._free.insert(0, buffer)
        self._unsynced += length
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            await self._synced()
            self._unsynced = 0
            self._syncing = asyncio.ensure_future(asyncio.to_thread(os.fdatasync, self._fd))

    async def _synced(self) -> None:
        """Wait for the fdatasync under way; a descriptor is told of a lost write only once, so it has to be asked."""
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            await self._to_disk(to_the_end(syncing))

    async def _write(self, full: NDArray[np.uint8]) -> None:
        rest = full.data
        while rest:
            rest = rest[await self._file.write(rest) :]

    async def _to_disk(self, operation: Coroutine[Any, Any, T]) -> T:
        try:
            return await operation
        except OSError as error:
            raise ChannelClosed(f"Unable to write to file: {error.strerror or error}", peer=self.peer) from error

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        raise ChannelClosed("nothing comes back from a file that is written", peer=self.peer)

    def shutdown_write(self) -> None:
        """Do nothing: a file is not told."""

    async def close(self) -> None:
        """Let go of the file, once no thread uses it. Twice does no harm, and it does not raise."""
        await _finished(*self._writing, self._syncing)
        self._writing.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        """Do nothing: whoever made this file closes it."""


async def create_chunk_file(path: Path, expected_bytes: int) -> ChunkWriter:
    """Create a file with room for ``expected_bytes``. Raises ChannelClosed where there is none."""
    creating = asyncio.ensure_future(asyncio.to_thread(_create, path, expected_bytes))
    try:
        fd = await to_the_end(creating)
        # closefd=False: the descriptor is closed by the writer, and not by a hop into another thread.
        return ChunkWriter(await aiofiles.open(fd, "wb", buffering=0, closefd=False), path)
    except OSError as error:
        raise ChannelClosed(
            f"Could not create a file of {expected_bytes} bytes: {error.strerror or error}", peer=f"file:{path}"
        ) from error
    except asyncio.CancelledError:
        if not creating.exception():
            os.close(creating.result())
        raise


def _create(path: Path, expected_bytes: int) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        # Here, and not in the middle with the machine stopped, a full disk is found.
        os.posix_fallocate(fd, 0, max(expected_bytes, 1))
    except BaseException:
        os.close(fd)
        raise
    return fd


class ChunkReader:
    """A Channel out of a file: a thread reads ahead while what it read before is used. Made by `open_chunk_file`."""

    has_return_path = False
    bytes_sent = 0

    def __init__(self, file: AsyncFileIO, path: Path) -> None:
        self.peer = f"file:{path}"
        self.bytes_received = 0
        self.silence_timeout_s = 0.0
        """Not used: a disk may be slow, but it does not go silent."""
        self._file = file
        self._buffers = [memoryview(bytearray(READ_BYTES)) for _ in range(2)]
        self._left = memoryview(b"")
        self._ahead: asyncio.Future[int] | None = None

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        """Read at least one byte; 0 at the end. Raises ChannelClosed when the disk does not give it."""
        if not self._left:
            try:
                count = await to_the_end(self._ahead or self._read())
            except OSError as error:
                raise ChannelClosed(f"Unable to read from file: {error.strerror or error}", peer=self.peer) from error
            self._left = self._buffers[0][:count]
            self._buffers.reverse()
            self._ahead = asyncio.ensure_future(self._read())
        count = min(len(view), len(self._left), PIECE_BYTES)
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        self.bytes_received += count
        return count

    async def _read(self) -> int:
        return await self._file.readinto(self._buffers[0]) or 0

    async def send(self, data: Buffer) -> None:
        raise ChannelClosed("nothing goes into a file that is read", peer=self.peer)

    def shutdown_write(self) -> None:
        """Do nothing: a file is not told."""

    async def close(self) -> None:
        """Let go of the file, once no thread uses it. Twice does no harm, and it does not raise."""
        await _finished(self._ahead)
        self._ahead = None
        await self._file.close()

    def abort(self) -> None:
        """Do nothing: whoever opened this file closes it."""


async def open_chunk_file(path: Path) -> ChunkReader:
    """Open a file to read it from the beginning. Raises ChannelClosed."""
    try:
        return ChunkReader(await aiofiles.open(path, "rb", buffering=0), path)
    except OSError as error:
        raise ChannelClosed(f"Could not open '{path}': {error.strerror or error}") from error


async def _finished(*running: asyncio.Future[Any] | None) -> None:
    """Wait until these have ended; how, is of no interest any more."""
    for one in running:
        if one is not None:
            await asyncio.wait([one])
            _ = one.cancelled() or one.exception()  # seen


async def verify_chunks(path: Path, manifest: Manifest, on_read: Callable[[int], None] = lambda count: None) -> None:
    """Read a stream and compare it with its manifest. Raises RemoteProtocolError, which names section and offset.

    ``on_read`` is told how many bytes were found right.
    """
    try:
        fd = await in_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RemoteProtocolError(f"the stream cannot be read: {error.strerror or error}", found=str(path)) from error
    try:
        check_length(manifest, os.fstat(fd).st_size)
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
    for chunk in chunks:
        target = buffer[: chunk.length]
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
    return sum(chunk.length for chunk in chunks)

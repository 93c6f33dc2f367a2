"""The stream of a snapshot on its way to the disk, in chunks.

The rule of the file: bytes are hashed between the buffer they were collected in and the disk, never on the event loop.
Threads hash and write some buffers while the next one fills. What goes to the disk goes past the page cache where that
is possible: it costs a copy less, nothing waits for dirty pages, and the fsync at the end finds nothing left to do.

A thread cannot be cancelled, so a descriptor is closed, and a buffer let go, only when the last operation on it has
returned. Read back: `chunk_reader`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import aiofiles
import numpy as np
from aiofiles.threadpool.binary import AsyncFileIO
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from migrated.errors import ChannelClosed
from migrated.transport.channel import Buffer
from migrated.transport.file import FILE_MODE
from migrated.transport.thread import in_thread, to_the_end
from migrated.wire.manifest import CHUNK_MAX_BYTES, Chunk

#: What the blocks of all usual disks and file systems divide.
ALIGNMENT = 4096
#: Buffers of a writer, one of which is filled while the others are hashed and written.
LANES = 4
#: One write, two chunks: each thread that begins or ends takes the GIL for longer than it needs it.
WRITE_BYTES = 2 * CHUNK_MAX_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class _Lane:
    """A way to the disk: a buffer, and the file with a position of its own, so that several can be on it at once."""

    buffer: NDArray[np.uint8]
    file: AsyncFileIO


class ChunkWriter:
    """A Channel into a new file, which remembers what it wrote as chunks. Made by `create_chunk_file`."""

    has_return_path = False
    bytes_received = 0

    def __init__(self, files: Iterable[AsyncFileIO], path: Path) -> None:
        self.peer = f"file:{path}"
        self.chunks: list[Chunk] = []
        """What is on the disk, in order; complete once `finish` has returned."""
        self.bytes_sent = 0
        self.silence_timeout_s = 0.0
        """Not used: a disk may be slow, but it does not go silent."""
        self._free = [_Lane(_aligned(WRITE_BYTES), file) for file in files]
        """The last one is being filled."""
        self._filled = 0
        self._ends: list[int] = []
        """Where in that one chunks end: at cuts, and where it does itself."""
        self._writing: deque[tuple[_Lane, asyncio.Task[list[Chunk]]]] = deque()

    def cut(self) -> None:
        """Begin a new chunk with the next byte: another section begins there."""
        self._ends.append(self._filled)

    async def send(self, data: Buffer) -> None:
        """Take bytes. Raises ChannelClosed when the disk does not take them."""
        if not len(data):
            return  # a device without state
        rest = memoryview(data).cast("B")
        while rest:
            room = self.room()
            count = min(len(rest), len(room))
            # With the GIL, for a tenth of a millisecond: letting it go to threads at work costs several times as much.
            room[:count] = rest[:count]
            rest = rest[count:]
            await self.fill(count)

    def room(self) -> memoryview:
        """Return the rest of the buffer that is being filled."""
        return self._free[-1].buffer.data[self._filled :]

    async def fill(self, count: int) -> None:
        """Take ``count`` bytes that lie in `room`. Raises ChannelClosed when the disk does not take them."""
        self._filled += count
        self.bytes_sent += count
        if self._filled == WRITE_BYTES:
            await self._hand_over()

    async def finish(self) -> None:
        """Write what is left; the bytes would survive a crash when this returns (their name, if its owner sees to it).

        Raises ChannelClosed.
        """
        if self._filled:
            await self._hand_over()
        while self._writing:
            await self._settle()
        file = self._free[-1].file
        with self._errors():
            await to_the_end(file.truncate(self.bytes_sent))
            await in_thread(os.fsync, file.fileno())

    async def _hand_over(self) -> None:
        """Let threads hash and write the buffer; wait until there is another one to fill."""
        self.cut()
        lane, offset = self._free.pop(), self.bytes_sent - self._filled
        self._writing.append((lane, asyncio.ensure_future(_store(lane, self._ends, offset))))
        self._filled, self._ends = 0, []
        await asyncio.sleep(0)  # it begins now
        while not self._free:
            await self._settle()

    async def _settle(self) -> None:
        """Wait for the buffer that was handed over first."""
        lane, storing = self._writing.popleft()
        self._free.insert(0, lane)
        with self._errors():
            chunks = await to_the_end(storing)
        self.chunks += chunks

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ChannelClosed(f"Unable to write to file: {error.strerror or error}", peer=self.peer) from error

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        raise ChannelClosed("nothing comes back from a file that is written", peer=self.peer)

    def shutdown_write(self) -> None:
        """Do nothing: a file is not told."""

    async def close(self) -> None:
        """Let go of the file, once no thread uses it. Twice does no harm, and it does not raise."""
        await asyncio.gather(*(storing for _, storing in self._writing), return_exceptions=True)
        lanes = [*self._free, *(lane for lane, _ in self._writing)]
        self._writing.clear()
        self._free.clear()
        for lane in lanes:
            os.close(lane.file.fileno())

    def abort(self) -> None:
        """Do nothing: whoever made this file closes it."""


def _aligned(size: int) -> NDArray[np.uint8]:
    """Return memory that a disk can read from directly."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size]


async def _store(lane: _Lane, ends: list[int], offset: int) -> list[Chunk]:
    """Hash and write a buffer that belongs at ``offset``; return its chunks. Raises OSError."""
    hashing = asyncio.get_running_loop().run_in_executor(None, _hash_chunks, lane.buffer, ends, offset)
    try:
        await lane.file.seek(offset)
        # Only the last one is not full; what is too much of it is cut off in the end.
        rest = lane.buffer[: -(-ends[-1] // ALIGNMENT) * ALIGNMENT].data
        while rest:
            rest = rest[await lane.file.write(rest) :]
    finally:
        chunks = await hashing
    return chunks


def _hash_chunks(buffer: NDArray[np.uint8], ends: list[int], offset: int) -> list[Chunk]:
    """Return the chunks of a buffer: what lies between two ends."""
    return [
        Chunk(offset + at, length, xxh3_128_hexdigest(buffer[at : at + length].data))
        for start, end in pairwise([0, *ends])
        for at in range(start, end, CHUNK_MAX_BYTES)
        if (length := min(CHUNK_MAX_BYTES, end - at))
    ]


async def create_chunk_file(path: Path, expected_bytes: int) -> ChunkWriter:
    """Create a file with room for ``expected_bytes``. Raises ChannelClosed where there is none."""
    creating = asyncio.ensure_future(asyncio.to_thread(_create, path, expected_bytes))
    try:
        fds = await to_the_end(creating)
        # closefd=False: the descriptors are closed by the writer, and not by a hop into another thread.
        files = [await aiofiles.open(fd, "wb", buffering=0, closefd=False) for fd in fds]
        return ChunkWriter(files, path)
    except OSError as error:
        raise ChannelClosed(
            f"Could not create a file of {expected_bytes} bytes: {error.strerror or error}", peer=f"file:{path}"
        ) from error
    except asyncio.CancelledError:
        if not creating.exception():
            for fd in creating.result():
                os.close(fd)
        raise


def _create(path: Path, expected_bytes: int) -> list[int]:
    """Create a file; return a descriptor for each lane."""
    with ExitStack() as undo:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        undo.callback(os.close, fd)
        # Here, and not in the middle with the machine stopped, a full disk is found.
        os.posix_fallocate(fd, 0, max(expected_bytes, 1))
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if _writes_directly(path) else 0)
        fds = []
        for _ in range(LANES):
            fds.append(os.open(path, flags))
            undo.callback(os.close, fds[-1])
        undo.pop_all()
    os.close(fd)
    return fds


def _writes_directly(path: Path) -> bool:
    """Say whether the file system writes past the page cache, in blocks of ALIGNMENT bytes."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    try:
        os.pwrite(fd, _aligned(ALIGNMENT).data, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(fd)
    return True

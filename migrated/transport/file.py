"""A stream in a file: a migration into it, or back in from it.

The rule of the file: no byte is reported as sent before write(2) took it, and `close` returns only when the file and
its name would survive a crash. File I/O runs in aiofiles' threads; a thread cannot be cancelled, so the descriptor is
let go only when the last operation has returned.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiofiles
from aiofiles.threadpool.binary import AsyncFileIO

from migrated.errors import ChannelClosed
from migrated.transport.channel import SILENCE_TIMEOUT_S, Buffer
from migrated.transport.thread import to_the_end

T = TypeVar("T")

#: As QEMU creates them: memory contents are nobody else's business.
FILE_MODE = 0o600
#: One write(2) per hop into a thread; larger ones gain nothing more.
WRITE_MAX_BYTES = 4 << 20
#: One read(2) into a buffer that stays in the cache until it is used.
READ_AHEAD_BYTES = 1 << 20


class FileChannel:
    """An open file, from its present position on; the descriptor belongs to this channel. Made by `open_file`."""

    has_return_path = False

    def __init__(self, file: AsyncFileIO, peer: str, *, directory: str | None = None) -> None:
        self.peer = peer
        self.bytes_sent = 0
        self.bytes_received = 0
        self.silence_timeout_s = SILENCE_TIMEOUT_S
        """Not used: a disk may be slow, but it does not go silent."""
        self._file = file
        self._fd = file.fileno()
        self._directory = directory
        # Anything else may let the thread wait for somebody, or take away what is somebody else's.
        self.piece_bytes = READ_AHEAD_BYTES if stat.S_ISREG(os.fstat(self._fd).st_mode) else 0
        self._operation: asyncio.Future[Any] | None = None
        self._ahead: asyncio.Future[int] | None = None
        self._closing = False

    async def send(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            count = await self._run(self._file.write(rest[:WRITE_MAX_BYTES]), "write to") or 0
            self.bytes_sent += count
            rest = rest[count:]

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        count = await self._run(self._file.readinto(view), "read from") or 0
        self.bytes_received += count
        return count

    def begin_receive(self, view: memoryview) -> None:
        self._require_open()
        self._ahead = asyncio.get_running_loop().run_in_executor(None, os.readv, self._fd, [view])
        self._begun(self._ahead)

    async def end_receive(self) -> int:
        assert self._ahead is not None
        count = await self._settled(self._ahead, "read from")
        self._ahead = None
        self.bytes_received += count
        return count

    async def _run(self, operation: Coroutine[Any, Any, T], verb: str) -> T:
        try:
            self._require_open()
        except ChannelClosed:
            operation.close()
            raise
        running = asyncio.ensure_future(operation)
        self._begun(running)
        return await self._settled(running, verb)

    def _require_open(self) -> None:
        if self._closing:
            raise ChannelClosed("the channel was closed at this end", peer=self.peer)

    def _begun(self, operation: asyncio.Future[Any]) -> None:
        self._operation = operation
        operation.add_done_callback(self._ended)

    async def _settled(self, running: asyncio.Future[T], verb: str) -> T:
        try:
            # The buffer is the caller's again as soon as this returns, so the thread must be through with it.
            return await to_the_end(running)
        except OSError as error:
            raise ChannelClosed(f"Unable to {verb} file: {error.strerror or error}", peer=self.peer) from error

    def _ended(self, operation: asyncio.Future[Any]) -> None:
        self._operation = None
        if not operation.cancelled():
            operation.exception()  # seen, also when nobody waits any more
        if self._closing:
            self._release()

    def shutdown_write(self) -> None:
        """Do nothing: a file is not told."""

    async def close(self) -> None:
        if self._closing:
            return
        try:
            if self.bytes_sent:
                await self._run(asyncio.to_thread(_flush, self._fd, self._directory), "flush")
        finally:
            self.abort()

    def abort(self) -> None:
        self._closing = True
        if self._operation is None:
            self._release()

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def open_file(path: str, offset: int, *, writes: bool) -> FileChannel:
    """Open ``path`` at ``offset``; for writing, what follows ``offset`` is dropped. Raises ChannelClosed."""
    opening = asyncio.ensure_future(asyncio.to_thread(_open, path, offset, writes))
    try:
        fd = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_result)
        raise
    except OSError as error:
        raise ChannelClosed(f"Could not open '{path}': {error.strerror or error}") from error
    return await wrap_file(fd, f"file:{path}", writes=writes, directory=os.path.dirname(path) or ".")


async def wrap_file(fd: int, peer: str, *, writes: bool, directory: str | None = None) -> FileChannel:
    """Return the channel of an open descriptor, which belongs to it from here on."""
    # closefd=False: the descriptor is closed by the channel, at once where need be, and not by another thread hop.
    file = await aiofiles.open(fd, "wb" if writes else "rb", buffering=0, closefd=False)
    return FileChannel(file, peer, directory=directory)


def _open(path: str, offset: int, writes: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT if writes else os.O_RDONLY
    # O_NONBLOCK: opening a FIFO by mistake must not hold a thread for ever.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, FILE_MODE)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            raise OSError(0, "it is a pipe; use fd: or exec: for one")
        os.set_blocking(fd, True)
        if writes and stat.S_ISREG(mode):
            os.ftruncate(fd, offset)
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _close_result(opening: asyncio.Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


def _flush(fd: int, directory: str | None) -> None:
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        os.fsync(fd)
    if directory is not None:
        sync_directory(directory)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Let what was created, renamed or removed in a directory survive a crash. Blocking. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

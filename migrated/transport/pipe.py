"""A stream through pipes: descriptors handed over with ``fd:``, or a shell command (``exec:``).

The rule of the file: one direction only, so there is no return path; and a command is part of the channel: its exit
status decides whether the stream arrived, and it never outlives an aborted channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable

from migrated.errors import ChannelClosed, ChannelTimeout
from migrated.transport.channel import RECEIVE_MAX_BYTES, SEND_MAX_BYTES, SILENCE_TIMEOUT_S, Buffer, Turn
from migrated.transport.readiness import Readiness

#: How long a command may work on after its input ended (compressors flush, remote ends finish).
EXIT_TIMEOUT_S = 60.0
#: How long to wait for the exit status of a command that broke the pipe: it only makes the error better.
REASON_GRACE_S = 1.0
#: Longest part of a command that error texts repeat.
COMMAND_SHOWN = 80


class Command:
    """A shell command in its own process group, with a pidfd that tells its end."""

    def __init__(self, command: str, *, stdin: int, stdout: int) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=stdin, stdout=stdout, close_fds=True, start_new_session=True
        )
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._ended = asyncio.Event()
        self._loop.add_reader(self._pidfd, self._reap)
        shown = command if len(command) <= COMMAND_SHOWN else command[: COMMAND_SHOWN - 3] + "..."
        self.name = f"command '{shown}'"

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._ended.set()

    async def failure(self, timeout_s: float) -> str | None:
        """Wait for the end; return what went wrong, None if nothing did. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await self._ended.wait()
        status = self._process.returncode
        if status == 0:
            return None
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"

    def kill(self) -> None:
        """Kill the command and what it started, unless it has ended. It is reaped when it is dead."""
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class PipeChannel:
    """One end of a pipe, or of anything else that can be polled; the descriptor belongs to this channel."""

    has_return_path = False

    def __init__(
        self,
        peer: str,
        *,
        read_fd: int | None = None,
        write_fd: int | None = None,
        command: Command | None = None,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        if (read_fd is None) == (write_fd is None):
            raise ValueError("a PipeChannel has exactly one direction")
        self.peer = peer
        self.bytes_sent = 0
        self.bytes_received = 0
        self.silence_timeout_s = silence_timeout_s
        self._reads = read_fd is not None
        self._fd = fd = read_fd if read_fd is not None else write_fd if write_fd is not None else -1
        self._command = command
        os.set_blocking(fd, False)
        self._readiness = Readiness(fd)
        self._turn = Turn()
        self._what = "command" if command else "pipe"

    async def send(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            await self._turn.take()
            if self._fd < 0 or self._reads:
                raise self._closed_here("sending")
            try:
                count = os.write(self._fd, rest[:SEND_MAX_BYTES])
            except (BlockingIOError, InterruptedError):
                await self._wait(self._readiness.writable, self.silence_timeout_s, "sending")
            except OSError as error:
                what = f"Unable to write to {self._what}: {error.strerror}{await self._reason()}"
                raise ChannelClosed(what, peer=self.peer, phase="sending") from error
            else:
                self.bytes_sent += count
                self._turn.moved(count)
                rest = rest[count:]

    async def _reason(self) -> str:
        if self._command is None:
            return ""
        try:
            failure = await self._command.failure(REASON_GRACE_S)
        except TimeoutError:
            return ""
        return f" ({self._command.name} {failure or 'ended'})"

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        await self._turn.take()
        while True:
            if self._fd < 0 or not self._reads:
                raise self._closed_here("receiving")
            try:
                count = os.readv(self._fd, [view[:RECEIVE_MAX_BYTES]])
            except (BlockingIOError, InterruptedError):
                await self._wait(self._readiness.readable, deadline_s, "receiving")
            except OSError as error:
                what = f"Unable to read from {self._what}: {error.strerror}"
                raise ChannelClosed(what, peer=self.peer, phase="receiving") from error
            else:
                self.bytes_received += count
                self._turn.moved(count)
                if count == 0:
                    await self._check_exit("receiving")
                return count

    async def _wait(self, ready: Callable[[float | None], Awaitable[None]], limit_s: float | None, phase: str) -> None:
        try:
            await ready(limit_s)
        except TimeoutError as error:
            what = "took no byte" if phase == "sending" else "sent nothing"
            raise ChannelTimeout(f"the {self._what} {what} for {limit_s:g} s", peer=self.peer, phase=phase) from error
        except ConnectionAbortedError as error:
            raise self._closed_here(phase) from error
        self._turn.waited()

    def _closed_here(self, phase: str) -> ChannelClosed:
        return ChannelClosed(
            "the channel was closed at this end, or has no such direction", peer=self.peer, phase=phase
        )

    async def _check_exit(self, phase: str) -> None:
        """Wait for the command, whose stream has ended, and complain if it failed."""
        if self._command is None:
            return
        command, self._command = self._command, None
        try:
            failure = await command.failure(EXIT_TIMEOUT_S)
        except TimeoutError as error:
            command.kill()
            what = f"the {command.name} is still running {EXIT_TIMEOUT_S:g} s after its stream ended"
            raise ChannelTimeout(what, peer=self.peer, phase=phase) from error
        except asyncio.CancelledError:
            command.kill()
            raise
        if failure is not None:
            raise ChannelClosed(f"the {command.name} {failure}", peer=self.peer, phase=phase)

    def shutdown_write(self) -> None:
        if not self._reads:
            self._release()

    async def close(self) -> None:
        self._release()
        if self._reads:
            self.abort()  # its end of the stream was not reached, or it has ended already
        else:
            await self._check_exit("closing")

    def abort(self) -> None:
        self._release()
        if self._command is not None:
            self._command.kill()
            self._command = None

    def _release(self) -> None:
        if self._fd >= 0:
            self._readiness.close()
            os.close(self._fd)
            self._fd = -1


def run_to_read(command: str, peer: str) -> PipeChannel:
    """Start ``command`` and return the channel of its standard output. Raises ChannelClosed."""
    return _run(command, peer, reads=True)


def run_to_write(command: str, peer: str) -> PipeChannel:
    """Start ``command`` and return the channel of its standard input. Raises ChannelClosed."""
    return _run(command, peer, reads=False)


def _run(command: str, peer: str, *, reads: bool) -> PipeChannel:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    ours, theirs = (read_end, write_end) if reads else (write_end, read_end)
    try:
        if reads:
            return PipeChannel(peer, read_fd=ours, command=Command(command, stdin=subprocess.DEVNULL, stdout=theirs))
        return PipeChannel(peer, write_fd=ours, command=Command(command, stdin=theirs, stdout=subprocess.DEVNULL))
    except BaseException as error:
        os.close(ours)
        if isinstance(error, OSError):
            raise ChannelClosed(f"Failed to run '{command}': {error.strerror}") from error
        raise
    finally:
        os.close(theirs)

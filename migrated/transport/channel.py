"""What carries one migration stream, and the usual carrier: a connected TCP or Unix socket.

The rule of the file: every wait for the peer has a deadline, which any progress renews; a clean end (0 from
`receive_into`) and a reset (ChannelClosed) are never mixed up, because after a switchover they mean different things.

Sizes: sends of up to 1 MiB and receives of up to 512 KiB were the fastest here; fixed socket
buffers never beat the kernel's own tuning, so none are set.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

from migrated.errors import ChannelClosed, ChannelError, ChannelTimeout
from migrated.transport.readiness import Readiness

Buffer = bytes | bytearray | memoryview

#: How long a peer may take no byte, where nobody says otherwise (x-migrated-silence-timeout's default).
SILENCE_TIMEOUT_S = 10.0
#: How many silence timeouts one piece of a stream may take in all, however it trickles in.
PATIENCE = 3
SEND_MAX_BYTES = 1 << 20
RECEIVE_MAX_BYTES = 512 << 10
#: After this much without a wait, others get the loop: about a quarter of a millisecond of copying.
TURN_BYTES = 1 << 20
#: In postcopy, where somebody waits for a page behind all that: a thirtieth of a millisecond.
SHORT_TURN_BYTES = 512 << 10

#: Keepalive finds a dead host on an idle connection: 10 s + 4 probes 5 s apart.
KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 10),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 4),
)
#: The kernel gives unacknowledged bytes up after this many silence timeouts: our own deadline, whose error says more,
#: comes first; the kernel's is there for bytes it has taken already.
USER_TIMEOUT_FACTOR = 3
#: Unread input makes close(2) reset the connection and so destroy what was sent last: this much is swallowed first.
SWALLOW_MAX_BYTES = 4 << 20

_TIMED_OUT = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


class Channel(Protocol):
    """A byte stream to and from one peer. One task may send while another one receives."""

    @property
    def peer(self) -> str:
        """Who is at the other end, as people write it: ``10.0.0.7:7400``."""
        ...

    @property
    def has_return_path(self) -> bool:
        """True when bytes flow both ways."""
        ...

    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...

    silence_timeout_s: float
    """How long `send` waits without progress; may be changed at any time."""

    async def send(self, data: Buffer) -> None:
        """Send all of ``data``; it may be reused when this returns.

        Raises ChannelTimeout when the peer takes no byte for `silence_timeout_s`, ChannelClosed when it is gone.
        """
        ...

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        """Receive at least one byte into ``view``; 0 = the peer ended the stream in order.

        Raises ChannelTimeout when nothing comes for ``deadline_s`` (None: for ever), ChannelClosed after a reset.
        """
        ...

    def shutdown_write(self) -> None:
        """Tell the peer that nothing more comes; receiving goes on. Idempotent."""
        ...

    async def close(self) -> None:
        """End the stream in order: everything sent is delivered. Raises ChannelError if it was not. Idempotent."""
        ...

    def abort(self) -> None:
        """Drop everything at once; the peer sees a reset where the carrier knows one. Idempotent, never raises."""
        ...


@runtime_checkable
class LendsRoom(Protocol):
    """A Channel that collects what it is given: bytes may be put where it would copy them to."""

    def room(self) -> memoryview:
        """Return where the next bytes belong; at least one fits."""
        ...

    async def fill(self, count: int) -> None:
        """Take ``count`` bytes that were put into `room`, which is another one from here on. Raises ChannelClosed."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A Channel out of a file, of which a thread may read more while what came before is used."""

    piece_bytes: int
    """What `begin_receive` needs room for; 0: this one had better not read ahead."""

    def begin_receive(self, view: memoryview) -> None:
        """Let a thread read into ``view`` from this moment on; only `end_receive` may follow. Raises ChannelClosed."""
        ...

    async def end_receive(self) -> int:
        """Wait for what was begun, and return as `receive_into` does. A cancelled wait may be repeated."""
        ...


class Turn:
    """Counts bytes moved without waiting, so that a fast peer does not keep the event loop to itself."""

    def __init__(self) -> None:
        self._moved = 0
        self.bytes = TURN_BYTES

    async def take(self) -> None:
        """Let others run if it is their turn. Call this before moving bytes, never between moving and returning."""
        if self._moved >= self.bytes:
            self._moved = 0
            await asyncio.sleep(0)

    def moved(self, count: int) -> None:
        """Account bytes."""
        self._moved += count

    def waited(self) -> None:
        """The loop had its turn."""
        self._moved = 0


class SocketChannel:
    """A connected stream socket, TCP or Unix, that belongs to this channel from here on."""

    has_return_path = True

    def __init__(self, sock: socket.socket, peer: str, *, silence_timeout_s: float = SILENCE_TIMEOUT_S) -> None:
        sock.setblocking(False)
        self.peer = peer
        self.bytes_sent = 0
        self.bytes_received = 0
        self._sock = sock
        self._tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        if self._tcp:
            _set_tcp_options(sock)
        self.silence_timeout_s = silence_timeout_s
        self._readiness = Readiness(sock.fileno())
        self._turn = Turn()
        self._write_open = True

    @property
    def silence_timeout_s(self) -> float:
        """How long `send` waits without progress."""
        return self._silence_timeout_s

    @silence_timeout_s.setter
    def silence_timeout_s(self, seconds: float) -> None:
        self._silence_timeout_s = seconds
        if self._tcp and self._sock.fileno() >= 0:
            milliseconds = int(USER_TIMEOUT_FACTOR * seconds * 1000)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    async def send(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            await self._turn.take()
            try:
                count = self._sock.send(rest[:SEND_MAX_BYTES], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                await self._wait(self._readiness.writable, self._silence_timeout_s, "sending")
            except OSError as error:
                raise self.converted("write to", "sending", error) from error
            else:
                self.bytes_sent += count
                self._turn.moved(count)
                rest = rest[count:]

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        await self._turn.take()
        while True:
            try:
                count = self._sock.recv_into(view, min(len(view), RECEIVE_MAX_BYTES))
            except (BlockingIOError, InterruptedError):
                await self._wait(self._readiness.readable, deadline_s, "receiving")
            except OSError as error:
                raise self.converted("read from", "receiving", error) from error
            else:
                self.bytes_received += count
                self._turn.moved(count)
                return count

    def send_now(self, data: Buffer) -> int:
        """Send what goes without waiting, and return how much that was. Not while a `send` is under way.

        Raises ChannelError.
        """
        try:
            count = self._sock.send(data, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self.converted("write to", "sending", error) from error
        self.bytes_sent += count
        return count

    async def receive_at_once(
        self, view: memoryview, take: Callable[[int], bool], *, deadline_s: float | None = None
    ) -> int:
        """Receive into ``view`` over and over, as long as ``take(count)`` deals with what came; return what it left.

        ``take`` is called where the bytes arrive, before any task has its turn. 0 and errors as of `receive_into`.
        """
        left = 0

        def taken() -> bool:
            nonlocal left
            try:
                count = self._sock.recv_into(view)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError as error:
                raise self.converted("read from", "receiving", error) from error
            self.bytes_received += count
            left = count
            return bool(count) and take(count)

        await self._wait(lambda limit_s: self._readiness.readable(limit_s, taken), deadline_s, "receiving")
        return left

    def duplicate(self) -> socket.socket:
        """Return the socket under a number of its own, for a thread. Raises ChannelClosed."""
        try:
            return self._sock.dup()
        except OSError as error:
            raise self.converted("duplicate", "opening", error) from error

    def take_short_turns(self) -> None:
        """Let others have their turn more often: what they do is more urgent than throughput."""
        self._turn.bytes = SHORT_TURN_BYTES

    async def peek(self, deadline_s: float | None) -> bytes:
        """Return the first byte that will be received, b"" at the end of the stream. Raises as `receive_into` does."""
        while True:
            try:
                return self._sock.recv(1, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                await self._wait(self._readiness.readable, deadline_s, "receiving")
            except OSError as error:
                raise self.converted("read from", "receiving", error) from error

    async def _wait(self, ready: Callable[[float | None], Awaitable[None]], limit_s: float | None, phase: str) -> None:
        try:
            await ready(limit_s)
        except TimeoutError as error:
            what = "took no byte" if phase == "sending" else "sent nothing"
            raise ChannelTimeout(f"the peer {what} for {limit_s:g} s", peer=self.peer, phase=phase) from error
        except ConnectionAbortedError as error:
            raise ChannelClosed("the channel was closed at this end", peer=self.peer, phase=phase) from error
        self._turn.waited()

    def converted(self, verb: str, phase: str, error: OSError) -> ChannelError:
        """Return what an error of the socket means."""
        if error.errno == errno.EBADF:
            return ChannelClosed("the channel was closed at this end", peer=self.peer, phase=phase)
        kind = ChannelTimeout if error.errno in _TIMED_OUT else ChannelClosed
        return kind(f"Unable to {verb} socket: {error.strerror}", peer=self.peer, phase=phase)

    def shutdown_write(self) -> None:
        if self._write_open and self._sock.fileno() >= 0:
            self._write_open = False
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                return  # gone already: whoever receives learns it

    async def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self.shutdown_write()
        self._swallow()
        self._readiness.close()
        self._sock.close()

    def _swallow(self) -> None:
        scrap = memoryview(bytearray(1 << 16))
        swallowed = 0
        try:
            while swallowed < SWALLOW_MAX_BYTES and (count := self._sock.recv_into(scrap)):
                swallowed += count
        except OSError:
            return  # nothing there, or a reset: no bytes of ours can be lost any more

    def abort(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._readiness.close()
        if self._tcp:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


def _set_tcp_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)

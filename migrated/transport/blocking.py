"""A connection as one thread uses it, with calls that wait in the kernel.

The rule of the file: from the moment one of these is made until it is closed, the channel behind it belongs to one
thread, and nothing else sends or receives there. The thread has a descriptor of its own, so that nobody can close it
under its hands; `interrupt`, from any thread, makes every call return.

What a page costs is what the kernel does for it, and there the GIL is free: two threads move pages at once, and a
thread has one call for some MiB where the event loop has several and waits between them. Pages need not come into this
process at all: `send_file` hands the pages of a memfd to the socket as they lie there (sendfile), and `pour` moves
what comes through a pipe into one (splice), by one copy into memory that is not zeroed before.

Source: socket(7), SO_RCVTIMEO and SO_SNDTIMEO; recv(2), MSG_WAITALL. They count all that one call has waited, so a peer
that sends a byte every now and then is noticed as one that is silent is. sendfile(2), splice(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from functools import partial

from migrated.errors import ChannelClosed, ChannelTimeout
from migrated.transport.channel import PATIENCE, SocketChannel
from migrated.transport.tls_channel import BATCH_BYTES, TlsChannel

_TIMEOUTS = (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
#: So much may take PATIENCE silence timeouts in all, however it trickles in.
PATIENT_BYTES = 512 << 10
#: A kernel rounds what is shorter down to "for ever".
_SHORTEST_S = 0.001


class BlockingSocket:
    """The descriptor of a SocketChannel, for one thread. Whoever makes it closes it when that thread has ended."""

    def __init__(self, channel: SocketChannel) -> None:
        self._channel = channel
        self._silence_s = channel.silence_timeout_s
        self._sock = channel.duplicate()
        self._interrupted = False
        timeout_s = max(self._silence_s, _SHORTEST_S)
        timeval = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
        for option in _TIMEOUTS:
            self._sock.setsockopt(socket.SOL_SOCKET, option, timeval)
        self._sock.settimeout(None)

    @property
    def peer(self) -> str:
        """Who is at the other end."""
        return self._channel.peer

    def send(self, data: memoryview, *, more: bool = False) -> None:
        """Send all of it; ``more``: something follows at once.

        Raises ChannelTimeout where the peer takes no byte, ChannelClosed.
        """
        self._send(data, socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0))
        self._channel.bytes_sent += len(data)

    def _send(self, data: memoryview, flags: int = socket.MSG_NOSIGNAL) -> None:
        while data:
            data = data[self._outgoing(partial(self._sock.send, data, flags)) :]

    def send_file(self, fd: int, offset: int, data: memoryview) -> None:
        """Send what ``fd`` has from ``offset`` on, as it is when it leaves: ``data`` is a mapping of the same.

        What the file has no more is sent as ``data`` has it. Raises ChannelTimeout, ChannelClosed.
        """
        sent, own = 0, self._sock.fileno()
        while sent < len(data):
            count = self._outgoing(partial(_sendfile, own, fd, offset + sent, len(data) - sent))
            if not count:
                break
            sent += count
        self._channel.bytes_sent += sent
        if sent < len(data):
            self.send(data[sent:])

    def _outgoing(self, call: Callable[[], int]) -> int:
        try:
            return call()
        except BlockingIOError as error:
            text = f"the peer took no byte for {self._silence_s:g} s"
            raise ChannelTimeout(text, peer=self.peer, phase="sending") from error
        except OSError as error:
            raise self._closed() or self._channel.converted("write to", "sending", error) from error

    def fill(self, view: memoryview, *, idle: bool) -> bool:
        """Receive exactly as much as fits; False where the stream ended before the first byte.

        ``idle``: that one may take as long as it likes. Raises ChannelTimeout where it takes too long, ChannelClosed.
        """
        return self._all(len(view), lambda got: self._receive(view[got:]), idle=idle)

    @property
    def pours(self) -> bool:
        """Whether what comes can be moved without having been looked at."""
        return True

    def pour(self, size: int, entrance: int, put: Callable[[int, int], None]) -> None:
        """Receive exactly ``size`` bytes into a pipe, which ``put`` empties, piece by piece.

        It is called with how many bytes came before, and how many are in the pipe. Raises as `fill` does, and what
        ``put`` raises.
        """
        own = self._sock.fileno()

        def receive(got: int) -> int | None:
            count = self._incoming(lambda: os.splice(own, entrance, size - got))
            if count:
                self._channel.bytes_received += count
                put(got, count)
            return count

        self._all(size, receive, idle=False)

    def _all(self, size: int, receive: Callable[[int], int | None], *, idle: bool) -> bool:
        got, since = 0, time.monotonic()
        while got < size:
            # What has come already can still be received behind the end.
            if closed := self._closed():
                raise closed
            count = receive(got)
            if count == 0:
                if got or not idle:
                    raise ChannelClosed("it ended within a packet", peer=self.peer, phase="receiving")
                return False
            now = time.monotonic()
            if count is None and not (idle and not got):
                raise ChannelTimeout(f"the peer sent nothing for {self._silence_s:g} s", peer=self.peer)
            if not got:
                since = now
            got += count or 0
            if got < size and got and now - since > PATIENCE * self._silence_s * (1 + got // PATIENT_BYTES):
                text = f"the peer sends too slowly: not {PATIENT_BYTES >> 10} KiB in {PATIENCE * self._silence_s:g} s"
                raise ChannelTimeout(text, peer=self.peer)
        return True

    def _receive(self, view: memoryview) -> int | None:
        """Return how much has come, at best all; 0 for the end, None where nothing has for too long."""
        count = self._receive_raw(view, socket.MSG_WAITALL)
        self._channel.bytes_received += count or 0
        return count

    def _receive_raw(self, view: memoryview, flags: int) -> int | None:
        return self._incoming(lambda: self._sock.recv_into(view, 0, flags))

    def _incoming(self, call: Callable[[], int]) -> int | None:
        try:
            count = call()
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._closed() or self._channel.converted("read from", "receiving", error) from error
        if not count and (closed := self._closed()):
            raise closed
        return count

    def _closed(self) -> ChannelClosed | None:
        return ChannelClosed("the channel was closed at this end", peer=self.peer) if self._interrupted else None

    def interrupt(self) -> None:
        """End whatever the thread waits for, by the end of the connection. From any thread, also twice."""
        self._interrupted = True
        with contextlib.suppress(OSError):  # gone already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the channel back to the event loop."""
        # It is one open file with two numbers, and the other one's calls must not wait.
        os.set_blocking(self._sock.fileno(), False)
        self._sock.close()


class BlockingTls(BlockingSocket):
    """The same under TLS: encryption is this thread's work, too, and the GIL is free in it."""

    def __init__(self, channel: TlsChannel) -> None:
        super().__init__(channel)
        self._tls = channel
        self._buffer = memoryview(bytearray(BATCH_BYTES))

    def send(self, data: memoryview, *, more: bool = False) -> None:
        """Send all of it. Raises ChannelTimeout where the peer takes no byte, ChannelClosed."""
        for start in range(0, len(data), BATCH_BYTES):
            self._send(self._tls.encrypted(data[start : start + BATCH_BYTES]))
        self._channel.bytes_sent += len(data)

    def send_file(self, fd: int, offset: int, data: memoryview) -> None:
        """Send it encrypted, from the mapping."""
        self.send(data)

    @property
    def pours(self) -> bool:
        """No: it has to be decrypted."""
        return False

    def _receive(self, view: memoryview) -> int | None:
        while (count := self._tls.decrypt(view)) is None:
            received = self._receive_raw(self._buffer, 0)
            if received is None:
                return None
            self._tls.feed(self._buffer[:received])
        return count


def _sendfile(out: int, fd: int, offset: int, count: int) -> int:
    """Return how much was sent; 0 where ``fd`` has nothing of the kind (`machine.retired`)."""
    try:
        return os.sendfile(out, fd, offset, count)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 0
        raise


def blocking(channel: SocketChannel) -> BlockingSocket:
    """Return a channel as a thread uses it. Raises ChannelClosed where it is closed."""
    return BlockingTls(channel) if isinstance(channel, TlsChannel) else BlockingSocket(channel)

"""A connected socket under TLS 1.3, both sides known to each other.

The rule of the file: no byte of a stream moves before both sides have proven who they are, and an end is only an end
when the peer said so (close_notify). A QEMU never says it: where the peer is none of ours, a bare FIN is an end, as it
is without TLS.

OpenSSL works between two buffers in memory, and the socket is read and written in large pieces: with a system call for
each record (16 KiB) a quarter of the throughput was lost. Everything happens on the event loop, a quarter of a
millisecond at a time, but for channels with pages, which threads have for themselves (`transport.blocking`).

Between two daemons the accepting side has the first word: be16 0, or the length of a refusal's reason and that. In TLS
1.3 a client is through with its handshake before anybody has looked at its certificate, so it waits for that word.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from migrated.errors import ChannelClosed, ChannelError, TlsError
from migrated.transport.certificate import Certificate, parse_der
from migrated.transport.channel import RECEIVE_MAX_BYTES, Buffer, Channel, SocketChannel
from migrated.transport.credentials import ALPN, ALPN_CHECK, Connection
from migrated.transport.tls_problem import Encounter, TlsProblem, explain, is_other_protocol
from migrated.transport.trust import Trust

#: What is encrypted, or received, at a time. Fits the processor's second cache; larger ones gained nothing.
BATCH_BYTES = 256 << 10
#: A TLS record holds at most this much.
RECORD_BYTES = 16 << 10
#: Before the peer is known it gets no more than this.
UNKNOWN_PEER_BYTES = 4 << 10
#: A certificate's text and what is wrong with it; nobody is asked to hold more for a refusal.
REASON_MAX_BYTES = 1024


class TlsChannel(SocketChannel):
    """A SocketChannel whose bytes nobody else reads. `authenticate` comes first, and once.

    ``name`` is what the certificate of an accepting peer must be for; None where this is the accepting side.
    """

    def __init__(self, sock: socket.socket, peer: str, trust: Trust, name: str | None) -> None:
        super().__init__(sock, peer)
        assert trust.credentials is not None
        self.certificate: Certificate | None = None
        """The peer's, once it is known."""
        self._trust = trust
        self._name = name
        self._endpoint = trust.credentials.server if name is None else trust.credentials.client
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._endpoint.handshake.wrap_bio(
            self._incoming, self._outgoing, server_side=name is None, server_hostname=name
        )
        assert isinstance(tls, Connection)
        self._tls = tls
        self._buffer = memoryview(bytearray(UNKNOWN_PEER_BYTES))
        self._pending = memoryview(b"")
        """Encrypted, and not taken by the socket yet."""
        self._owed = 0
        """Bytes at the beginning of what is sent next that are encrypted already: see `send_now`."""
        self._plain = bytearray()
        """Decrypted ahead of time."""
        self._ended = False
        self._speaks_ours = False
        self.only_asks = False
        """True when the peer came to check, not to send."""

    # -- who is there ------------------------------------------------------------------------------------------

    async def authenticate(self) -> None:
        """Prove to each other who is there, and whether a machine may go this way. Raises ChannelError."""
        try:
            await self._shake_hands()
            await self._say_or_hear()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ChannelClosed) as error:
            raise self._encounter().error(TlsProblem.NOT_SPOKEN, _ended_early(error, self._name)) from error
        except ssl.SSLError as error:
            raise self._explained(error) from error
        except ValueError as error:  # OpenSSL took it, and yet it cannot be read
            raise self._encounter().error(TlsProblem.FAILED, f"its certificate cannot be read: {error}") from error
        self.bytes_sent = self.bytes_received = 0  # the stream's are counted, and it begins here
        self._buffer = memoryview(bytearray(BATCH_BYTES))
        self._tls.context = self._endpoint.quiet

    async def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._more(None)
            except ssl.SSLError as error:
                if not is_other_protocol(error):
                    with contextlib.suppress(ChannelError):
                        await self._flush()  # the alert
                raise
            else:
                await self._flush()
                break
        protocol = self._tls.selected_alpn_protocol()
        self._speaks_ours = protocol in (ALPN, ALPN_CHECK)
        self.only_asks = protocol == ALPN_CHECK
        self.certificate = parse_der(self._tls.getpeercert(binary_form=True) or b"")

    async def _say_or_hear(self) -> None:
        assert self.certificate is not None
        refusal = self._trust.refusal(self.certificate, sends=self._name is None)
        if self._name is not None and refusal is None and self._speaks_ours:
            refusal = await self._hear_verdict()
        elif self._name is None and self._speaks_ours:
            reason = (refusal or "").encode()[:REASON_MAX_BYTES]
            await self.send(len(reason).to_bytes(2, "big") + reason)
        if refusal is not None:
            problem, _, what = refusal.partition(": ")
            self.shutdown_write()
            raise TlsError(problem, what, peer=self.peer)

    async def _hear_verdict(self) -> str | None:
        length = int.from_bytes(await self._hear(2), "big")
        if not length:
            return None
        reason_bytes = await self._hear(min(length, REASON_MAX_BYTES))
        problem, _, reason = reason_bytes.decode(errors="replace").partition(": ")
        readable = "".join(letter if letter.isprintable() else "?" for letter in reason)
        return f"{problem if problem in set(TlsProblem) else TlsProblem.REFUSED}: the other side says: {readable}"

    async def _hear(self, count: int) -> bytes:
        heard = bytearray(count)
        view = memoryview(heard)
        while view:
            got = await self.receive_into(view)
            if not got:
                raise ChannelClosed("the connection ended", peer=self.peer)
            view = view[got:]
        return bytes(heard)

    async def answer_in_cleartext(self, answer: bytes) -> None:
        """Tell a peer that speaks no TLS why it is refused, in its own language, and close. Raises ChannelError."""
        self._outgoing.read()  # an alert, which it would not understand
        await super().send(answer)
        await super().close()

    def _encounter(self) -> Encounter:
        assert self._trust.credentials is not None
        return Encounter(
            self.peer,
            self._endpoint.certificate,
            self._trust.credentials.authority,
            self._name or "",
            self._tls.presented(),
        )

    def _explained(self, error: ssl.SSLError) -> TlsError:
        return explain(error, self._encounter(), datetime.now(UTC))

    # -- sending -----------------------------------------------------------------------------------------------

    async def send(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        self.bytes_sent += len(rest)
        rest = self._without_owed(rest)
        await self._flush()
        while rest:
            await self._turn.take()
            piece = rest[:BATCH_BYTES]
            self._encrypt(piece)
            await self._flush()
            self._turn.moved(len(piece))
            rest = rest[len(piece) :]

    def send_now(self, data: Buffer) -> int:
        """Send what goes without waiting, and return how much that was. Not while a `send` is under way.

        Where the socket does not take the last of it, that is said to be one byte less, and that byte, encrypted
        already, is left out when it comes again: what is sent next has to begin with what was left.

        Raises ChannelError.
        """
        if not self._flush_now():
            return 0
        piece = memoryview(data).cast("B")[:BATCH_BYTES]
        self._encrypt(self._without_owed(piece))
        count = len(piece)
        if not self._flush_now():
            self._owed = 1
            count -= 1
        self.bytes_sent += count
        return count

    def _without_owed(self, data: memoryview) -> memoryview:
        owed = min(self._owed, len(data))
        self._owed -= owed
        return data[owed:]

    def _encrypt(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._tls.write(data[:RECORD_BYTES]) :]
        except ssl.SSLError as error:
            raise self._explained(error) from error

    def encrypted(self, data: memoryview) -> memoryview:
        """Return what has to go to the socket, for whoever sends it there."""
        self._encrypt(data)
        return memoryview(self._outgoing.read())

    def _flush_now(self) -> bool:
        """Give the socket what it takes; True when nothing is left."""
        while True:
            if not self._pending:
                if not self._outgoing.pending:
                    return True
                self._pending = memoryview(self._outgoing.read())
            try:
                count = self._sock.send(self._pending, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise self.converted("write to", "sending", error) from error
            self._pending = self._pending[count:]

    async def _flush(self) -> None:
        while not self._flush_now():
            await self._wait(self._readiness.writable, self.silence_timeout_s, "sending")

    # -- receiving ---------------------------------------------------------------------------------------------

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        await self._turn.take()
        view = view[:RECEIVE_MAX_BYTES]
        while (count := self.decrypt(view)) is None:
            await self._more(deadline_s)
        # Whoever takes it apart has the same work for little as for much.
        while 0 < count < len(view) and self._more_now() and (further := self.decrypt(view[count:])):
            count += further
        self._turn.moved(count)
        return count

    def _more_now(self) -> bool:
        """Hand OpenSSL what has come; False where nothing has, or what there is means something by itself."""
        try:
            count = self._sock.recv_into(self._buffer)
        except OSError:
            return False
        if count:
            self.feed(self._buffer[:count])
        return bool(count)

    async def receive_at_once(
        self, view: memoryview, take: Callable[[int], bool], *, deadline_s: float | None = None
    ) -> int:
        left = 0

        def drained() -> bool:
            nonlocal left
            while (count := self.decrypt(view)) is not None:
                left = count
                if not count or not take(count):
                    return False
            return True

        def taken() -> bool:
            try:
                self.feed(self._buffer[: self._sock.recv_into(self._buffer)])
            except (BlockingIOError, InterruptedError):
                return True
            except OSError as error:
                raise self.converted("read from", "receiving", error) from error
            return drained()

        if drained():  # what came with the bytes before makes no socket readable
            await self._wait(lambda limit_s: self._readiness.readable(limit_s, taken), deadline_s, "receiving")
        return left

    async def peek(self, deadline_s: float | None) -> bytes:
        """Return the first byte that will be received, b"" at the end of the stream. Raises as `receive_into` does."""
        if not self._plain:
            byte = bytearray(1)
            count = await self.receive_into(memoryview(byte), deadline_s=deadline_s)
            self.bytes_received -= count
            self._plain += byte[:count]
        return bytes(self._plain[:1])

    def decrypt(self, view: memoryview) -> int | None:
        """Return how much of what has come was decrypted into ``view``; 0 = the end, None = nothing is there."""
        got = len(self._plain[: len(view)])
        view[:got] = self._plain[:got]
        del self._plain[:got]
        while got < len(view) and not self._ended:
            try:
                # int(): the stubs know bytes only, which is what it returns without a buffer.
                count = int(self._tls.read(len(view) - got, view[got:]))
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError) as error:
                count = self._end(error)
            except ssl.SSLError as error:
                raise self._explained(error) from error
            self._ended = not count
            got += count
        self.bytes_received += got
        return got if got or self._ended else None

    def _end(self, error: ssl.SSLError) -> int:
        """Return 0 where the peer ended the stream in order; raise where the connection just ended."""
        if isinstance(error, ssl.SSLZeroReturnError):
            return 0
        if self._speaks_ours:
            raise ChannelClosed(
                "the connection was cut: it ended without the end of TLS", peer=self.peer, phase="receiving"
            ) from error
        if self._name is not None and not self.bytes_received:
            raise self._encounter().error(
                TlsProblem.REFUSED,
                "it ended the connection right after the handshake, without a word, as a QEMU does that refuses a"
                f" certificate; ours is {self._endpoint.certificate}. Next: look at what that QEMU says",
            ) from error
        return 0

    async def _more(self, deadline_s: float | None) -> None:
        """Wait for bytes, and hand them to OpenSSL."""
        if not self._write_open and self._pending:
            await self._flush()  # nobody sends any more; the peer may wait for this end
            self._shut_down_socket()
        while True:
            try:
                return self.feed(self._buffer[: self._sock.recv_into(self._buffer)])
            except (BlockingIOError, InterruptedError):
                await self._wait(self._readiness.readable, deadline_s, "receiving")
            except OSError as error:
                raise self.converted("read from", "receiving", error) from error

    def feed(self, received: memoryview) -> None:
        """Take what the socket gave; nothing means that it has ended."""
        if received:
            self._incoming.write(received)
        else:
            self._incoming.write_eof()

    # -- the end -----------------------------------------------------------------------------------------------

    def shutdown_write(self) -> None:
        if not self._write_open or self._sock.fileno() < 0:
            return
        self._write_open = False
        if self._speaks_ours:
            # A QEMU does not read it; and what it has not read when it closes makes its end a reset.
            with contextlib.suppress(ChannelError, ssl.SSLError):
                self._set_aside()
                self._tls.unwrap()
        with contextlib.suppress(ChannelError):  # gone already: whoever receives learns it
            if self._flush_now():
                self._shut_down_socket()

    def _set_aside(self) -> None:
        """Decrypt what has come: OpenSSL does not let go in order while it still has something to give."""
        ahead, piece = bytearray(), memoryview(bytearray(RECORD_BYTES))
        while count := self.decrypt(piece):
            self.bytes_received -= count
            ahead += piece[:count]
        self._plain = ahead

    def _shut_down_socket(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self.shutdown_write()
        try:
            await self._flush()
        except ChannelError:
            if self._speaks_ours:
                raise
            # All that is left is what OpenSSL says to a bare end, and a QEMU that has ended does not read it.
        finally:
            self._shut_down_socket()
            await super().close()


def names_of(channel: Channel) -> tuple[str, ...]:
    """Return what a peer has proven to be called; () where it has proven nothing."""
    certificate = channel.certificate if isinstance(channel, TlsChannel) else None
    return certificate.names if certificate is not None else ()


def _ended_early(error: Exception, name: str | None) -> str:
    how = error.what if isinstance(error, ChannelClosed) else "end of stream"
    if name is None:
        return f"the source went away before it had proven who it is ({how})"
    return (
        f"the connection ended before the other side had proven who it is ({how}): it may speak no TLS, or be busy with"
        " another migration. Next: see whether it has keys ([tls]), and what its log says"
    )

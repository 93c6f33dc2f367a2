"""One connection to a listening daemon, by a peer that says what it likes and reads what it is told.

The rule of the file: raw bytes; what comes back is taken apart from the description of the return path alone.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

#: Against a hanging test only.
DEADLINE_S = 20.0
SHUT, PONG, REASON = 1, 2, 0x4D01


class Visit:
    """A TCP connection to ``port``; closed at the end of the block."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self.answer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def say(self, data: bytes, *, end: bool = False) -> None:
        """Send, as far as the daemon takes it; with ``end``, say that nothing follows."""
        # A refusal may come while there is still something to send: reset, or not connected any more.
        with contextlib.suppress(OSError):
            self.socket.sendall(data)
            if end:
                self.socket.shutdown(socket.SHUT_WR)

    def hear(self) -> bytes:
        """Read until the daemon ends the connection; return all it ever said."""
        with contextlib.suppress(ConnectionError):
            while data := self.socket.recv(1 << 16):
                self.answer += data
        return self.answer

    def hear_exactly(self, count: int) -> bytes:
        """Read until ``count`` bytes have come in all."""
        while len(self.answer) < count:
            data = self.socket.recv(count - len(self.answer))
            assert data, f"the connection ended after {self.answer!r}"
            self.answer += data
        return self.answer

    def listen(self, seconds: float) -> bytes | None:
        """Return what comes within so many seconds: b"" for the end of the connection, None for nothing."""
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return None
        except ConnectionError:
            return b""
        finally:
            self.socket.settimeout(DEADLINE_S)
        self.answer += data
        return data

    def drip(self, data: bytes, pace_s: float, *, step: int = 1) -> bytes:
        """Send ``step`` bytes at a time, listening in between, until the daemon ends it; return all it ever said."""
        for at in range(0, len(data), step):
            heard = self.listen(pace_s)
            if heard is not None and not heard:
                return self.answer
            self.say(data[at : at + step])
        raise AssertionError(f"{len(data)} bytes were taken, {step} at a time")

    def reset(self) -> None:
        """Close with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def visit(port: int, data: bytes, *, end: bool = False) -> list[tuple[int, bytes]]:
    """Say something, hear the daemon out; return its messages."""
    with Visit(port) as peer:
        sender = threading.Thread(target=peer.say, args=(data,), kwargs={"end": end})
        sender.start()
        answer = peer.hear()
        sender.join()
    return list(messages(answer))


def messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """Take return path messages apart: be16 type, be16 length, body."""
    while answer:
        kind, length = struct.unpack(">HH", answer[:4])
        yield kind, answer[4 : 4 + length]
        answer = answer[4 + length :]

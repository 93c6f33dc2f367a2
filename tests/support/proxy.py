"""A TCP proxy between two daemons that breaks links on purpose (there is no netem in this kernel).

Runs in a thread of its own, on loopback. Forward is source to destination. Every fault is an explicit call, or a byte
count at which it happens; nothing here depends on time.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Self

CHUNK = 1 << 16


@dataclass
class Direction:
    """One direction of the link."""

    passed: int = 0
    limit: int | None = None
    """Pass this many bytes, then do what `at_limit` says."""
    at_limit: str = "cut"
    """cut (RST both ways) | stall (pass nothing more) | swallow (read on, deliver nothing, not even the end)"""
    flip_at: int | None = None
    """Flip a bit of the byte at this offset."""
    flip_behind: tuple[bytes, int] | None = None
    """Flip a bit so many bytes behind the end of these, once."""
    cut_before: bytes | None = None
    """Cut where these bytes would pass (in one piece), once."""
    hit: threading.Event = field(default_factory=threading.Event)
    kept: bytearray | None = None
    """Set to an empty one to keep a copy of what is read here."""

    @property
    def stalled(self) -> bool:
        return self.limit is not None and self.passed >= self.limit and self.at_limit == "stall"

    @property
    def swallows(self) -> bool:
        return self.limit is not None and self.passed >= self.limit and self.at_limit == "swallow"


class Proxy:
    """Accepts any number of connections, one at a time, and passes them on to ``target``."""

    def __init__(self, target: tuple[str, int] | str) -> None:
        self.target = target
        """Where the next connection goes: host and port, or the path of a Unix socket."""
        self.target_after_cut: tuple[str, int] | str | None = None
        """Where connections go once `Direction.cut_before` has struck."""
        self.forward = Direction()
        self.backward = Direction()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake_r, self._wake_w = socket.socketpair()
        self._cut = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Reset the present connection in both directions."""
        self._cut.set()
        self._wake_w.send(b"x")

    def take_forward(self) -> bytes:
        """Return what was kept of the forward direction, and keep from here on."""
        kept, self.forward.kept = self.forward.kept or bytearray(), bytearray()
        return bytes(kept)

    def resume(self) -> None:
        """Let go on what stalled at its limit."""
        self.forward.limit = self.backward.limit = None
        self._wake_w.send(b"x")

    def close(self) -> None:
        self._closing.set()
        self.cut()
        self._thread.join()
        for sock in (self._listener, self._wake_r, self._wake_w):
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            readable, _, _ = select.select([self._listener, self._wake_r], [], [])
            if self._wake_r in readable:
                self._wake_r.recv(4096)
                self._cut.clear()
                continue
            client, _ = self._listener.accept()
            try:
                server = _connect(self.target)
            except OSError:
                _reset(client)
                continue
            self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        ways = {client: (server, self.forward), server: (client, self.backward)}
        unheard = False  # an end was swallowed: only a cut makes the other side notice
        while ways or unheard:
            ready = [sock for sock, (_, way) in ways.items() if not way.stalled]
            readable, _, _ = select.select([*ready, self._wake_r], [], [])
            if self._wake_r in readable:
                self._wake_r.recv(4096)
            if self._cut.is_set():
                self._cut.clear()
                break
            for sock in readable:
                if sock is self._wake_r:
                    continue
                to, way = ways[sock]
                verdict = self._pass(sock, to, way)
                if verdict == "cut":
                    _reset(client)
                    _reset(server)
                    return
                if verdict in ("end", "unheard"):
                    unheard = unheard or verdict == "unheard"
                    del ways[sock]
        for sock in (client, server):
            _reset(sock) if ways or unheard else sock.close()

    def _pass(self, sock: socket.socket, to: socket.socket, way: Direction) -> str:
        room = CHUNK if way.limit is None or way.at_limit == "swallow" else min(CHUNK, way.limit - way.passed)
        try:
            data = sock.recv(room) if room else b""
        except OSError:
            return "unheard" if way.swallows else "cut"
        if room and not data:
            return _end(to, way)
        if way.kept is not None:
            way.kept += data
        data = _changed(data, way)
        if way.cut_before is not None and (at := data.find(way.cut_before)) >= 0:
            way.cut_before = None
            to.sendall(data[:at])
            if self.target_after_cut is not None:
                self.target = self.target_after_cut
            way.hit.set()
            return "cut"
        start, way.passed = way.passed, way.passed + len(data)
        if way.limit is not None and way.passed >= way.limit:
            way.hit.set()
            if way.at_limit == "swallow":
                data = data[: max(0, way.limit - start)]
        try:
            to.sendall(data)
        except OSError:
            return "cut"
        if way.limit is not None and way.passed >= way.limit and way.at_limit != "swallow":
            return way.at_limit
        return "go"


def _changed(data: bytes, way: Direction) -> bytes:
    """Flip what is to be flipped."""
    at = -1
    if way.flip_at is not None and way.passed <= way.flip_at < way.passed + len(data):
        at = way.flip_at - way.passed
    if way.flip_behind is not None and (found := data.find(way.flip_behind[0])) >= 0:
        at = found + len(way.flip_behind[0]) + way.flip_behind[1]
        way.flip_behind = None
        way.hit.set()
    if at < 0:
        return data
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _end(to: socket.socket, way: Direction) -> str:
    if way.swallows:
        return "unheard"
    try:
        to.shutdown(socket.SHUT_WR)
    except OSError:
        return "cut"
    return "end"


def _connect(target: tuple[str, int] | str) -> socket.socket:
    if not isinstance(target, str):
        return socket.create_connection(target)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(target)
    except OSError:
        sock.close()
        raise
    return sock


def _reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

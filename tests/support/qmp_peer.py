"""A QMP client made of nothing but a socket, for what a well-behaved client never sends.

The rule of the file: it understands lines of JSON and nothing of QMP.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

DEADLINE_S = 20.0
"""Against a hanging test only."""


class QmpPeer:
    """One raw connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = b""

    @classmethod
    async def connect(cls, path: str, *, negotiate: bool = True) -> QmpPeer:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.connect(path)
        peer = cls(sock)
        assert "QMP" in await peer.receive()
        if negotiate:
            assert await peer.ask('{"execute": "qmp_capabilities"}') == {"return": {}}
        return peer

    async def send(self, data: bytes) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), DEADLINE_S)

    async def line(self) -> bytes:
        """The next line; empty at the end of the connection."""
        while b"\n" not in self._received:
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 65536), DEADLINE_S)
            if not data:
                assert not self._received
                return b""
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line + b"\n"

    async def receive(self) -> Any:
        """The next object."""
        line = await self.line()
        assert line.endswith(b"\r\n")
        return json.loads(line)

    async def ask(self, text: str) -> Any:
        await self.send(text.encode())
        return await self.receive()

    async def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        return await self.ask(json.dumps({"execute": name, "arguments": arguments or {}}))

    async def refusal(self, text: str) -> tuple[str, str]:
        """Send something that must be refused; return class and description."""
        answer = await self.ask(text)
        return answer["error"]["class"], answer["error"]["desc"]

    async def at_end(self) -> None:
        """Read up to the end of the connection."""
        loop = asyncio.get_running_loop()
        try:
            while await asyncio.wait_for(loop.sock_recv(self.sock, 65536), DEADLINE_S):
                pass
        except ConnectionResetError:
            pass

    def close(self) -> None:
        self.sock.close()

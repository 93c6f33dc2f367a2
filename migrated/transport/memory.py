"""A channel that leads nowhere: bytes collected in memory, or read from it.

The rule of the file: for what is built or taken apart whole before it travels (a postcopy package); bounded by whoever
fills it.
"""

from __future__ import annotations

from migrated.transport.channel import Buffer


class MemoryChannel:
    """A Channel. `send` appends to ``content``; `receive_into` reads it from the beginning."""

    has_return_path = False
    peer = "memory"
    silence_timeout_s = 0.0

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.bytes_sent = 0
        self.bytes_received = 0

    async def send(self, data: Buffer) -> None:
        self.content += data
        self.bytes_sent += len(data)

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        part = self.content[self.bytes_received : self.bytes_received + len(view)]
        view[: len(part)] = part
        self.bytes_received += len(part)
        return len(part)

    def shutdown_write(self) -> None:
        return

    async def close(self) -> None:
        return

    def abort(self) -> None:
        return

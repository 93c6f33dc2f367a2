"""The outgoing stream: codec x channel, the ``f`` of the save hooks.

The rule of the file: ``put_*`` only fills a bounded buffer and never waits; `drain` and `send` are where the network
may hold the caller up. Numbers are big-endian, as everywhere on this wire.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from migrated.errors import LocalProtocolError
from migrated.model.stats import BandwidthMeter
from migrated.stream.checksum import CHECKSUM_BYTES, Checksum
from migrated.transport.channel import Channel, LendsRoom, SocketChannel
from migrated.wire.command import Command, encode_command
from migrated.wire.postcopy import encode_advise
from migrated.wire.primitives import encode_counted_string
from migrated.wire.ram import PAGE
from migrated.wire.section import (
    EOF_BYTE,
    Configuration,
    SectionHeader,
    SectionType,
    encode_configuration,
    encode_footer,
    encode_section_header,
    encode_stream_header,
    encode_vmdescription,
)
from migrated.wire.vmdescription import DeviceEntry, describe, described_bytes

Buffer = bytes | bytearray | memoryview

#: A handler that puts more than this between two drains has a bug; device states beyond it use `send`.
BUFFER_MAX_BYTES = 64 << 20


class OutgoingStream:
    """Buffered, rate-accounted writer of one migration stream."""

    def __init__(
        self,
        channel: Channel,
        meter: BandwidthMeter,
        *,
        on_sent: Callable[[int], None] = lambda count: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        # Once: Python 3.11 looks at every attribute of a protocol each time it is asked.
        self._lender = channel if isinstance(channel, LendsRoom) else None
        self._meter = meter
        self._on_sent = on_sent
        self._clock = clock
        self._buffer = bytearray()
        self._flushed = 0
        self._sending = False
        self._checksum: Checksum | None = None
        self._summed = 0
        """How much of the buffer is in the checksum."""
        self._open: SectionHeader | None = None
        self._body_start = 0
        self._described: Mapping[str, Any] = {}
        self._full_sections: list[DeviceEntry] = []
        self.advised = False
        """The other end was told that postcopy may follow: block lists say of what size pages are."""

    @property
    def position(self) -> int:
        """Bytes put so far, sent or not."""
        return self._flushed + len(self._buffer)

    def put_advise(self, page_sizes: int) -> None:
        """Say that postcopy may follow; ``page_sizes`` are those of all blocks, or-ed together."""
        self.advised = True
        self.put_buffer(encode_advise(page_sizes or PAGE, PAGE))

    # -- the contract's puts -----------------------------------------------------------------------------------

    def put_be8(self, value: int) -> None:
        self.put_buffer(struct.pack(">B", value))

    def put_be16(self, value: int) -> None:
        self.put_buffer(struct.pack(">H", value))

    def put_be32(self, value: int) -> None:
        self.put_buffer(struct.pack(">I", value))

    def put_be64(self, value: int) -> None:
        self.put_buffer(struct.pack(">Q", value))

    def put_buffer(self, data: Buffer) -> None:
        """Append bytes to the buffer. Large handlers call ``await f.drain()`` every now and then."""
        self._buffer += data
        if len(self._buffer) > BUFFER_MAX_BYTES:
            raise LocalProtocolError(f"more than {BUFFER_MAX_BYTES} bytes put without a drain()")

    def put_counted_string(self, text: str) -> None:
        self.put_buffer(encode_counted_string(text))

    def rate_limit_exceeded(self) -> bool:
        """True when this 100 ms window's budget is used up: stop iterating and return."""
        return self._meter.exceeded(self._clock())

    @property
    def limit_bps(self) -> int | None:
        """The rate limit, in bytes per second; None without one."""
        return self._meter.limit_bps

    async def drain(self) -> None:
        """Send everything put so far."""
        if self._buffer:
            data, self._buffer = self._buffer, bytearray()
            await self._send(data)

    async def send(self, data: Buffer) -> None:
        """Send what was put, then ``data`` as it lies, uncopied; it may be reused when this returns."""
        await self.drain()
        await self._send(data)

    async def _send(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if self._checksum is not None:
            self._checksum.add(view[self._summed :])
            self._summed = 0
        self._account(len(view))
        self._sending = True
        try:
            await self._channel.send(view)
        finally:
            self._sending = False

    async def room(self) -> memoryview | None:
        """Send what was put; return where the next bytes may be put instead of being sent, if there is such a place."""
        await self.drain()
        return self._lender.room() if self._lender is not None and self._checksum is None else None

    async def fill(self, count: int) -> None:
        """Send ``count`` bytes that were put into `room`."""
        self._account(count)
        assert self._lender is not None
        await self._lender.fill(count)

    def _account(self, count: int) -> None:
        self._flushed += count
        self.account(count)

    def account(self, count: int) -> None:
        """Count bytes that were handed to the network, here or on another channel of this migration."""
        self._meter.account(count)
        self._on_sent(count)

    def send_now(self, data: Buffer) -> bool:
        """Put ``data`` and send what goes without waiting; False where something is left for `drain`."""
        if self._sending or self._buffer or self._checksum or not isinstance(self._channel, SocketChannel):
            self.put_buffer(data)
            return False
        count = self._channel.send_now(data)
        self._account(count)
        self._buffer += data[count:]
        return count == len(data)

    # -- checksums ---------------------------------------------------------------------------------------------

    def begin_checksums(self) -> None:
        """Sum up what is put from here on; a checksum follows each section (only for a `migrated` destination)."""
        self._checksum = Checksum()
        self._summed = len(self._buffer)

    def end_checksums(self) -> None:
        """Sum up no more."""
        self._checksum = None
        self._summed = 0

    @property
    def checks(self) -> bool:
        """True while checksums are sent."""
        return self._checksum is not None

    def put_checksum(self) -> None:
        """Put X_CHECKSUM of everything since the last one, its own head included."""
        if self._checksum is None:
            return
        element = encode_command(Command.X_CHECKSUM, bytes(CHECKSUM_BYTES))
        self.put_buffer(element[:-CHECKSUM_BYTES])
        with memoryview(self._buffer) as view:
            self._checksum.add(view[self._summed :])
        self.put_buffer(self._checksum.take())
        self._summed = len(self._buffer)

    # -- elements ----------------------------------------------------------------------------------------------

    def put_preamble(self, configuration: Configuration) -> None:
        """Put the stream header and the configuration section."""
        self.put_buffer(encode_stream_header())
        self.put_buffer(encode_configuration(configuration))

    def put_command(self, command: Command, payload: bytes = b"") -> None:
        self.put_buffer(encode_command(command, payload))

    def begin_section(self, header: SectionHeader) -> None:
        """Put a section header; only one section is open at a time."""
        if self._open is not None:
            raise LocalProtocolError(f"section {header.idstr} begins inside section {self._open.idstr}")
        self.put_buffer(encode_section_header(header))
        self._open = header
        self._body_start = self.position
        self._described = {}

    def describe(self, described: Mapping[str, Any]) -> None:
        """Say what the body of the open section consists of (vmsd_name, version, fields), for the VMDESCRIPTION."""
        self._described = described

    def end_section(self, section_id: int) -> None:
        """Put the footer of the open section."""
        header = self._open
        if header is None or header.section_id != section_id:
            raise LocalProtocolError(f"section {section_id} ends without being open")
        if header.kind is SectionType.FULL:
            body = self.position - self._body_start
            if self._described and described_bytes(self._described) != body:
                raise LocalProtocolError(f"section {header.idstr} has {body} bytes, and is described otherwise")
            self._full_sections.append(DeviceEntry(header.idstr, header.instance_id, body, self._described))
        self.put_buffer(encode_footer(section_id))
        self._open = None
        self.put_checksum()

    def put_end_of_stream(self) -> None:
        """Put EOF and the VMDESCRIPTION of what was put: the last bytes the destination needs."""
        self.put_buffer(EOF_BYTE)
        self.put_buffer(encode_vmdescription(describe(self._full_sections)))

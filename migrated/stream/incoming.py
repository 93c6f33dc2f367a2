"""The incoming stream: channel x codec, the ``f`` of the load hooks.

The rule of the file: one bounded buffer, and every wait for the peer has a deadline. Pull parsers of `wire` are driven
by `run`; the bulk path (`peek`, `consume`, `fill`) lets the "ram" handler parse records where they lie.

Deadlines: a peer may be silent *between* elements for `idle_timeout_s` (None: for ever, as a QEMU may be; TCP
keepalive finds dead hosts), inside an element for `silence_timeout_s`, and what belongs together (a number, a text, a
record) must be there after `PATIENCE` times that, so that one byte every few seconds is no way to hold a daemon.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np

from migrated.errors import (
    CHANGED,
    ChannelError,
    ChannelTimeout,
    MigratedError,
    RemoteProtocolError,
    SectionError,
    WorkloadError,
)
from migrated.stream.checksum import Checksum
from migrated.transport.channel import PATIENCE, Channel, ReadsAhead, SocketChannel
from migrated.wire.command import Command
from migrated.wire.primitives import parse_counted_string
from migrated.wire.pull import Parser
from migrated.wire.section import CommandHeader, parse_element

T = TypeVar("T")

#: Two receives: a call costs as much as copying 100 KiB, so twice the 256 KiB that fit the second-level cache won by a
#: quarter (interleaved, 2 GiB); twice that again made no difference.
BUFFER_BYTES = 1 << 20
#: The largest thing a parser may ask for in one piece; larger bodies are taken from `peek`.
PIECE_MAX_BYTES = 64 << 10
#: Room in front of what is read ahead, for what is left of the buffer before: a part of a piece, or of a record.
FRONT_BYTES = PIECE_MAX_BYTES
#: A footer and the byte behind it.
PATTERN_MAX_BYTES = 6


class IncomingStream:
    """Buffered, deadline-keeping reader of one migration stream."""

    def __init__(
        self, channel: Channel, *, silence_timeout_s: Callable[[], float], buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self._channel = channel
        self._silence_timeout_s = silence_timeout_s
        self._file = channel if isinstance(channel, ReadsAhead) and channel.piece_bytes else None
        size = FRONT_BYTES + self._file.piece_bytes if self._file else buffer_bytes
        self._view = memoryview(bytearray(size))
        self._address = _address(self._view)
        self._other = memoryview(bytearray(size if self._file else 0))
        """What a thread reads into, from FRONT_BYTES on, while the first one is used."""
        self._reading = False
        self._start = 0
        self._end = 0
        self._consumed = 0
        self._checksum: Checksum | None = None
        self._summed = 0
        """Up to where the buffer is in the checksum; never behind what is consumed."""
        self._front = -1
        self._front_since_s = 0.0
        self.idle_timeout_s: float | None = None
        """How long the peer may be silent between two elements; None = for ever."""
        self.received_elsewhere: Callable[[], int] = lambda: 0
        """How much has come on other channels of this migration: while that grows, silence here is none."""
        self.section = "stream header"
        """Where in the stream we are, for errors."""

    @property
    def offset(self) -> int:
        """Stream offset of the next byte to be parsed."""
        return self._consumed

    # -- checksums ---------------------------------------------------------------------------------------------

    def begin_checksums(self) -> None:
        """Sum up what is consumed from here on."""
        self._checksum = Checksum()
        self._summed = self._start

    def end_checksums(self) -> None:
        """Sum up no more."""
        self._checksum = None

    async def expect_checksum(self) -> None:
        """Read and compare what has to follow a section. Raises RemoteProtocolError."""
        if self._checksum is None:
            return
        element = await self.run(parse_element(None))
        if not isinstance(element, CommandHeader) or element.number != Command.X_CHECKSUM:
            raise RemoteProtocolError("a section without its checksum", section=self.section, expected="X_CHECKSUM")
        self.compare(element.payload)

    def compare(self, checksum: bytes) -> None:
        """Compare with the sum of what was consumed since the last one, but for ``checksum`` itself, just consumed.

        Raises RemoteProtocolError.
        """
        if self._checksum is None:
            return
        self._checksum.add(self._view[self._summed : self._start - len(checksum)])
        self._summed = self._start
        if (found := self._checksum.take()) != checksum:
            raise RemoteProtocolError(
                CHANGED,
                section=self.section,
                offset=self.offset,
                expected=f"checksum {checksum.hex()}",
                found=found.hex(),
            )

    def _sum_up(self) -> None:
        """Take what was consumed into the checksum, before the buffer is used again."""
        if self._checksum is not None:
            self._checksum.add(self._view[self._summed : self._start])
        self._summed = self._start

    # -- bulk --------------------------------------------------------------------------------------------------

    def peek(self) -> memoryview:
        """Return what has arrived and was not consumed. Valid until the next `fill`."""
        return self._view[self._start : self._end]

    @property
    def front_address(self) -> int:
        """Where the first byte of `peek` lies in memory, for whoever hands it to the kernel."""
        return self._address + self._start

    def consume(self, count: int) -> None:
        """Drop ``count`` bytes from the front of `peek`."""
        self._start += count
        self._consumed += count

    async def fill(self) -> None:
        """Receive more behind what is buffered.

        Raises RemoteProtocolError at the end of the stream, ChannelTimeout when the peer is silent or needs too long
        for what is at the front: that must become whole, and be consumed.
        """
        silence_s = self._silence_timeout_s()
        left_s = self._patience_left_s(silence_s)
        try:
            count = await self._receive_in_time(min(silence_s, left_s))
        except ChannelTimeout as error:
            if silence_s <= left_s:
                raise
            raise self._too_slow() from error
        self._take(count)

    async def _receive_in_time(self, deadline_s: float | None) -> int:
        """Receive while something comes, here or elsewhere."""
        while True:
            elsewhere = self.received_elsewhere()
            try:
                return await self._receive(deadline_s)
            except ChannelTimeout:
                if self.received_elsewhere() == elsewhere:
                    raise
                self._front_since_s = time.monotonic()

    async def _receive(self, deadline_s: float | None) -> int:
        """Receive behind what is buffered. Only a partial record is ever moved: the bulk parser consumes all others."""
        self._sum_up()
        if self._file is not None:
            return await self._go_on_ahead(self._file)
        if self._start:
            remainder = self._end - self._start
            self._view[:remainder] = self._view[self._start : self._end]
            self._start, self._end, self._summed = 0, remainder, 0
        return await self._channel.receive_into(self._view[self._end :], deadline_s=deadline_s)

    async def _go_on_ahead(self, file: ReadsAhead) -> int:
        """Go on in the buffer that a thread has filled meanwhile, and let it fill this one."""
        if not self._reading:
            file.begin_receive(self._other[FRONT_BYTES:])
            self._reading = True
        count = await file.end_receive()
        left = self.peek()
        self._start = self._summed = FRONT_BYTES - len(left)
        self._end = FRONT_BYTES
        self._other[self._start : self._end] = left
        self._view, self._other = self._other, self._view
        self._address = _address(self._view)
        self._reading = count > 0
        if self._reading:
            file.begin_receive(self._other[FRONT_BYTES:])
        return count

    def _patience_left_s(self, silence_s: float) -> float:
        """Return how long what is at the front may still take. Raises ChannelTimeout when that is over."""
        now = time.monotonic()
        if self._front != self._consumed:
            self._front, self._front_since_s = self._consumed, now
        left_s = self._front_since_s + PATIENCE * silence_s - now
        if left_s <= 0:
            raise self._too_slow()
        return left_s

    def _too_slow(self) -> ChannelTimeout:
        return ChannelTimeout(
            f"the peer sends too slowly: {self._end - self._start} bytes of what belongs together in"
            f" {PATIENCE * self._silence_timeout_s():g} s",
            peer=self._channel.peer,
            phase="receiving",
        )

    def _take(self, count: int) -> None:
        if count == 0:
            raise RemoteProtocolError(
                "the stream ends too early",
                section=self.section,
                offset=self._consumed + self._end - self._start,
                expected="more bytes",
                found="end of stream",
            )
        self._end += count

    async def wait_for_element(self) -> None:
        """Wait, for up to `idle_timeout_s`, until at least one byte of the next element is here."""
        if self._start == self._end:
            self._take(await self._receive_in_time(self.idle_timeout_s))

    async def take_at_once(self, take: Callable[[memoryview], int]) -> None:
        """Have ``take`` consume what arrives, where it arrives; return when it leaves something.

        ``take`` gets what is buffered and returns how much of it is dealt with. Deadline and errors are those of
        `wait_for_element`; what ``take`` raises is raised here.
        """

        def taken(count: int) -> bool:
            self._start, self._end, self._summed = 0, count, 0
            self.consume(take(self.peek()))
            self._sum_up()
            return self._start == self._end

        self.consume(take(self.peek()))
        self._sum_up()
        while self._start == self._end:
            if not isinstance(self._channel, SocketChannel):
                await self.wait_for_element()
                self.consume(take(self.peek()))
            elif not await self._channel.receive_at_once(self._view, taken, deadline_s=self.idle_timeout_s):
                self._take(0)

    async def read_exactly(self, count: int) -> bytes:
        """Return exactly ``count`` bytes (at most PIECE_MAX_BYTES)."""
        if count > PIECE_MAX_BYTES:
            raise RemoteProtocolError(
                "too much in one piece",
                section=self.section,
                offset=self.offset,
                expected=f"at most {PIECE_MAX_BYTES} bytes",
                found=f"{count} bytes",
            )
        while self._end - self._start < count:
            await self.fill()
        data = bytes(self._view[self._start : self._start + count])
        self.consume(count)
        return data

    async def look_at(self, count: int) -> bytes:
        """Return the next ``count`` bytes and leave them where they are."""
        while self._end - self._start < count:
            await self.fill()
        return bytes(self._view[self._start : self._start + count])

    async def read_until(self, pattern: re.Pattern[bytes], limit: int) -> bytes:
        """Return what comes before ``pattern``, at most ``limit`` bytes; what it matches is left where it is."""
        body = bytearray()
        while True:
            found = pattern.search(self.peek())
            # What is at the end of the buffer may be the beginning of it.
            take = found.start() if found else max(self._end - self._start - PATTERN_MAX_BYTES, 0)
            if len(body) + take > limit:
                raise RemoteProtocolError(
                    "a body without end",
                    section=self.section,
                    offset=self.offset,
                    expected=f"at most {limit} bytes",
                    found="more",
                )
            body += self.peek()[:take]
            self.consume(take)
            if found:
                return bytes(body)
            await self.fill()

    async def run(self, parser: Parser[T]) -> T:
        """Drive a pull parser of `wire` with the bytes of this stream; errors get section and offset."""
        started = self.offset
        try:
            need = next(parser)
            while True:
                need = parser.send(await (self.read_exactly(need) if need > 0 else self.look_at(-need)))
        except StopIteration as done:
            return cast(T, done.value)
        except RemoteProtocolError as error:
            self._locate(error, started)
            raise

    def located(self, error: MigratedError | OSError) -> MigratedError:
        """Return the error with its place in the stream, where the stream has to do with it."""
        match error:
            case RemoteProtocolError():
                self._locate(error, self.offset)
                return error
            case ChannelError() | SectionError() | WorkloadError():
                where = f"section {self.section}, stream offset {self.offset:#x}"
                return MigratedError(f"{error} ({where})", error_id=error.error_id)
            case MigratedError():
                return error
            case _:
                return MigratedError(str(error), error_id="host-io")

    def _locate(self, error: RemoteProtocolError, offset: int) -> None:
        error.section = error.section or self.section
        if error.offset is None:
            error.offset = offset

    def close(self) -> None:
        """Let go of the buffer; nothing can be read any more. Twice does no harm."""
        self._view = self._other = memoryview(b"")
        self._start = self._end = 0

    # -- the contract's gets -----------------------------------------------------------------------------------

    async def get_be8(self) -> int:
        return (await self.read_exactly(1))[0]

    async def get_be16(self) -> int:
        return int(struct.unpack(">H", await self.read_exactly(2))[0])

    async def get_be32(self) -> int:
        return int(struct.unpack(">I", await self.read_exactly(4))[0])

    async def get_be64(self) -> int:
        return int(struct.unpack(">Q", await self.read_exactly(8))[0])

    async def get_buffer(self, count: int) -> bytes:
        """Return exactly ``count`` bytes; memory grows with what has arrived, not with what was promised."""
        if count <= PIECE_MAX_BYTES:
            return await self.read_exactly(count)
        body = bytearray()
        while len(body) < count:
            body += await self.read_exactly(min(PIECE_MAX_BYTES, count - len(body)))
        return bytes(body)

    async def get_counted_string(self) -> str:
        return await self.run(parse_counted_string())


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address

"""The return path: what the destination says to the source on the same socket.

The rule of the file: the reader never decides what an end of the connection means; whoever waits for the answer does.
Before the last byte a broken return path ends the migration (the source goes on), after it the outcome is unknown.

Peer detection (a peer extension that needs nothing of a QEMU): the source sends PING with a magic value, then PING 1.
Both kinds of peer echo both; a `migrated` daemon sends a PONG with another magic value in between, unasked. PONG 1
ends the detection, so no timer is involved.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from migrated.errors import ChannelClosed, ChannelTimeout, MigratedError, PeerRefused, RemoteProtocolError
from migrated.stream.incoming import IncomingStream
from migrated.transport.channel import Channel
from migrated.wire.command import PEER_PONG
from migrated.wire.return_path import (
    Pong,
    Reason,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnMessage,
    Shut,
    SwitchoverAck,
    encode_pong,
    encode_reason,
    encode_shut,
    parse_message,
)

FIRST_PING = 1
#: Sent behind the START sections.
SETUP_PING = 2


class PeerKind(StrEnum):
    """Who is at the other end."""

    UNKNOWN = "unknown"
    MIGRATED = "migrated"
    QEMU = "qemu"
    FILE = "file"


class ReturnPathReader:
    """The source's end: reads messages until the connection ends; `answer` resolves with SHUT's status."""

    def __init__(self, stream: IncomingStream) -> None:
        self._stream = stream
        self.kind: asyncio.Future[PeerKind] = asyncio.get_running_loop().create_future()
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.setup_loaded = asyncio.Event()
        """Set once the destination has read the START sections: its blocks are there, and fit."""
        self._greeted = False
        self._reason = ""

    async def read(self) -> None:
        """Read until SHUT or the end; failures land in `kind` and `answer`, never here."""
        try:
            while not self.answer.done():
                await self._stream.wait_for_element()
                self._take(await self._stream.run(parse_message()))
        except RemoteProtocolError as error:
            # The end of the stream is a close; anything else is a destination that talks nonsense.
            closed = error.found == "end of stream"
            self._fail(ChannelClosed("the destination closed the connection") if closed else error)
        except MigratedError as error:
            self._fail(error)

    async def watch(self) -> None:
        """Raise as soon as the destination gives up. Cancel this before the last byte: then an answer is expected."""
        await asyncio.shield(self.answer)
        raise self.refusal() or PeerRefused("the destination ended the migration before it had everything")

    def _take(self, message: ReturnMessage) -> None:
        match message:
            case Shut(status=status):
                self.answer.set_result(status)
                if not self.kind.done():
                    self.kind.set_exception(self.refusal() or ChannelClosed("the destination refused the stream"))
            case Pong(value=value):
                self._greeted |= value == PEER_PONG
                if value == FIRST_PING and not self.kind.done():
                    self.kind.set_result(PeerKind.MIGRATED if self._greeted else PeerKind.QEMU)
                if value == SETUP_PING:
                    self.setup_loaded.set()
            case Reason(text=text):
                self._reason = text
            case RequestPages() | ReceivedBitmap() | ResumeAck() | SwitchoverAck():
                raise RemoteProtocolError(
                    f"{type(message).__name__} belongs to a feature that is not on", section="return path"
                )

    def _fail(self, error: MigratedError) -> None:
        refusal = self.refusal()
        for future in (self.kind, self.answer):
            if not future.done():
                future.set_exception(refusal or error)
                future.exception()  # whoever waits gets it; nobody waiting is no fault

    def refusal(self) -> PeerRefused | None:
        """Return what a destination said before it gave up, if it said anything."""
        return PeerRefused(f"the destination refused: {self._reason}") if self._reason else None

    async def wait_kind(self, timeout_s: float) -> PeerKind:
        """Wait for the end of peer detection. Raises ChannelTimeout, ChannelClosed, PeerRefused."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.kind)
        except TimeoutError as error:
            raise ChannelTimeout(f"no PONG within {timeout_s:g} s", phase="detecting the peer") from error

    async def wait_setup_loaded(self, timeout_s: float) -> None:
        """Wait until the destination has taken the START sections; it may have to wait for its workload first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.setup_loaded.wait()
        except TimeoutError as error:
            raise ChannelTimeout(f"no PONG within {timeout_s:g} s", phase="the destination sets up") from error


class ReturnPathWriter:
    """The destination's end."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.peer = PeerKind.UNKNOWN
        self.opened = False

    async def pong(self, value: int) -> None:
        """Echo a PING."""
        await self._channel.send(encode_pong(value))

    async def greet(self) -> None:
        """Show a `migrated` source that this is one, too."""
        self.peer = PeerKind.MIGRATED
        await self._channel.send(encode_pong(PEER_PONG))

    async def shut(self, status: int, reason: str = "") -> None:
        """Send the last message; a reason goes first where the source can read it."""
        if not self.opened:
            return
        if reason and self.peer is PeerKind.MIGRATED:
            await self._channel.send(encode_reason(reason))
        await self._channel.send(encode_shut(status))

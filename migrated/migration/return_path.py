"""The return path: what the destination says to the source on the same socket.

The rule of the file: the reader never decides what an end of the connection means; whoever waits for the answer does.
Before the last byte a broken return path ends the migration (the source goes on), after it the outcome is unknown.

Peer detection (a peer extension that needs nothing of a QEMU): the source sends PING with a magic value, then PING 1.
Both kinds of peer echo both; a `migrated` daemon sends two more in between, unasked: one with another magic value, and
one that says what it understands. PONG 1 ends the detection, so no timer is involved.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum

from migrated.errors import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    MigratedError,
    PeerRefused,
    RemoteProtocolError,
)
from migrated.model.faults import FaultFigures, FaultSummary
from migrated.stream.incoming import IncomingStream
from migrated.transport.channel import Channel, SocketChannel
from migrated.wire.command import (
    FEATURE_HANDOVER,
    FEATURE_PREFLIGHT,
    PEER_FEATURES,
    PEER_FEATURES_MASK,
    PEER_PONG,
)
from migrated.wire.handover import Answer, HandoverAnswer, Offer
from migrated.wire.preflight import ANSWER_MAX_BYTES, Pieces, answer_pieces, parse_answer
from migrated.wire.preflight import Answer as PreflightAnswer
from migrated.wire.return_path import (
    Faults,
    Pong,
    PreflightPiece,
    Reason,
    ReceivedBitmap,
    RequestPages,
    ResumeAck,
    ReturnMessage,
    Shut,
    SwitchoverAck,
    encode_faults,
    encode_handover_answer,
    encode_pong,
    encode_preflight,
    encode_reason,
    encode_received_bitmap,
    encode_request_pages,
    encode_resume_ack,
    encode_shut,
    parse_bitmap_body,
    parse_message,
    parse_request,
)

#: What a `migrated` destination of this version understands.
FEATURES = FEATURE_HANDOVER | FEATURE_PREFLIGHT

FIRST_PING = 1
#: Sent behind the START sections; in postcopy once more before the package, as QEMU does, where nobody waits for it.
SETUP_PING = 2
#: The last element but one of a postcopy package: its PONG means that the devices are loaded.
DEVICES_PING = 3
#: Behind the package.
PACKAGE_PING = 4


#: Behind the pages that are dropped while the machine still runs.
DISCARDED_PING = 5

#: What a recovery waits for.
BITMAPS, RESUMED = "bitmaps", "resumed"
#: What a hand-over waits for: READY, and then ACTIVE or REFUSED.
READY, SETTLED = "ready", "settled"
PREFLIGHTED = "preflighted"


class PeerKind(StrEnum):
    """Who is at the other end."""

    UNKNOWN = "unknown"
    MIGRATED = "migrated"
    QEMU = "qemu"
    FILE = "file"


class ReturnPathReader:
    """The source's end: reads messages until the connection ends; `answer` resolves with SHUT's status.

    ``on_request(block, start, length)`` takes the pages that a destination in postcopy waits for, ``on_faults`` what it
    has counted so far.
    """

    def __init__(
        self,
        stream: IncomingStream,
        on_request: Callable[[str | None, int, int], None],
        on_faults: Callable[[FaultSummary], None],
    ) -> None:
        self._stream = stream
        self._on_request = on_request
        self._on_faults = on_faults
        self.kind: asyncio.Future[PeerKind] = asyncio.get_running_loop().create_future()
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ended = False
        self._heard: dict[str | int, asyncio.Future[None]] = defaultdict(asyncio.get_running_loop().create_future)
        """What somebody may wait for: PONGs by their value, the rest by name. Cancelled at the end."""
        self._bitmap_pages: Mapping[str, int] = {}
        self._bitmaps: dict[str, bytes] = {}
        self._preflight = Pieces(ANSWER_MAX_BYTES)
        self._preflight_answer: PreflightAnswer | None = None
        self._greeted = False
        self.features = 0
        """What a `migrated` destination understands besides (FEATURE_...)."""
        self._reason = ""
        self._answers: dict[str, HandoverAnswer] = {}

    async def read(self) -> None:
        """Read until SHUT or the end; failures land in `kind` and `answer`, never here."""
        try:
            while not self.answer.done():
                await self._stream.take_at_once(self._take_requests)
                await self._take(await self._stream.run(parse_message()))
        except RemoteProtocolError as error:
            # The end of the stream is a close; anything else is a destination that talks nonsense.
            closed = error.found == "end of stream"
            self._fail(ChannelClosed("the destination closed the connection") if closed else error)
        except MigratedError as error:
            self._fail(error)
        finally:
            self._ended = True
            for heard in self._heard.values():
                heard.cancel()

    async def watch(self) -> None:
        """Raise as soon as the destination gives up. Cancel this before the last byte: then an answer is expected."""
        await asyncio.shield(self.answer)
        raise self.refusal() or PeerRefused("the destination ended the migration before it had everything")

    async def watch_link(self) -> None:
        """Return when the destination has said its last word; raise as soon as it cannot say it any more."""
        await asyncio.shield(self.answer)

    def _take_requests(self, buf: memoryview) -> int:
        """Pass on the requests that ``buf`` begins with; somebody waits for each of them."""
        taken = 0
        while (request := parse_request(buf, taken)) is not None:
            start, length, block, taken = request
            self._on_request(block, start, length)
        return taken

    async def _take(self, message: ReturnMessage) -> None:
        match message:
            case Shut(status=status):
                self.answer.set_result(status)
                if not self.kind.done():
                    self.kind.set_exception(self.refusal() or ChannelClosed("the destination refused the stream"))
                    self.kind.exception()  # whoever waits gets it; nobody waiting is no fault
            case Pong(value=value):
                self._take_pong(value)
            case Reason(text=text):
                self._reason = text
            case RequestPages(start=start, length=length, block=block):
                self._on_request(block, start, length)
            case PreflightPiece(body=body):
                self._take_preflight(body)
            case Faults(words=words):
                self._on_faults(FaultSummary.from_words(words))
            case ReceivedBitmap(block=block):
                await self._take_bitmap(block)
            case ResumeAck(value=value):
                self._take_resume_ack(value)
            case HandoverAnswer(answer=answer):
                what = READY if answer is Answer.READY else SETTLED
                self._answers[what] = message
                self._hear(what)
            case SwitchoverAck():
                raise RemoteProtocolError(
                    f"{type(message).__name__} belongs to a feature that is not on", section="return path"
                )

    def _take_pong(self, value: int) -> None:
        self._greeted |= value == PEER_PONG
        if value & PEER_FEATURES_MASK == PEER_FEATURES:
            self.features = value & ~PEER_FEATURES_MASK
        if value == FIRST_PING and not self.kind.done():
            self.kind.set_result(PeerKind.MIGRATED if self._greeted else PeerKind.QEMU)
        self._hear(value)

    def _take_resume_ack(self, value: int) -> None:
        if value != 1:
            raise RemoteProtocolError(f"RESUME_ACK with value {value}", section="return path", expected="1")
        self._hear(RESUMED)

    def _take_preflight(self, body: bytes) -> None:
        if (raw := self._preflight.take(body)) is not None:
            self._preflight_answer = parse_answer(raw)
            self._hear(PREFLIGHTED)

    async def _take_bitmap(self, block: str) -> None:
        if block not in self._bitmap_pages or block in self._bitmaps:
            raise RemoteProtocolError(
                f"a received bitmap of block '{block}' that was not asked for", section="return path"
            )
        self._bitmaps[block] = await self._stream.run(parse_bitmap_body(block, self._bitmap_pages[block]))
        if len(self._bitmaps) == len(self._bitmap_pages):
            self._hear(BITMAPS)

    def _hear(self, what: str | int) -> None:
        if not self._heard[what].done():
            self._heard[what].set_result(None)

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

    async def wait_pong(self, value: int, timeout_s: float, phase: str) -> None:
        """Wait for the echo of a PING. Raises ChannelTimeout, or what ended the return path."""
        await self._wait(value, timeout_s, f"no PONG within {timeout_s:g} s", phase)

    async def wait_bitmaps(
        self, pages: Mapping[str, int], ask: Callable[[], Awaitable[None]], timeout_s: float
    ) -> Mapping[str, bytes]:
        """Ask for the received bitmaps of blocks (name -> number of pages) and wait for all of them."""
        self._bitmap_pages = pages
        await ask()
        if pages:
            missing = f"not all received bitmaps within {timeout_s:g} s"
            await self._wait(BITMAPS, timeout_s, missing, "recovering")
        return self._bitmaps

    async def wait_preflight(self, timeout_s: float) -> PreflightAnswer:
        """Wait for what the destination says to a preflight."""
        await self._wait(PREFLIGHTED, timeout_s, f"no answer within {timeout_s:g} s", "asking the destination")
        assert self._preflight_answer is not None
        return self._preflight_answer

    async def wait_resumed(self, timeout_s: float) -> None:
        """Wait for RESUME_ACK."""
        await self._wait(RESUMED, timeout_s, f"no RESUME_ACK within {timeout_s:g} s", "recovering")

    async def wait_ready(self, migration_id: str, timeout_s: float) -> Offer:
        """Wait until everything is at the other end, on its disk as well; return the offer as it was taken down.

        Raises PeerRefused, ChannelError.
        """
        await self._wait(READY, timeout_s, f"not ready within {timeout_s:g} s", "the destination checks what it has")
        return self._answer_for(READY, migration_id).offer

    async def wait_settled(self, migration_id: str, timeout_s: float) -> Answer:
        """Wait for the answer to a commit. Raises PeerRefused for a destination that could not start the machine."""
        await self._wait(SETTLED, timeout_s, f"no answer within {timeout_s:g} s", "the destination takes over")
        return self._answer_for(SETTLED, migration_id).answer

    def _answer_for(self, what: str, migration_id: str) -> HandoverAnswer:
        answer = self._answers[what]
        if answer.offer.migration_id != migration_id:
            raise RemoteProtocolError(
                f"{answer.answer.name} for another migration", section="return path", expected=migration_id,
                found=answer.offer.migration_id,
            )  # fmt: skip
        return answer

    async def _wait(self, what: str | int, timeout_s: float, text: str, phase: str) -> None:
        """Wait for a message or the end of the return path, whichever is first."""
        heard = self._heard[what]
        if not (self._ended or heard.done()):
            await asyncio.wait([heard], timeout=timeout_s)
        if heard.done() and not heard.cancelled():
            return
        if not self._ended:
            raise ChannelTimeout(text, phase=phase)
        await asyncio.shield(self.answer)
        raise self.refusal() or PeerRefused("the destination ended the migration before it had everything")


class ReturnPathWriter:
    """The destination's end. Messages keep their order, whoever sends them."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._turn = asyncio.Lock()
        self._last_block = ""
        self._requests = bytearray()
        self._requested = asyncio.Event()
        self.peer = PeerKind.UNKNOWN
        self.opened = False

    def reconnect(self, channel: Channel) -> None:
        """Go on with another connection; nobody remembers the last block any more."""
        self._channel = channel
        self._last_block = ""
        self._requests.clear()

    async def pong(self, value: int) -> None:
        """Echo a PING."""
        await self._send(encode_pong(value))

    async def greet(self) -> None:
        """Show a `migrated` source that this is one, too."""
        self.peer = PeerKind.MIGRATED
        await self._send(encode_pong(PEER_PONG) + encode_pong(PEER_FEATURES | FEATURES))

    def request_pages(self, block: str, start: int, length: int) -> None:
        """Ask for pages that somebody waits for, at once; what does not go now, `deliver` sends."""
        name = None if block == self._last_block else block
        self._last_block = block
        self._requests += encode_request_pages(start, length, name)
        if self._turn.locked() or not self._sent_now():
            self._requested.set()

    def _sent_now(self) -> bool:
        if not isinstance(self._channel, SocketChannel):
            return False
        try:
            del self._requests[: self._channel.send_now(self._requests)]
        except ChannelError:
            return False  # `deliver` meets it as well
        return not self._requests

    async def deliver(self) -> None:
        """Send requests that did not go at once, until this is cancelled. Raises ChannelError."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            async with self._turn:
                await self._send_requests()

    async def _send_requests(self) -> None:
        # The first of them may have gone in part: nothing comes in between.
        requests, self._requests = self._requests, bytearray()
        if requests:
            await self._channel.send(requests)

    async def handover(self, answer: Answer, offer: Offer) -> None:
        """Say what has become of an offer."""
        await self._send(encode_handover_answer(HandoverAnswer(answer, offer)))

    async def received_bitmap(self, block: str, bitmap: bytes) -> None:
        """Say what has arrived of a block."""
        await self._send(encode_received_bitmap(block, bitmap))

    async def faults(self, figures: FaultFigures | None) -> None:
        """Tell a `migrated` source what faults have cost so far."""
        if figures is not None and self.peer is PeerKind.MIGRATED:
            await self._send(encode_faults(figures.summary().to_words()))

    async def preflight(self, answer: PreflightAnswer) -> None:
        """Say what stands in the way of the migration."""
        for piece in answer_pieces(answer):
            await self._send(encode_preflight(piece))

    async def resumed(self) -> None:
        """Say that postcopy goes on."""
        await self._send(encode_resume_ack())

    async def shut(self, status: int, reason: str = "") -> None:
        """Send the last message; a reason goes first where the source can read it."""
        if not self.opened:
            return
        if reason and self.peer is PeerKind.MIGRATED:
            await self._send(encode_reason(reason))
        await self._send(encode_shut(status))

    async def _send(self, message: bytes) -> None:
        async with self._turn:
            await self._send_requests()
            await self._channel.send(message)

"""What is taken, and sent, at once: between elements, in order, and never a part of one without the rest."""

from __future__ import annotations

import asyncio
import socket

import pytest

from migrated.errors import RemoteProtocolError
from migrated.model.stats import BandwidthMeter
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel, SocketChannel
from tests.support.channel import memory_pair


def channels() -> tuple[SocketChannel, SocketChannel]:
    near, far = socket.socketpair()
    return SocketChannel(near, "far"), SocketChannel(far, "near")


def reader(channel: Channel) -> IncomingStream:
    return IncomingStream(channel, silence_timeout_s=lambda: 5.0)


def words(taken: list[bytes]) -> object:
    """Return a taker of words of four bytes that end with a dot."""

    def take(buf: memoryview) -> int:
        used = 0
        while len(buf) >= used + 4 and buf[used + 3] == ord("."):
            taken.append(bytes(buf[used : used + 4]))
            used += 4
        return used

    return take


@pytest.mark.parametrize("kind", ["socket", "memory"])
async def test_everything_is_taken_up_to_what_is_something_else(kind: str) -> None:
    near: Channel
    far: Channel
    near, far = channels() if kind == "socket" else memory_pair()
    stream, taken = reader(near), list[bytes]()
    taking = asyncio.create_task(stream.take_at_once(words(taken)))  # type: ignore[arg-type]
    await far.send(b"one.two.")
    while len(taken) < 2:
        await asyncio.sleep(0)
    assert not taking.done()
    await far.send(b"six.te")
    await taking
    assert taken == [b"one.", b"two.", b"six."]
    assert bytes(stream.peek()) == b"te"
    assert stream.offset == 12
    # The caller reads on, in its own time; then whole ones are taken again.
    await far.send(b"n!one.")
    assert await stream.read_exactly(4) == b"ten!"
    taking = asyncio.create_task(stream.take_at_once(words(taken)))  # type: ignore[arg-type]
    while len(taken) < 4:
        await asyncio.sleep(0)
    far.shutdown_write()
    with pytest.raises(RemoteProtocolError, match="the stream ends too early"):
        await taking
    await near.close()
    await far.close()


async def test_a_stream_that_cannot_send_at_once_keeps_it_for_drain() -> None:
    near, far = memory_pair()
    f = OutgoingStream(near, BandwidthMeter())
    assert not f.send_now(b"now")
    await f.drain()
    assert bytes(near.sent) == b"now"
    assert (f.position, far.bytes_received) == (3, 0)


async def test_what_does_not_go_at_once_stays_in_front() -> None:
    near, far = channels()
    sent = 0

    def account(count: int) -> None:
        nonlocal sent
        sent += count

    f = OutgoingStream(near, BandwidthMeter(), on_sent=account)
    assert f.send_now(b"first")
    piece = bytes(1 << 20)
    total = 5
    while f.send_now(piece):
        total += len(piece)
    total += len(piece)
    assert not f.send_now(b"last")
    assert sent < total < f.position
    body = bytearray(total + 4)
    view, got = memoryview(body), 0
    draining = asyncio.create_task(f.drain())
    while got < len(body):
        got += await far.receive_into(view[got:], deadline_s=30)
    await draining
    assert (body[:5], body[-4:], sent) == (b"first", b"last", len(body))
    await near.close()
    await far.close()


async def test_nothing_comes_between_the_parts_of_what_is_being_sent() -> None:
    near, far = channels()
    f = OutgoingStream(near, BandwidthMeter())
    sending = asyncio.create_task(f.send(bytes(8 << 20)))
    while not near.bytes_sent:
        await asyncio.sleep(0)
    assert not f.send_now(b"!")
    body = memoryview(bytearray((8 << 20) + 1))
    got = 0
    while got < len(body) - 1:
        got += await far.receive_into(body[got:], deadline_s=30)
    await sending
    await f.drain()
    assert await far.receive_into(body[got:], deadline_s=30) == 1
    assert bytes(body[-1:]) == b"!"
    await near.close()
    await far.close()

"""The socket channel: bytes arrive, ends are told apart, deadlines hold, both directions work at once."""

from __future__ import annotations

import asyncio
import random
import select
import socket
from collections.abc import Callable

import pytest

from migrated.errors import ChannelClosed, ChannelTimeout
from migrated.transport.channel import SILENCE_TIMEOUT_S, USER_TIMEOUT_FACTOR, Channel, SocketChannel
from tests.unit.transport.carriers import channels, open_fds, tcp_pair, unix_pair, until

Pair = Callable[[], tuple[socket.socket, socket.socket]]
PAIRS = [pytest.param(tcp_pair, id="tcp"), pytest.param(unix_pair, id="unix")]


async def receive_exactly(channel: Channel, count: int) -> bytes:
    body = bytearray(count)
    view, got = memoryview(body), 0
    while got < count:
        piece = await channel.receive_into(view[got:], deadline_s=30)
        assert piece, f"ended after {got} of {count} bytes"
        got += piece
    return bytes(body)


@pytest.mark.parametrize("pair", PAIRS)
async def test_both_directions_at_once_with_back_pressure(pair: Pair) -> None:
    near, far = channels(pair())
    there, back = random.randbytes(12 << 20), random.randbytes(9 << 20)

    async def send(channel: SocketChannel, body: bytes) -> None:
        view = memoryview(body)
        for start in range(0, len(body), 3 << 20):
            await channel.send(view[start : start + (3 << 20)])

    async with asyncio.TaskGroup() as group:
        group.create_task(send(near, there))
        group.create_task(send(far, back))
        arrived = group.create_task(receive_exactly(far, len(there)))
        returned = group.create_task(receive_exactly(near, len(back)))
    assert (arrived.result(), returned.result()) == (there, back)
    assert (near.bytes_sent, near.bytes_received) == (len(there), len(back))
    assert (far.bytes_sent, far.bytes_received) == (len(back), len(there))
    await near.close()
    await far.close()


@pytest.mark.parametrize("pair", PAIRS)
async def test_an_orderly_end_is_zero_and_the_other_direction_goes_on(pair: Pair) -> None:
    near, far = channels(pair())
    await near.send(b"last words")
    near.shutdown_write()
    near.shutdown_write()
    assert await receive_exactly(far, 10) == b"last words"
    assert await far.receive_into(memoryview(bytearray(1))) == 0
    await far.send(b"answer")
    await far.close()
    assert await receive_exactly(near, 6) == b"answer"
    assert await near.receive_into(memoryview(bytearray(1))) == 0
    await near.close()


async def test_close_delivers_what_was_sent_although_input_was_left_unread() -> None:
    near, far = channels(tcp_pair())
    await near.send(b"nobody reads this")
    await until(lambda: select.select([far._sock], [], [], 0)[0])
    await far.send(b"SHUT")
    await far.close()
    assert await receive_exactly(near, 4) == b"SHUT"
    assert await near.receive_into(memoryview(bytearray(1))) == 0
    await near.close()


async def test_a_reset_is_not_an_end() -> None:
    near, far = channels(tcp_pair())
    far.abort()
    far.abort()
    with pytest.raises(ChannelClosed, match=r"Unable to read from socket: Connection reset by peer \(peer far"):
        await near.receive_into(memoryview(bytearray(1)))
    await near.close()


async def test_sending_to_a_peer_that_reset_is_channel_closed() -> None:
    near, far = channels(tcp_pair())
    far.abort()
    with pytest.raises(ChannelClosed, match=r"Unable to write to socket: (Connection reset by peer|Broken pipe)"):
        await near.send(bytes(64 << 20))
    await near.close()


@pytest.mark.parametrize("pair", PAIRS)
async def test_a_silent_peer_runs_into_the_deadline(pair: Pair) -> None:
    near, far = channels(pair())
    with pytest.raises(ChannelTimeout, match=r"the peer sent nothing for 0\.02 s \(peer far, while receiving\)"):
        await near.receive_into(memoryview(bytearray(1)), deadline_s=0.02)
    await far.send(b"late")
    assert await receive_exactly(near, 4) == b"late"
    await near.close()
    await far.close()


@pytest.mark.parametrize("pair", PAIRS)
async def test_a_peer_that_takes_nothing_runs_into_the_deadline(pair: Pair) -> None:
    near, far = channels(pair())
    near.silence_timeout_s = 0.05
    with pytest.raises(ChannelTimeout, match=r"the peer took no byte for 0\.05 s \(peer far, while sending\)"):
        await near.send(bytes(64 << 20))
    assert 0 < near.bytes_sent < 64 << 20
    near.abort()
    await far.close()


async def test_progress_renews_the_deadline() -> None:
    near, far = channels(unix_pair())
    near.silence_timeout_s = 1.0
    body = bytes(2 << 20)

    async def sip() -> int:
        got, view = 0, memoryview(bytearray(64 << 10))
        while got < len(body):
            await asyncio.sleep(0.04)  # a slow peer, not a synchronisation
            got += await far.receive_into(view, deadline_s=30)
        return got

    async with asyncio.TaskGroup() as group:
        group.create_task(near.send(body))
        group.create_task(sip())
    await near.close()
    await far.close()


async def test_close_and_abort_end_those_who_wait() -> None:
    for end in ("close", "abort"):
        near, far = channels(tcp_pair())
        receiving = asyncio.ensure_future(near.receive_into(memoryview(bytearray(1))))
        sending = asyncio.ensure_future(near.send(bytes(64 << 20)))
        await asyncio.wait([sending], timeout=0.01)
        near.abort() if end == "abort" else await near.close()
        for waiting in (receiving, sending):
            with pytest.raises(ChannelClosed, match="closed at this end"):
                await waiting
        with pytest.raises(ChannelClosed, match="closed at this end"):
            await near.send(b"x")
        with pytest.raises(ChannelClosed, match="closed at this end"):
            await near.receive_into(memoryview(bytearray(1)))
        near.shutdown_write()
        near.silence_timeout_s = 1
        await near.close()
        near.abort()
        await far.close()


async def test_a_cancelled_receive_loses_nothing() -> None:
    near, far = channels(tcp_pair())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await near.receive_into(memoryview(bytearray(1)))
    await far.send(b"all of it")
    assert await receive_exactly(near, 9) == b"all of it"
    await near.close()
    await far.close()


async def test_two_receivers_of_one_channel_are_a_bug_that_is_told() -> None:
    near, far = channels(unix_pair())
    first = asyncio.ensure_future(near.receive_into(memoryview(bytearray(1))))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two tasks"):
        await near.receive_into(memoryview(bytearray(1)))
    await far.send(b"x")
    assert await first == 1
    await near.close()
    await far.close()


async def test_a_fast_peer_does_not_keep_the_loop_to_itself() -> None:
    near, far = channels(unix_pair())
    turns = 0

    async def bystander() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(bystander())
        sending = group.create_task(near.send(bytes(32 << 20)))
        await receive_exactly(far, 32 << 20)
        await sending
        watching.cancel()
    assert turns >= 32
    await near.close()
    await far.close()


async def test_tcp_options() -> None:
    near, far = channels(tcp_pair())
    sock = near._sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    expected = int(USER_TIMEOUT_FACTOR * SILENCE_TIMEOUT_S * 1000)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == expected
    near.silence_timeout_s = 2
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_FACTOR * 2000
    await near.close()
    await far.close()


async def test_nothing_is_left_open() -> None:
    async def use() -> None:
        near, far = channels(tcp_pair())
        await near.send(b"x")
        await receive_exactly(far, 1)
        await near.close()
        far.abort()

    await use()
    before = open_fds()
    for _ in range(5):
        await use()
    assert open_fds() == before


@pytest.mark.parametrize("pair", PAIRS)
async def test_what_is_taken_where_it_arrives_wakes_nobody(pair: Pair) -> None:
    near, far = channels(pair())
    view, taken = memoryview(bytearray(8)), bytearray()

    def take(count: int) -> bool:
        taken.extend(view[:count])
        return not taken.endswith(b"!")

    receiving = asyncio.create_task(near.receive_at_once(view, take))
    for word in (b"one ", b"two ", b"three"):
        before = len(taken)
        await far.send(word)
        await until(lambda before=before: len(taken) > before)  # type: ignore[misc]
        assert not receiving.done()
    await far.send(b"!")
    assert await receiving == 1
    assert bytes(taken) == b"one two three!"
    assert near.bytes_received == len(taken)
    # What was left is the caller's; the next receive begins behind it.
    await far.send(b"next")
    assert await receive_exactly(near, 4) == b"next"
    await near.close()
    await far.close()


@pytest.mark.parametrize("pair", PAIRS)
async def test_ends_and_errors_of_taking_are_the_waiter_s(pair: Pair) -> None:
    near, far = channels(pair())

    def refuse(count: int) -> bool:
        raise ValueError(f"{count} bytes too many")

    await far.send(b"xy")
    with pytest.raises(ValueError, match="2 bytes too many"):
        await near.receive_at_once(memoryview(bytearray(8)), refuse)
    with pytest.raises(ChannelTimeout, match=r"the peer sent nothing for 0\.02 s"):
        await near.receive_at_once(memoryview(bytearray(8)), refuse, deadline_s=0.02)
    far.shutdown_write()
    assert await near.receive_at_once(memoryview(bytearray(8)), refuse) == 0
    await near.close()
    await far.close()


async def test_a_reset_while_taking_is_channel_closed() -> None:
    near, far = channels(tcp_pair())
    far.abort()
    with pytest.raises(ChannelClosed, match="Connection reset by peer"):
        await near.receive_at_once(memoryview(bytearray(8)), bool)
    await near.close()


async def test_what_is_taken_renews_the_deadline() -> None:
    near, far = channels(unix_pair())
    view, taken = memoryview(bytearray(1)), 0

    def take(count: int) -> bool:
        nonlocal taken
        taken += count
        return True

    async def drip() -> None:
        for _ in range(4):
            await far.send(b".")
            # Longer than half the deadline, and four times that is longer than it.
            await asyncio.wait([receiving], timeout=0.15)

    receiving = asyncio.create_task(near.receive_at_once(view, take, deadline_s=0.25))
    await drip()
    with pytest.raises(ChannelTimeout):
        await receiving
    assert taken == 4
    await near.close()
    await far.close()


@pytest.mark.parametrize("pair", PAIRS)
async def test_sending_now_goes_as_far_as_there_is_room(pair: Pair) -> None:
    near, far = channels(pair())
    assert near.send_now(b"at once") == 7
    assert await receive_exactly(far, 7) == b"at once"
    sent = 0
    while count := near.send_now(bytes(1 << 20)):
        sent += count
    assert near.bytes_sent == 7 + sent
    assert await receive_exactly(far, sent) == bytes(sent)
    far.abort()
    with pytest.raises(ChannelClosed, match="Unable to write to socket"):
        send_without_end(near)
    near.abort()


def send_without_end(channel: SocketChannel) -> None:
    while True:
        channel.send_now(bytes(1 << 20))

"""A connection as a thread uses it: all of it, in time, and an end to every wait."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from migrated.errors import ChannelClosed, ChannelTimeout, KernelError
from migrated.kernel.memory import create_memfd
from migrated.kernel.splice import PIPE_BYTES, Pipe
from migrated.transport.blocking import BlockingSocket, blocking
from migrated.transport.channel import SocketChannel
from migrated.transport.thread import in_own_thread
from migrated.transport.tls_channel import TlsChannel
from migrated.transport.trust import Trust
from tests.support.keys import Keys
from tests.unit.transport.carriers import open_fds, tcp_pair

Ends = tuple[SocketChannel, SocketChannel]


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    return Keys(Path(tmp_path_factory.mktemp("keys"))).trust("host")


@pytest.fixture(params=["cleartext", "tls"])
async def ends(request: pytest.FixtureRequest, trust: Trust) -> AsyncIterator[Ends]:
    """Both ends of one connection."""
    near, far = tcp_pair()
    pair: Ends
    if request.param == "tls":
        secured = TlsChannel(near, "far:1", trust, "127.0.0.1"), TlsChannel(far, "near:1", trust, None)
        await asyncio.gather(*(channel.authenticate() for channel in secured))
        pair = secured
    else:
        pair = SocketChannel(near, "far:1"), SocketChannel(far, "near:1")
    yield pair
    for channel in pair:
        channel.abort()


async def in_thread_of(channel: SocketChannel, work: Callable[[BlockingSocket], None]) -> None:
    end = blocking(channel)
    try:
        await in_own_thread(lambda: work(end), end.interrupt)
    finally:
        end.close()


async def test_all_of_it_arrives_and_the_channels_go_on_afterwards(ends: Ends) -> None:
    near, far = ends
    body, got = random.randbytes(3_000_017), bytearray(3_000_017)

    def send(end: BlockingSocket) -> None:
        end.send(memoryview(body))

    def receive(end: BlockingSocket) -> None:
        assert end.fill(memoryview(got)[:7], idle=True)
        assert end.fill(memoryview(got)[7:], idle=False)

    await asyncio.gather(in_thread_of(near, send), in_thread_of(far, receive))
    assert got == body
    assert near.bytes_sent == far.bytes_received == len(body)
    await near.send(b"more")
    more = bytearray(4)
    assert await far.receive_into(memoryview(more)) == 4
    near.shutdown_write()
    assert await far.receive_into(memoryview(more)) == 0


@pytest.fixture
def memfd() -> Iterator[tuple[int, bytes]]:
    """One with more than a pipe holds, and what is in it."""
    body = random.Random(1).randbytes(3 * PIPE_BYTES + 4096)
    fd = create_memfd("test", len(body))
    os.pwrite(fd, body, 0)
    yield fd, body
    os.close(fd)


@pytest.mark.parametrize("is_there", [True, False])
async def test_what_lies_in_a_file_is_sent_from_there_or_from_its_mapping(
    ends: Ends, memfd: tuple[int, bytes], is_there: bool
) -> None:
    near, far = ends
    fd, body = memfd[0] if is_there else os.open(os.devnull, os.O_RDONLY), memfd[1]
    got = bytearray(len(body) - 4096 + 4)

    def send(end: BlockingSocket) -> None:
        end.send(memoryview(b"head"), more=True)
        end.send_file(fd, 4096, memoryview(body)[4096:])

    def receive(end: BlockingSocket) -> None:
        assert end.fill(memoryview(got), idle=False)

    await asyncio.gather(in_thread_of(near, send), in_thread_of(far, receive))
    assert got == b"head" + body[4096:]
    assert near.bytes_sent == len(got)
    if not is_there:
        os.close(fd)


@pytest.mark.parametrize("ends", ["cleartext"], indirect=True)
async def test_what_comes_is_poured_through_a_pipe_into_a_file(ends: Ends, memfd: tuple[int, bytes]) -> None:
    near, far = ends
    fd, body = create_memfd("poured", len(memfd[1]) + 8192), memfd[1]
    before, pieces = open_fds(), []

    def receive(end: BlockingSocket) -> None:
        assert end.pours
        pipe = Pipe()

        def put(at: int, count: int) -> None:
            pieces.append(count)
            pipe.empty_into(fd, 8192 + at, count)

        end.pour(len(body), pipe.entrance, put)
        pipe.close()

    await asyncio.gather(in_thread_of(near, lambda end: end.send(memoryview(body))), in_thread_of(far, receive))
    assert os.pread(fd, len(body) + 8192, 0) == bytes(8192) + body
    assert sum(pieces) == far.bytes_received == len(body)
    assert open_fds() == before
    os.close(fd)


@pytest.mark.parametrize("ends", ["tls"], indirect=True)
async def test_what_has_to_be_decrypted_is_not_poured(ends: Ends) -> None:
    end = blocking(ends[1])
    assert not end.pours
    end.close()


@pytest.mark.parametrize("ends", ["cleartext"], indirect=True)
async def test_a_pour_ends_as_any_other_wait_does(ends: Ends) -> None:
    near, far = ends
    far.silence_timeout_s = 0.02
    pipe, came = Pipe(), 0

    def put(at: int, count: int) -> None:
        nonlocal came
        assert at == came
        came += count

    def receive(end: BlockingSocket) -> None:
        with pytest.raises(ChannelTimeout, match=r"the peer sent nothing for 0\.02 s"):
            end.pour(10, pipe.entrance, put)
        near.abort()
        with pytest.raises(ChannelClosed):
            end.pour(10, pipe.entrance, put)

    await near.send(b"1234")
    await in_thread_of(far, receive)
    assert came == 4
    with pytest.raises(KernelError, match="splice: EBADF"):
        pipe.empty_into(-1, 0, 1)
    pipe.close()


async def test_an_end_is_one_in_order_only_between_two_packets(ends: Ends) -> None:
    near, far = ends
    room = bytearray(4)
    await near.send(b"12")
    near.shutdown_write()

    def receive(end: BlockingSocket) -> None:
        assert end.fill(memoryview(room)[:2], idle=True)
        assert not end.fill(memoryview(room), idle=True)
        with pytest.raises(ChannelClosed, match="it ended within a packet"):
            end.fill(memoryview(room), idle=False)

    await in_thread_of(far, receive)


async def test_silence_between_packets_is_none_and_within_one_it_is(ends: Ends) -> None:
    near, far = ends
    far.silence_timeout_s = 0.02
    room = bytearray(4)
    idle = asyncio.Event()
    loop = asyncio.get_running_loop()

    def receive(end: BlockingSocket) -> None:
        loop.call_soon_threadsafe(idle.set)
        assert end.fill(memoryview(room)[:2], idle=True)
        with pytest.raises(ChannelTimeout, match=r"the peer sent nothing for 0\.02 s"):
            end.fill(memoryview(room), idle=False)

    receiving = asyncio.create_task(in_thread_of(far, receive))
    await idle.wait()
    await asyncio.sleep(5 * far.silence_timeout_s)
    await near.send(b"12")
    await receiving


async def test_a_peer_that_takes_nothing(ends: Ends) -> None:
    near, _ = ends
    near.silence_timeout_s = 0.05
    fd = create_memfd("sent", 64 << 20)

    def send(end: BlockingSocket) -> None:
        for call in (end.send, partial(end.send_file, fd, 0)):
            with pytest.raises(ChannelTimeout, match=r"the peer took no byte for 0\.05 s"):
                call(memoryview(bytes(64 << 20)))

    await in_thread_of(near, send)
    os.close(fd)


async def test_a_thread_that_waits_is_ended_with_its_task_and_leaves_nothing(ends: Ends) -> None:
    _, far = ends
    before = open_fds()
    waits = asyncio.Event()
    loop = asyncio.get_running_loop()
    said: list[str] = []

    def receive(end: BlockingSocket) -> None:
        loop.call_soon_threadsafe(waits.set)
        try:
            end.fill(memoryview(bytearray(1)), idle=True)
        except ChannelClosed as error:
            said.append(error.what)
            raise

    receiving = asyncio.create_task(in_thread_of(far, receive))
    await waits.wait()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert said == ["the channel was closed at this end"]
    assert open_fds() == before


async def test_a_connection_that_was_reset(ends: Ends) -> None:
    near, far = ends
    near.abort()

    def use(end: BlockingSocket) -> None:
        with pytest.raises(ChannelClosed):
            end.fill(memoryview(bytearray(1)), idle=False)
        with pytest.raises(ChannelClosed, match="Unable to write to socket"):
            end.send(memoryview(bytes(64 << 20)))

    await in_thread_of(far, use)


async def test_a_closed_channel_has_nothing_for_a_thread(ends: Ends) -> None:
    near, _ = ends
    near.abort()
    with pytest.raises(ChannelClosed, match="closed at this end"):
        blocking(near)


async def test_what_a_thread_raises_is_raised_where_it_is_waited_for() -> None:
    def work() -> None:
        os.stat("/nothing/is/here")

    with pytest.raises(FileNotFoundError):
        await in_own_thread(work, lambda: None)

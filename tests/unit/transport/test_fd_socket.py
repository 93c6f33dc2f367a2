"""Unix sockets with descriptors, on both socket types that are used."""

from __future__ import annotations

import asyncio
import fcntl
import grp
import os
import select
import socket
import stat
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migrated.errors import ChannelClosed, ChannelError, LocalProtocolError, RemoteProtocolError
from migrated.transport.fd_socket import MAX_CONNECTIONS, MAX_FDS, FdSocket, connect_unix, serve_unix
from tests.unit.transport.carriers import open_fds, until

KINDS = [
    pytest.param(socket.SOCK_STREAM, id="stream"),
    pytest.param(socket.SOCK_SEQPACKET, id="seqpacket"),
]


def pair(kind: socket.SocketKind) -> tuple[FdSocket, FdSocket]:
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    return FdSocket(left), FdSocket(right)


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


async def echo(connection: FdSocket) -> None:
    while True:
        data, fds = await connection.receive(1 << 16)
        if not data:
            return
        await connection.send(data, fds)
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
async def test_descriptors_travel_and_are_close_on_exec(kind: socket.SocketKind) -> None:
    left, right = pair(kind)
    sent = [memfd(b"one"), memfd(b"two")]
    await left.send(b"hello", sent)
    data, fds = await right.receive(100)
    assert data == b"hello"
    assert [os.pread(fd, 10, 0) for fd in fds] == [b"one", b"two"]
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
    for fd in (*sent, *fds):
        os.close(fd)
    left.close()
    assert await right.receive(100) == (b"", [])
    right.close()


async def test_seqpacket_keeps_packets_apart() -> None:
    left, right = pair(socket.SOCK_SEQPACKET)
    await left.send(b"one")
    await left.send(b"two")
    assert [(await right.receive(100))[0] for _ in range(2)] == [b"one", b"two"]
    left.close()
    right.close()


async def test_a_packet_too_long_is_refused_and_its_descriptors_are_closed() -> None:
    left, right = pair(socket.SOCK_SEQPACKET)
    fd = memfd(b"x")
    before = open_fds()
    await left.send(b"x" * 101, [fd])
    with pytest.raises(RemoteProtocolError, match="message too long, expected at most 100 bytes"):
        await right.receive(100)
    assert open_fds() == before
    await left.send(b"fits")
    assert await right.receive(100) == (b"fits", [])
    os.close(fd)
    left.close()
    right.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_too_many_descriptors_are_refused_and_closed(kind: socket.SocketKind) -> None:
    left, right = pair(kind)
    fd = memfd(b"x")
    before = open_fds()
    await left.send(b"x", [fd] * (MAX_FDS + 1))
    with pytest.raises(RemoteProtocolError, match="too many descriptors"):
        await right.receive(100)
    assert open_fds() == before
    await left.send(b"x", [fd] * MAX_FDS)
    _, fds = await right.receive(100)
    assert len(fds) == MAX_FDS
    for received in (fd, *fds):
        os.close(received)
    left.close()
    right.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_sender_waits_for_a_slow_receiver(kind: socket.SocketKind) -> None:
    left, right = pair(kind)
    fd = memfd(b"late")
    pieces = [bytes([number]) * 30000 for number in range(200)]

    async def send_all() -> None:
        for piece in pieces:
            await left.send(piece, [fd] if piece is pieces[-1] else [])
        left.close()

    got = bytearray()
    fds: list[int] = []
    async with asyncio.TaskGroup() as group:
        sender = group.create_task(send_all())
        await until(lambda: not select.select([], [left.sock], [], 0)[1])
        assert not sender.done()
        while (received := await right.receive(1 << 16))[0]:
            got += received[0]
            fds += received[1]
    assert bytes(got) == b"".join(pieces)
    assert [os.pread(each, 10, 0) for each in fds] == [b"late"]
    for each in (fd, *fds):
        os.close(each)
    right.close()


async def test_a_packet_larger_than_the_socket_can_ever_take_is_our_fault() -> None:
    left, right = pair(socket.SOCK_SEQPACKET)
    left.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with pytest.raises(LocalProtocolError, match="does not fit"):
        await left.send(b"x" * (1 << 20))
    left.close()
    right.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_peer_that_is_gone_is_channel_closed(kind: socket.SocketKind) -> None:
    left, right = pair(kind)
    right.close()
    with pytest.raises(ChannelClosed, match="sending failed"):
        await left.send(b"x")
    left.close()
    with pytest.raises(ChannelClosed, match="closed at this end"):
        await left.receive(1)
    with pytest.raises(ChannelClosed, match="closed at this end"):
        await left.send(b"x")


async def test_close_ends_a_waiting_receive() -> None:
    left, right = pair(socket.SOCK_STREAM)
    waiting = asyncio.ensure_future(left.receive(1))
    await asyncio.sleep(0)
    left.close()
    left.close()
    with pytest.raises(ChannelClosed, match="closed at this end"):
        await waiting
    right.close()


async def test_a_cancelled_receive_loses_nothing() -> None:
    left, right = pair(socket.SOCK_STREAM)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await right.receive(10)
    await left.send(b"still here")
    assert await right.receive(10) == (b"still here", [])
    left.close()
    right.close()


async def test_a_stream_cut_short_by_cancellation_takes_no_more() -> None:
    left, right = pair(socket.SOCK_STREAM)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await left.send(bytes(16 << 20))
    with pytest.raises(ChannelClosed, match="cut short"):
        await left.send(b"more")
    left.close()
    right.close()


async def test_a_receiver_of_a_flood_lets_others_run() -> None:
    left, right = pair(socket.SOCK_SEQPACKET)
    for _ in range(50):
        await left.send(b"x")
    turns = 0

    async def bystander() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(bystander())
    for _ in range(50):
        await right.receive(10)
    task.cancel()
    assert turns >= 40
    left.close()
    right.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_server_serves_several_at_once_and_cleans_up(kind: socket.SocketKind, tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    server = await serve_unix(path, kind, 0o660, None, echo)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    clients = [await connect_unix(path, kind) for _ in range(3)]
    fd = memfd(b"x")
    for number, client in enumerate(clients):
        await client.send(b"%d" % number, [fd])
    for number, client in enumerate(clients):
        data, fds = await client.receive(10)
        assert (data, len(fds)) == (b"%d" % number, 1)
        os.close(fds[0])
    os.close(fd)
    clients[0].close()
    await server.close()
    await server.close()
    assert not os.path.exists(path)
    assert await clients[1].receive(10) == (b"", [])
    for client in clients[1:]:
        client.close()


async def test_server_sets_the_group_and_names_an_unknown_one(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    own = grp.getgrgid(os.getgid()).gr_name
    server = await serve_unix(path, socket.SOCK_STREAM, 0o600, own, echo)
    assert os.stat(path).st_gid == os.getgid()
    await server.close()
    with pytest.raises(ChannelError, match="there is no group 'no-such-group'"):
        await serve_unix(path, socket.SOCK_STREAM, 0o600, "no-such-group", echo)
    assert not os.path.exists(path)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stale_socket_is_replaced(kind: socket.SocketKind, tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    stale = socket.socket(socket.AF_UNIX, kind)
    stale.bind(path)
    stale.listen()
    stale.close()
    server = await serve_unix(path, kind, 0o600, None, echo)
    client = await connect_unix(path, kind)
    await client.send(b"alive")
    assert (await client.receive(10))[0] == b"alive"
    client.close()
    await server.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_socket_somebody_answers_on_is_left_alone(kind: socket.SocketKind, tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(ChannelError, match="another process listens there"):
            await serve_unix(path, kind, 0o600, None, echo)
        assert os.path.exists(path)


async def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("precious")
    with pytest.raises(ChannelError, match="not a socket is in the way"):
        await serve_unix(str(path), socket.SOCK_STREAM, 0o600, None, echo)
    assert path.read_text() == "precious"


async def test_paths_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="No such file or directory"):
        await serve_unix(str(tmp_path / "absent" / "s.sock"), socket.SOCK_STREAM, 0o600, None, echo)
    with pytest.raises(ChannelError, match="a Unix socket's may be 107"):
        await serve_unix(str(tmp_path / ("x" * 120)), socket.SOCK_STREAM, 0o600, None, echo)
    with pytest.raises(ChannelClosed, match=r"Failed to connect to .*No such file"):
        await connect_unix(str(tmp_path / "absent"))


async def test_close_leaves_a_successors_socket_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    server = await serve_unix(str(path), socket.SOCK_STREAM, 0o600, None, echo)
    path.unlink()
    successor = await serve_unix(str(path), socket.SOCK_STREAM, 0o600, None, echo)
    await server.close()
    assert path.exists()
    await successor.close()


async def test_a_bug_in_one_session_ends_only_that_one(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")

    async def handler(connection: FdSocket) -> None:
        data, _ = await connection.receive(10)
        if data == b"bad":
            raise ZeroDivisionError
        await connection.send(data)

    with capture_logs() as logs:
        server = await serve_unix(path, socket.SOCK_STREAM, 0o600, None, handler)
        good, bad = await connect_unix(path), await connect_unix(path)
        await bad.send(b"bad")
        assert (await bad.receive(10))[0] == b""
        await good.send(b"good")
        assert (await good.receive(10))[0] == b"good"
    assert [entry["event"] for entry in logs] == ["session_bug"]
    good.close()
    bad.close()
    await server.close()


async def test_one_connection_too_many_is_closed_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    server = await serve_unix(path, socket.SOCK_STREAM, 0o600, None, echo)
    clients = [await connect_unix(path) for _ in range(MAX_CONNECTIONS)]
    for client in clients:
        await client.send(b"x")
        await client.receive(1)
    with capture_logs() as logs:
        extra = await connect_unix(path)
        assert (await extra.receive(1))[0] == b""
    assert logs[0]["event"] == "connection_refused"
    clients.pop().close()
    # The server learns of the close on its own time; an answer to a later connection shows the place is free again.
    async with asyncio.timeout(5):
        while True:
            extra.close()
            extra = await connect_unix(path)
            try:
                await extra.send(b"y")
                if (await extra.receive(1))[0] == b"y":
                    break
            except ChannelClosed:
                continue
    for client in (*clients, extra):
        client.close()
    await server.close()

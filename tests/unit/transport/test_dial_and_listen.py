"""Opening channels at both ends, over every kind of address."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migrated.errors import ChannelClosed, ChannelError, ChannelTimeout, CommandError
from migrated.transport.address import Address, FdAddress, TcpAddress, UnixAddress, parse_address
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.dial import dial
from migrated.transport.file import FileChannel
from migrated.transport.listen import Listener, listen, parse_allow
from migrated.transport.pipe import PipeChannel
from tests.unit.transport.carriers import no_fds, only, open_fds, tcp_pair, unix_pair, until

BODY = random.randbytes(3 << 20)


class Received:
    """Handles incoming channels by reading them to the end."""

    def __init__(self) -> None:
        self.bodies: asyncio.Queue[bytes | ChannelError] = asyncio.Queue()
        self.channels: list[Channel] = []

    async def __call__(self, channel: Channel) -> None:
        self.channels.append(channel)
        try:
            self.bodies.put_nowait(await read_all(channel))
        except ChannelError as error:
            self.bodies.put_nowait(error)


async def read_all(channel: Channel) -> bytes:
    body, view = bytearray(), memoryview(bytearray(1 << 20))
    while count := await channel.receive_into(view, deadline_s=30):
        body += view[:count]
    return bytes(body)


@asynccontextmanager
async def listening(
    address: Address,
    on_channel: Callable[[Channel], Awaitable[None]],
    *,
    allow: tuple[str, ...] = (),
    fds: Callable[[str], int] = no_fds,
) -> AsyncIterator[Listener]:
    listener = await listen(address, on_channel, allow=allow, fds=fds)
    try:
        yield listener
    finally:
        await listener.stop()


def port_of(listener: Listener) -> int:
    return int(str(listener.addresses[0]["port"]))


async def dial_uri(uri: str, *, timeout_s: float = 30, fds: Callable[[str], int] = no_fds) -> Channel:
    return await dial(parse_address(uri), timeout_s=timeout_s, fds=fds)


# -- TCP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "family", "shown"), [("127.0.0.1", "ipv4", "127.0.0.1"), ("[::1]", "ipv6", "[::1]")])
async def test_tcp(host: str, family: str, shown: str) -> None:
    received = Received()
    async with listening(parse_address(f"tcp:{host}:0"), received) as listener:
        assert listener.addresses == [
            {"type": "inet", "host": shown.strip("[]"), "port": str(port_of(listener)), family: True}
        ]
        channel = await dial_uri(f"tcp:{host}:{port_of(listener)}")
        assert (channel.peer, channel.has_return_path) == (f"{shown}:{port_of(listener)}", True)
        await channel.send(BODY)
        await channel.close()
        assert await received.bodies.get() == BODY
        assert received.channels[0].peer.startswith(f"{shown}:")


async def test_a_name_listens_on_all_its_addresses_with_one_port() -> None:
    received = Received()
    async with listening(TcpAddress("", 0), received) as listener:
        assert {str(address["host"]) for address in listener.addresses} == {"0.0.0.0", "::"}
        assert len({address["port"] for address in listener.addresses}) == 1
        for host in ("127.0.0.1", "[::1]", "localhost"):
            channel = await dial_uri(f"tcp:{host}:{port_of(listener)}")
            await channel.close()
            assert await received.bodies.get() == b""
            await until(lambda: not listener.busy)


async def test_families_can_be_chosen() -> None:
    async with listening(TcpAddress("", 0, ipv6=False), Received()) as listener:
        assert [address["host"] for address in listener.addresses] == ["0.0.0.0"]
    async with listening(TcpAddress("", 0, ipv6=True), Received()) as listener:
        assert [address["host"] for address in listener.addresses] == ["::"]


async def test_a_range_of_ports_and_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ChannelError, match=rf"Failed to listen on '127\.0\.0\.1:{taken}': Address already in use"):
            await listen(TcpAddress("127.0.0.1", taken), Received(), fds=no_fds)
        async with listening(TcpAddress("127.0.0.1", taken, to=min(taken + 50, 65535)), Received()) as listener:
            assert port_of(listener) > taken


async def test_an_address_this_host_does_not_have() -> None:
    with pytest.raises(ChannelError, match=r"Failed to listen on .*Cannot assign requested address"):
        await listen(TcpAddress("192.0.2.1", 0), Received(), fds=no_fds)


async def test_a_refused_connection_is_told_in_qemus_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ChannelClosed) as refused:
        await dial_uri(f"tcp:127.0.0.1:{port}")
    assert str(refused.value) == f"Failed to connect to '127.0.0.1:{port}': Connection refused"


async def test_a_name_nobody_knows() -> None:
    with pytest.raises(ChannelClosed, match=r"address resolution failed for no-such-host\.invalid:1: "):
        await dial_uri("tcp:no-such-host.invalid:1")


async def test_a_listener_that_never_answers_runs_into_the_deadline() -> None:
    # A full backlog drops SYNs: that is what a dead host looks like on loopback.
    server = socket.create_server(("127.0.0.1", 0), backlog=0)
    filling = [socket.socket() for _ in range(4)]
    for sock in filling:
        sock.setblocking(False)
        sock.connect_ex(server.getsockname())
    before = open_fds()
    with pytest.raises(ChannelTimeout, match=r"Failed to connect to '127\.0\.0\.1:\d+': no answer within 0\.1 s"):
        await dial_uri(f"tcp:127.0.0.1:{server.getsockname()[1]}", timeout_s=0.1)
    assert open_fds() == before
    for sock in (server, *filling):
        sock.close()


async def test_one_migration_at_a_time() -> None:
    released = asyncio.Event()
    handled: asyncio.Queue[Channel] = asyncio.Queue()

    async def hold(channel: Channel) -> None:
        handled.put_nowait(channel)
        await released.wait()

    async with listening(TcpAddress("127.0.0.1", 0), hold) as listener:
        uri = f"tcp:127.0.0.1:{port_of(listener)}"
        first = await dial_uri(uri)
        await handled.get()
        with capture_logs() as logs:
            second = await dial_uri(uri)
            assert await second.receive_into(memoryview(bytearray(1)), deadline_s=30) == 0
        assert [(entry["event"], entry["reason"]) for entry in logs] == [
            ("connection_refused", "another migration is under way")
        ]
        released.set()
        with pytest.raises(ChannelClosed):  # the handler returned without closing it in order
            await first.receive_into(memoryview(bytearray(1)), deadline_s=30)
        third = await dial_uri(uri)
        await handled.get()
        for channel in (first, second, third):
            channel.abort()


@pytest.mark.parametrize(
    ("allow", "welcome"),
    [
        (("127.0.0.1",), True),
        (("10.0.0.7", "127.0.0.0/8"), True),
        (("10.0.0.7", "::1"), False),
    ],
)
async def test_only_allowed_peers_get_in(allow: tuple[str, ...], welcome: bool) -> None:
    received = Received()
    with capture_logs() as logs:
        async with listening(TcpAddress("127.0.0.1", 0), received, allow=allow) as listener:
            channel = await dial_uri(f"tcp:127.0.0.1:{port_of(listener)}")
            if welcome:
                await channel.send(b"hello")
                channel.shutdown_write()
                assert await received.bodies.get() == b"hello"
            else:
                assert await channel.receive_into(memoryview(bytearray(1)), deadline_s=30) == 0
            channel.abort()
    reasons = [entry["reason"] for entry in logs if entry["event"] == "connection_refused"]
    assert reasons == ([] if welcome else ["the address is not in the list of allowed peers"])


def test_an_allow_list_of_names_is_refused() -> None:
    with pytest.raises(CommandError, match=r"'host\.example' is not an IP address or network"):
        parse_allow(["host.example"])


async def test_a_bug_in_a_handler_does_not_end_the_listener() -> None:
    calls: asyncio.Queue[None] = asyncio.Queue()

    async def broken(channel: Channel) -> None:
        calls.put_nowait(None)
        raise ZeroDivisionError

    async def converse(uri: str) -> None:
        channel = await dial_uri(uri)  # may see the reset already
        try:
            await channel.receive_into(memoryview(bytearray(1)), deadline_s=30)
        finally:
            channel.abort()

    with capture_logs() as logs:
        async with listening(TcpAddress("127.0.0.1", 0), broken) as listener:
            for _ in range(2):
                with pytest.raises(ChannelClosed):
                    await converse(f"tcp:127.0.0.1:{port_of(listener)}")
            assert calls.qsize() == 2
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["incoming_channel_bug"] * 2


async def test_close_stops_listening_but_not_the_migration_and_stop_ends_both() -> None:
    received = Received()
    listener = await listen(TcpAddress("127.0.0.1", 0), received, fds=no_fds)
    port = port_of(listener)
    channel = await dial_uri(f"tcp:127.0.0.1:{port}")
    await channel.send(b"begin ")
    await until(lambda: received.channels)
    await listener.close()
    with pytest.raises(ChannelClosed, match="Connection refused"):
        await dial_uri(f"tcp:127.0.0.1:{port}")
    await channel.send(b"end")
    channel.shutdown_write()
    assert await received.bodies.get() == b"begin end"
    await listener.stop()
    await listener.stop()
    channel.abort()


# -- Unix ------------------------------------------------------------------------------------------------------------


async def test_unix(tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")
    received = Received()
    async with listening(UnixAddress(path), received) as listener:
        assert listener.addresses == [{"type": "unix", "path": path}]
        assert os.stat(path).st_mode & 0o777 == 0o600
        channel = await dial_uri(f"unix:{path}")
        assert channel.has_return_path
        await channel.send(BODY)
        await channel.close()
        assert await received.bodies.get() == BODY
        assert received.channels[0].peer == f"unix:{path} (pid {os.getpid()})"
    assert not os.path.exists(path)
    with pytest.raises(ChannelClosed, match=f"Failed to connect to '{path}': No such file or directory"):
        await dial_uri(f"unix:{path}")


async def test_unix_with_a_full_backlog(tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as filling:
        server.bind(path)
        server.listen(0)
        filling.connect(path)
        with pytest.raises(ChannelClosed, match="the listener's backlog is full"):
            await dial_uri(f"unix:{path}")


# -- fd --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [pytest.param(tcp_pair, id="tcp"), pytest.param(unix_pair, id="unix")])
async def test_fd_of_a_socket(pair: Callable[[], tuple[socket.socket, socket.socket]]) -> None:
    near, far = pair()
    received = Received()
    async with listening(FdAddress("in"), received, fds=only(far.detach())) as listener:
        assert listener.addresses == [{"type": "fd", "str": "in"}]
        channel = await dial_uri("fd:out", fds=only(near.detach()))
        assert isinstance(channel, SocketChannel)
        await channel.send(BODY)
        await channel.close()
        assert await received.bodies.get() == BODY


async def test_fd_of_a_pipe() -> None:
    read_end, write_end = os.pipe()
    received = Received()
    before = open_fds() - 2
    async with listening(FdAddress("in"), received, fds=only(read_end)):
        channel = await dial_uri("fd:out", fds=only(write_end))
        assert isinstance(channel, PipeChannel)
        assert not channel.has_return_path
        await channel.send(BODY)
        await channel.close()
        assert await received.bodies.get() == BODY
    assert open_fds() == before


async def test_fd_of_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.touch()
    channel = await dial_uri("fd:out", fds=only(os.open(path, os.O_WRONLY)))
    assert isinstance(channel, FileChannel)
    await channel.send(BODY)
    await channel.close()
    received = Received()
    async with listening(FdAddress("in"), received, fds=only(os.open(path, os.O_RDONLY))):
        assert await received.bodies.get() == BODY


async def test_fd_that_is_nothing_of_the_kind() -> None:
    with pytest.raises(ChannelClosed, match="descriptor 999 cannot be used: Bad file descriptor"):
        await dial_uri("fd:x", fds=only(999))
    before = open_fds()
    server = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(ChannelClosed, match="fd:x is not a connected stream socket"):
        await dial_uri("fd:x", fds=only(server.detach()))
    assert open_fds() == before


async def test_an_unknown_fd_name_is_the_lookups_refusal() -> None:
    def unknown(name: str) -> int:
        raise CommandError(f"File descriptor named '{name}' has not been found")

    for opening in (dial_uri("fd:nobody", fds=unknown), listen(FdAddress("nobody"), Received(), fds=unknown)):
        with pytest.raises(CommandError, match="File descriptor named 'nobody' has not been found"):
            await opening


# -- a pipe's ends ---------------------------------------------------------------------------------------------------


async def test_a_pipe_that_is_not_read_runs_into_the_deadline_and_a_broken_one_is_closed() -> None:
    read_end, write_end = os.pipe()
    channel = PipeChannel("fd:x", write_fd=write_end, silence_timeout_s=0.05)
    with pytest.raises(ChannelTimeout, match=r"the pipe took no byte for 0\.05 s"):
        await channel.send(bytes(4 << 20))
    os.close(read_end)
    with pytest.raises(ChannelClosed, match="Unable to write to pipe: Broken pipe"):
        await channel.send(b"x")
    with pytest.raises(ChannelClosed, match="no such direction"):
        await channel.receive_into(memoryview(bytearray(1)))
    channel.shutdown_write()
    with pytest.raises(ChannelClosed, match="closed at this end"):
        await channel.send(b"x")
    await channel.close()
    await channel.close()


async def test_a_pipe_that_brings_nothing_runs_into_the_deadline() -> None:
    read_end, write_end = os.pipe()
    channel = PipeChannel("fd:x", read_fd=read_end)
    with pytest.raises(ChannelTimeout, match=r"the pipe sent nothing for 0\.02 s"):
        await channel.receive_into(memoryview(bytearray(1)), deadline_s=0.02)
    waiting = asyncio.ensure_future(channel.receive_into(memoryview(bytearray(1))))
    await asyncio.sleep(0)
    channel.abort()
    with pytest.raises(ChannelClosed, match="closed at this end"):
        await waiting
    os.close(write_end)


# -- exec ------------------------------------------------------------------------------------------------------------


async def test_exec_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    before = open_fds()
    channel = await dial_uri(f"exec:cat > {path}")
    await channel.send(BODY)
    await channel.close()  # returns only when the command is through
    assert path.read_bytes() == BODY
    received = Received()
    async with listening(parse_address(f"exec:cat {path}"), received) as listener:
        assert listener.addresses == []
        assert await received.bodies.get() == BODY
    assert open_fds() == before


async def test_a_command_that_fails_is_named_when_the_channel_is_closed() -> None:
    channel = await dial_uri("exec:cat >/dev/null; exit 3")
    await channel.send(b"x")
    with pytest.raises(ChannelClosed, match=r"the command 'cat >/dev/null; exit 3' exited with status 3"):
        await channel.close()
    await channel.close()


async def test_a_command_that_dies_early_breaks_the_pipe_with_its_status() -> None:
    channel = await dial_uri("exec:exit 4")
    with pytest.raises(
        ChannelClosed, match=r"Unable to write to command: Broken pipe \(command 'exit 4' exited with status 4\)"
    ):
        await channel.send(bytes(64 << 20))
    channel.abort()


async def test_an_incoming_command_that_fails_is_not_an_end() -> None:
    received = Received()
    async with listening(parse_address("exec:printf abc; kill -9 $$"), received):
        error = await received.bodies.get()
    assert isinstance(error, ChannelClosed)
    assert "was killed by SIGKILL" in str(error)


async def test_abort_kills_the_command_and_what_it_started(tmp_path: Path) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    # The grandchild holds the FIFO open for writing: its end is the death of all of them.
    channel = await dial_uri(f"exec:sh -c 'exec 3>{fifo}; cat >/dev/null; sleep 1000' ; true")
    holder = await asyncio.to_thread(os.open, fifo, os.O_RDONLY)
    channel.abort()
    assert await asyncio.to_thread(os.read, holder, 1) == b""
    os.close(holder)


# -- file ------------------------------------------------------------------------------------------------------------


async def test_file_out_and_in(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"header" + b"stale" * 100)
    channel = await dial_uri(f"file:{path},offset=6")
    assert (channel.peer, channel.has_return_path) == (f"file:{path}", False)
    await channel.send(BODY[:100])
    await channel.send(BODY[100:])
    channel.shutdown_write()
    await channel.close()
    await channel.close()
    assert path.read_bytes() == b"header" + BODY
    received = Received()
    async with listening(parse_address(f"file:{path},offset=6"), received):
        assert await received.bodies.get() == BODY
    with pytest.raises(ChannelClosed, match="closed at this end"):
        await channel.send(b"x")


async def test_a_new_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    channel = await dial_uri(f"file:{path}")
    channel.abort()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(ChannelClosed, match=f"Could not open '{tmp_path}/absent': No such file or directory"):
        await listen(parse_address(f"file:{tmp_path}/absent"), Received(), fds=no_fds)
    with pytest.raises(ChannelClosed, match="Is a directory"):
        await dial_uri(f"file:{tmp_path}")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ChannelClosed, match="it is a pipe; use fd: or exec: for one"):
        await listen(parse_address(f"file:{tmp_path}/fifo"), Received(), fds=no_fds)
    assert open_fds() == before


async def test_a_full_disk_is_told() -> None:
    channel = await dial_uri("file:/dev/full")
    with pytest.raises(ChannelClosed, match="Unable to write to file: No space left on device"):
        await channel.send(b"x")
    channel.abort()


async def test_a_cancelled_write_is_through_before_the_buffer_is_the_callers_again(tmp_path: Path) -> None:
    before = open_fds()
    channel = await dial_uri(f"file:{tmp_path}/stream")
    sending = asyncio.ensure_future(channel.send(bytes(32 << 20)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    channel.abort()
    assert open_fds() == before

"""Which connected sockets are put under TLS, which may stay cleartext, and which are not used at all."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from migrated.errors import CommandError, TlsError
from migrated.transport.address import FdAddress, TcpAddress, UnixAddress, parse_address
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.dial import dial, secured
from migrated.transport.listen import listen
from migrated.transport.tls_channel import TlsChannel, names_of
from migrated.transport.trust import Trust
from tests.support.keys import Keys
from tests.unit.transport.carriers import no_fds, only, tcp_pair
from tests.unit.transport.test_channel import receive_exactly


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    return Keys(tmp_path_factory.mktemp("keys")).trust("host")


class FarSocket(socket.socket):
    """A socket that is connected to another host, as far as it can be asked."""

    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.1", 7400


def far_socket() -> FarSocket:
    near, far = tcp_pair()
    far.close()
    return FarSocket(fileno=near.detach())


async def test_cleartext_to_another_host_has_to_be_asked_for() -> None:
    sock = far_socket()
    with pytest.raises(TlsError, match=r'TLS-CLEARTEXT: there are no keys here.*mode = "off".*peer 192\.0\.2\.1'):
        secured(sock, "192.0.2.1:7400", Trust(), "192.0.2.1")
    assert sock.fileno() < 0, "it is closed"
    channel = secured(far_socket(), "192.0.2.1:7400", Trust(cleartext=True), "192.0.2.1")
    assert type(channel) is SocketChannel
    channel.abort()


async def test_this_host_may_be_spoken_to_in_cleartext_where_there_are_no_keys(trust: Trust) -> None:
    for near, far in (tcp_pair(), tcp_pair("::1"), socket.socketpair()):
        channel = secured(near, "near", Trust(), "near")
        assert type(channel) is SocketChannel
        channel.abort()
        channel = secured(far, "far", trust, None)
        assert isinstance(channel, TlsChannel) is (far.family != socket.AF_UNIX)
        channel.abort()


@pytest.mark.parametrize("name", [".example", ""])
async def test_a_name_that_no_certificate_can_have(name: str, trust: Trust) -> None:
    near, far = tcp_pair()
    with far, pytest.raises(TlsError, match=r"TLS-NAME: '.*' can be no certificate's name"):
        secured(near, "far", trust, name)
    assert near.fileno() < 0


def test_who_may_be_waited_for(trust: Trust) -> None:
    everybody = parse_address("tcp:0.0.0.0:7400")
    for quiet in (TcpAddress("127.0.0.1", 1), TcpAddress("localhost", 1), UnixAddress("/x"), FdAddress("x")):
        Trust().require_listener(quiet, [])
    with pytest.raises(CommandError, match="there are no keys to know peers by"):
        Trust().require_listener(everybody, ["10.0.0.7"])
    with pytest.raises(CommandError, match="in cleartext"):
        Trust(cleartext=True).require_listener(everybody, [])
    Trust(cleartext=True).require_listener(everybody, ["10.0.0.7"])
    trust.require_listener(everybody, [])


async def test_a_connected_socket_that_is_handed_over(trust: Trust) -> None:
    """``fd:`` at both ends; the accepting end's handshake waits for the other one."""
    near, far = tcp_pair()
    handled: asyncio.Queue[Channel] = asyncio.Queue()
    done = asyncio.Event()

    async def on_channel(channel: Channel) -> None:
        handled.put_nowait(channel)
        await done.wait()

    listener = await listen(FdAddress("in"), on_channel, fds=only(far.detach()), trust=lambda: trust)
    source = await dial(FdAddress("out"), timeout_s=30, fds=only(near.detach()), trust=trust)
    await source.send(b"under TLS")
    target = await handled.get()
    assert await receive_exactly(target, 9) == b"under TLS"
    assert names_of(target) == names_of(source) == ("host", "127.0.0.1", "localhost")
    await source.close()
    done.set()
    await listener.stop()


async def test_a_path_stays_as_it_is(trust: Trust, tmp_path: Path) -> None:
    done = asyncio.Event()
    address = UnixAddress(str(tmp_path / "m.sock"))

    async def on_channel(channel: Channel) -> None:
        assert await receive_exactly(channel, 5) == b"clear"
        done.set()

    listener = await listen(address, on_channel, fds=no_fds, trust=lambda: trust)
    source = await dial(address, timeout_s=30, fds=no_fds, trust=trust)
    await source.send(b"clear")
    await done.wait()
    await source.close()
    await listener.stop()

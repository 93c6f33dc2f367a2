"""The TLS channel is a socket channel to whoever uses it, and nobody gets through who has not proven who he is."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import select
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from migrated.errors import ChannelClosed, ChannelTimeout, TlsError
from migrated.transport import credentials
from migrated.transport.channel import SocketChannel
from migrated.transport.credentials import Credentials
from migrated.transport.tls_channel import BATCH_BYTES, TlsChannel
from migrated.transport.trust import Trust
from tests.support.keys import Keys
from tests.unit.transport.carriers import open_fds, tcp_pair, until
from tests.unit.transport.test_channel import receive_exactly


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def trust(keys: Keys) -> Trust:
    return keys.trust("host")


Pair = tuple[TlsChannel, TlsChannel]


def strangers(source: Trust, target: Trust, name: str = "127.0.0.1") -> Pair:
    near, far = tcp_pair()
    return TlsChannel(near, "far:1", source, name), TlsChannel(far, "near:1", target, None)


async def met(source: Trust, target: Trust | None = None) -> Pair:
    pair = strangers(source, target or source)
    await asyncio.gather(*(channel.authenticate() for channel in pair))
    return pair


async def outcomes(pair: Pair) -> list[str]:
    """What both sides have to say about each other."""
    found = await asyncio.gather(*(channel.authenticate() for channel in pair), return_exceptions=True)
    for channel in pair:
        channel.abort()
    assert all(isinstance(one, TlsError) for one in found), found
    return [str(one) for one in found]


async def end(pair: Pair) -> None:
    for channel in pair:
        await channel.close()


# -- bytes ---------------------------------------------------------------------------------------------------------


async def test_both_directions_at_once_with_back_pressure(trust: Trust) -> None:
    near, far = await met(trust)
    there, back = random.randbytes(12 << 20), random.randbytes(9 << 20)

    async def send(channel: SocketChannel, body: bytes) -> None:
        view = memoryview(body)
        for start in range(0, len(body), 3_000_017):
            await channel.send(view[start : start + 3_000_017])

    async with asyncio.TaskGroup() as group:
        group.create_task(send(near, there))
        group.create_task(send(far, back))
        arrived = group.create_task(receive_exactly(far, len(there)))
        returned = group.create_task(receive_exactly(near, len(back)))
    assert (arrived.result(), returned.result()) == (there, back)
    assert (near.bytes_sent, near.bytes_received) == (len(there), len(back))
    assert far.certificate is not None
    assert "host" in far.certificate.names
    await end((near, far))


async def test_nothing_of_it_is_in_the_clear(trust: Trust) -> None:
    near, wire = tcp_pair()
    other, far = tcp_pair()
    seen = bytearray()

    async def carry(source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(source, 1 << 16):
                seen.extend(data)
                await loop.sock_sendall(target, data)
            target.shutdown(socket.SHUT_WR)

    for sock in (wire, other):
        sock.setblocking(False)
    here, there = TlsChannel(near, "far", trust, "127.0.0.1"), TlsChannel(far, "near", trust, None)
    async with asyncio.TaskGroup() as group:
        group.create_task(carry(wire, other))
        group.create_task(carry(other, wire))
        await asyncio.gather(here.authenticate(), there.authenticate())
        await here.send(b"a page of secrets")
        assert await receive_exactly(there, 17) == b"a page of secrets"
        await here.close()
        await there.close()
    for sock in (wire, other):
        sock.close()
    assert len(seen) > 17
    assert b"secrets" not in seen
    assert b"test CA" not in seen


async def test_an_orderly_end_is_zero_and_the_other_direction_goes_on(trust: Trust) -> None:
    near, far = await met(trust)
    await far.send(b"still unread when near ends")
    await near.send(b"last words")
    await until(lambda: select.select([near._sock], [], [], 0)[0])
    near.shutdown_write()
    near.shutdown_write()
    assert await receive_exactly(far, 10) == b"last words"
    assert await far.receive_into(memoryview(bytearray(1))) == 0
    assert await far.receive_into(memoryview(bytearray(1))) == 0
    await far.send(b", answer" + bytes(BATCH_BYTES))
    await far.close()
    assert await receive_exactly(near, 27 + 8) == b"still unread when near ends, answer"
    await receive_exactly(near, BATCH_BYTES)
    assert await near.receive_into(memoryview(bytearray(1))) == 0
    await near.close()


async def test_a_connection_that_just_ends_is_cut(trust: Trust) -> None:
    near, far = await met(trust)
    near._sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed, match="it ended without the end of TLS"):
        await far.receive_into(memoryview(bytearray(1)))
    near.abort()
    far.abort()


async def test_an_abort_is_a_reset(trust: Trust) -> None:
    near, far = await met(trust)
    near.abort()
    with pytest.raises(ChannelClosed, match="Connection reset"):
        await far.receive_into(memoryview(bytearray(1)))
    far.abort()


async def test_bytes_that_were_changed_on_the_way_are_not_taken(trust: Trust) -> None:
    near, far = await met(trust)
    near._encrypt(memoryview(b"x" * 100))
    record = bytearray(near._outgoing.read())
    record[50] ^= 1
    near._sock.send(record)
    with pytest.raises(TlsError, match="TLS-FAILED: OpenSSL says: decryption failed or bad record mac"):
        await far.receive_into(memoryview(bytearray(100)))
    await end((near, far))


async def test_peek_takes_nothing(trust: Trust) -> None:
    near, far = await met(trust)
    await near.send(b"QEVM")
    assert await far.peek(10) == b"Q"
    assert await far.peek(10) == b"Q"
    assert far.bytes_received == 0
    assert await receive_exactly(far, 4) == b"QEVM"
    near.shutdown_write()
    assert await far.peek(10) == b""
    await end((near, far))


async def test_silence_has_its_deadlines(trust: Trust) -> None:
    near, far = await met(trust)
    with pytest.raises(ChannelTimeout, match=r"sent nothing for 0\.02 s"):
        await far.receive_into(memoryview(bytearray(1)), deadline_s=0.02)
    near.silence_timeout_s = 0.05
    with pytest.raises(ChannelTimeout, match="took no byte"):
        await near.send(bytes(64 << 20))
    near.abort()
    far.abort()


# -- at once -------------------------------------------------------------------------------------------------------


async def test_what_does_not_go_now_is_sent_by_who_goes_on(trust: Trust) -> None:
    near, far = await met(trust)
    body = random.randbytes(64 << 20)
    view, sent = memoryview(body), 0
    while count := near.send_now(view[sent : sent + (1 << 20)]):
        sent += count
    assert 0 < sent < len(body)

    async def rest() -> None:
        nonlocal sent
        while sent < len(body):
            # Both ways of sending take over from each other.
            count = near.send_now(view[sent : sent + 5000])
            await near.send(view[sent + count : sent + 70_000])
            sent = min(sent + 70_000, len(body))

    async with asyncio.TaskGroup() as group:
        group.create_task(rest())
        arrived = group.create_task(receive_exactly(far, len(body)))
    assert arrived.result() == body
    assert near.bytes_sent == far.bytes_received == len(body)
    await end((near, far))


async def test_what_arrives_is_taken_where_it_arrives(trust: Trust) -> None:
    near, far = await met(trust)
    view, taken = memoryview(bytearray(1 << 16)), bytearray()

    def take(count: int) -> bool:
        taken.extend(view[:count])
        return not taken.endswith(b".")

    receiving = asyncio.create_task(far.receive_at_once(view, take))
    for part in (b"one", b"two", b"three."):
        await near.send(part)
        await until(functools.partial(taken.endswith, part))
    assert await receiving == 6
    # What was received with other bytes, and makes no socket readable any more, is taken as well.
    await near.send(b"a")
    await near.send(b"b.")
    assert await receive_exactly(far, 1) == b"a"
    taken.clear()
    assert await far.receive_at_once(view, take) == 2
    near.shutdown_write()
    assert await far.receive_at_once(view, take) == 0
    await end((near, far))


# -- who is there --------------------------------------------------------------------------------------------------


def days(keys: Keys, name: str, begins_in_days: float, count: float) -> Trust:
    """A host whose certificate is out of its time; its own daemon would not load it."""
    return Trust(unchecked(keys.host(name, begins_in_days=begins_in_days, days=count, replace=True)))


def unchecked(directory: Path) -> Credentials:
    """Load keys as a daemon has them that has been running since they were good."""
    authority = credentials.read_certificate(directory / "ca-cert.pem")
    server, client = (credentials._endpoint(directory, role, "server") for role in ("server", "client"))
    client.handshake.check_hostname = True
    client.handshake.set_alpn_protocols([credentials.ALPN])
    return Credentials(directory, authority, server, client)


async def test_an_expired_certificate(keys: Keys, trust: Trust) -> None:
    old = days(keys, "old", -40, 30)
    says, told = await outcomes(strangers(trust, old))
    assert says.startswith("TLS-EXPIRED: its certificate 'old' (for old, 127.0.0.1, localhost; valid ")
    assert ", 10 days ago by the clock here" in says
    assert told.startswith("TLS-EXPIRED: the other side refused our certificate 'old' (for old")
    assert "as expired; it expired 2" in told
    told, says = await outcomes(strangers(old, trust))
    assert "10 days ago by the clock here" in says
    assert "refused our certificate 'old'" in told


async def test_a_certificate_of_the_future_is_a_matter_of_clocks(keys: Keys, trust: Trust) -> None:
    early = days(keys, "early", 3, 30)
    says, told = await outcomes(strangers(trust, early))
    assert says.startswith("TLS-NOT-YET-VALID: its certificate 'early'")
    assert "2 days ahead of the clock here" in says
    assert "compare the clocks" in says
    assert told.startswith("TLS-REFUSED: the other side refused our certificate 'early'")
    assert "a date that has not come by the clock there" in told


async def test_a_wrong_name(trust: Trust) -> None:
    says, told = await outcomes(strangers(trust, trust, "other.example"))
    assert "TLS-NAME: it should be other.example, and its certificate 'host' (for host, 127.0.0.1, localhost" in says
    assert told.startswith("TLS-REFUSED: the other side refused our certificate 'host'")
    says, _ = await outcomes(strangers(trust, trust, "127.0.0.2"))
    assert "TLS-NAME: it should be 127.0.0.2" in says


async def test_a_wrong_authority(tmp_path: Path, trust: Trust) -> None:
    stranger = Keys(tmp_path, "other CA").trust("stranger")
    says, told = await outcomes(strangers(trust, stranger))
    assert says.startswith("TLS-CA: its certificate 'stranger'")
    assert "issued by 'other CA') does not come from the CA that is trusted here, 'test CA'" in says
    assert told.startswith("TLS-CA: the other side refused our certificate 'stranger'")


@pytest.mark.parametrize("sends", [True, False], ids=["the source", "the destination"])
async def test_a_host_that_is_not_on_the_list(sends: bool, keys: Keys, trust: Trust) -> None:
    if sends:
        picky = Trust(trust.credentials, may_send=("a", "*.example.org"))
        told, says = await outcomes(strangers(trust, picky))
        assert told.startswith("TLS-NOT-ALLOWED: the other side says: the certificate 'host' (for host, 127.0.0.1")
        assert "none of its names is in [peers] may-send (peer far:1" in told
        assert "none of its names is in [peers] may-send" in says
    else:
        picky = Trust(trust.credentials, may_receive=("b",))
        pair = strangers(picky, trust)
        found = await asyncio.gather(*(channel.authenticate() for channel in pair), return_exceptions=True)
        assert "none of its names is in [peers] may-receive" in str(found[0])
        await end(pair)
    near, far = await met(trust, Trust(trust.credentials, may_send=("HOST",)))
    await end((near, far))


def client_context(trust: Trust) -> ssl.SSLContext:
    assert trust.credentials is not None
    context = ssl.create_default_context(cafile=str(trust.credentials.directory / "ca-cert.pem"))
    context.check_hostname = False
    return context


async def visited(trust: Trust, speak: Callable[[socket.socket], None]) -> str:
    """Let somebody else's client come; return why it is refused."""
    near, far = tcp_pair()
    channel = TlsChannel(far, "near:1", trust, None)
    with near:
        near.settimeout(20)
        speaking = asyncio.ensure_future(asyncio.to_thread(speak, near))
        with pytest.raises(TlsError) as refused:
            await channel.authenticate()
        channel.abort()
        with pytest.raises(OSError):  # noqa: PT011 - how, is the other library's business
            await speaking
    return str(refused.value)


async def test_a_client_without_a_certificate(trust: Trust) -> None:
    def speak(sock: socket.socket) -> None:
        with client_context(trust).wrap_socket(sock) as tls:
            tls.recv(1)

    assert "TLS-NO-CERTIFICATE: it presented no certificate" in await visited(trust, speak)


async def test_an_older_tls(trust: Trust) -> None:
    def speak(sock: socket.socket) -> None:
        context = client_context(trust)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.wrap_socket(sock)

    assert "TLS-VERSION: the other side does not speak TLS 1.3" in await visited(trust, speak)


@pytest.mark.parametrize("words", [b"QEVM\0\0\0\3" + bytes(100), b"GET / HTTP/1.0\r\n\r\n"])
async def test_no_tls_at_all(words: bytes, trust: Trust) -> None:
    def speak(sock: socket.socket) -> None:
        sock.sendall(words)
        raise OSError("done")

    assert "TLS-CLEARTEXT: what comes is not TLS" in await visited(trust, speak)


async def test_a_peer_that_leaves_in_the_middle(trust: Trust) -> None:
    near, far = tcp_pair()
    channel = TlsChannel(far, "near:1", trust, None)
    near.close()
    with pytest.raises(TlsError, match="TLS-NOT-SPOKEN: the source went away before it had proven who it is"):
        await channel.authenticate()
    await channel.close()
    near, far = tcp_pair()
    channel = TlsChannel(near, "far:1", trust, "127.0.0.1")
    far.close()
    with pytest.raises(TlsError, match="TLS-NOT-SPOKEN: the connection ended before the other side"):
        await channel.authenticate()
    channel.abort()


async def test_nothing_is_left_of_refused_peers(trust: Trust) -> None:
    await outcomes(strangers(trust, trust, "other.example"))
    before = open_fds()
    for _ in range(5):
        await outcomes(strangers(trust, trust, "other.example"))
    assert open_fds() == before

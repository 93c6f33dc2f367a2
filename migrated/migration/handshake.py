"""How a stream begins: header and configuration, written from and held against this host's machine.

The rule of the file: nothing of this host is touched here, and a source has one deadline for all of it. Error texts are
QEMU's.
"""

from __future__ import annotations

import asyncio

from migrated.errors import ChannelError, RemoteProtocolError
from migrated.migration.host import Host
from migrated.migration.return_path import FIRST_PING, PeerKind, ReturnPathReader
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.tls_problem import TlsProblem
from migrated.wire.command import PEER_PING, Command, ping_payload
from migrated.wire.return_path import encode_reason, encode_shut
from migrated.wire.section import Configuration, parse_preamble, parse_stream_header

PAGE_BITS = 12
#: The first byte of a stream's magic.
STREAM_BEGIN = b"Q"
#: The first byte of a TLS connection (RFC 8446, 5.1).
TLS_HANDSHAKE = 0x16
SPEAKS_TLS = (
    f"{TlsProblem.NOT_SPOKEN}: the source speaks TLS, and this daemon has no keys. Next: pair the hosts"
    " (migratectl pki), or migrate without TLS"
)
#: What a source is told that sends its stream in cleartext where TLS is spoken; a QEMU makes nothing of it but its end.
CLEARTEXT_ANSWER = encode_reason(
    f"{TlsProblem.CLEARTEXT}: the destination takes machines under TLS only, and this came in cleartext. Next: give the"
    " source keys ([tls]; migratectl pki issue)"
) + encode_shut(1)


async def begins_stream(channel: Channel, host: Host) -> bool:
    """True for a connection that begins from the start; a recovery begins with a command."""
    if not isinstance(channel, SocketChannel):
        return False
    try:
        return await channel.peek(host.settings.silence_timeout_s()) == STREAM_BEGIN
    except ChannelError:
        return False  # nobody


async def greet(f: OutgoingStream, return_path: ReturnPathReader | None, host: Host) -> PeerKind:
    """Write how a stream begins, and find out who is there. Raises what `wait_kind` raises."""
    f.put_preamble(own_configuration(host))
    if return_path is None:
        await f.drain()
        return PeerKind.UNKNOWN
    f.put_command(Command.OPEN_RETURN_PATH)
    f.put_command(Command.PING, ping_payload(PEER_PING))
    f.put_command(Command.PING, ping_payload(FIRST_PING))
    await f.drain()
    return await return_path.wait_kind(host.settings.silence_timeout_s())


def own_configuration(host: Host) -> Configuration:
    """Return what a stream of this host's machine says about it."""
    uuid = host.machine.uuid if host.settings.enabled("validate-uuid") else None
    return Configuration(host.machine.machine_type, uuid=bytes.fromhex(uuid.replace("-", "")) if uuid else None)


async def read_preamble(stream: IncomingStream, host: Host) -> int:
    """Read header and configuration; return the first element's type byte. Raises RemoteProtocolError."""
    first, mismatch = await read_any_preamble(stream, host)
    if mismatch is not None:
        raise mismatch
    return first


async def read_any_preamble(stream: IncomingStream, host: Host) -> tuple[int, RemoteProtocolError | None]:
    """Do the same, and return instead of raising why a machine with this configuration cannot be loaded here.

    A source that asks first is to hear everything that stands in its way, not only that.
    """
    limit_s = host.settings.silence_timeout_s()
    try:
        async with asyncio.timeout(limit_s):
            await stream.wait_for_element()
            if stream.peek()[0] == TLS_HANDSHAKE:
                raise RemoteProtocolError(SPEAKS_TLS, expected="a stream in cleartext", found="a TLS handshake")
            await stream.run(parse_stream_header())
            stream.section = "configuration"
            configuration, first = await stream.run(parse_preamble())
    except TimeoutError as error:
        raise RemoteProtocolError(
            f"no complete stream header and configuration within {limit_s:g} s", offset=stream.offset
        ) from error
    try:
        check_configuration(configuration, host)
    except RemoteProtocolError as error:
        error.offset = stream.offset
        return first, error
    return first, None


def check_configuration(configuration: Configuration, host: Host) -> None:
    """Raise RemoteProtocolError unless a stream that begins like this may be loaded here."""
    machine = host.machine
    if configuration.machine_type != machine.machine_type:
        raise _refused(f"Machine type received is '{configuration.machine_type}' and local is '{machine.machine_type}'")
    for name in configuration.capabilities:
        raise _refused(f"Capability {name} is off, but received capability is on")
    if configuration.target_page_bits not in (None, PAGE_BITS):
        raise _refused(f"Received TARGET_PAGE_BITS is {configuration.target_page_bits} but local is {PAGE_BITS}")
    if configuration.uuid is not None and machine.uuid is not None and host.settings.enabled("validate-uuid"):
        local = machine.uuid.replace("-", "").lower()
        if configuration.uuid.hex() != local:
            raise _refused(f"UUID received is {configuration.uuid.hex()} and local is {local}")


def _refused(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, section="configuration")

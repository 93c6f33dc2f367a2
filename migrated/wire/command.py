"""The COMMAND elements of the stream: numbers, lengths, the little payload there is.

The rule of the file: one table says what is legal. Source: QEMU's MIG_CMD table (7.2, and SWITCHOVER_START of 10.0,
which a sender must not use towards a 7.2); error texts are QEMU's.

Peer detection rides on PING (a QEMU echoes any value): see `PEER_PING`.
"""

from __future__ import annotations

from enum import IntEnum

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.primitives import encode_be16, encode_be32
from migrated.wire.section import CommandHeader, SectionType


class Command(IntEnum):
    """Number of a command; the names are QEMU's."""

    INVALID = 0
    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11
    #: Peer extensions, see `wire.handover`.
    X_OFFER = 0x4D02
    X_COMMIT = 0x4D03
    X_WITHDRAW = 0x4D04
    #: A peer extension: XXH3 (64 bits) of every byte since the last one, or the offer, up to its own payload.
    X_CHECKSUM = 0x4D05
    #: A peer extension, see `wire.preflight`.
    X_PREFLIGHT = 0x4D10


#: Payload bytes; None where the length varies and the command's own parser checks it.
LENGTHS: dict[Command, int | None] = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_ADVISE: None,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.POSTCOPY_RAM_DISCARD: None,
    Command.PACKAGED: 4,
    Command.ENABLE_COLO: 0,
    Command.POSTCOPY_RESUME: 0,
    Command.RECV_BITMAP: None,
    Command.SWITCHOVER_START: 0,
    Command.X_OFFER: None,
    Command.X_COMMIT: None,
    Command.X_WITHDRAW: None,
    Command.X_CHECKSUM: 8,
    Command.X_PREFLIGHT: None,
}
_KNOWN = frozenset(LENGTHS)
#: The length field has 16 bits.
PAYLOAD_MAX_BYTES = 0xFFFF

#: A `migrated` source opens with PING(PEER_PING) ("MIGR"). A QEMU echoes it; a `migrated` destination answers its PONG
#: and a second, unasked PONG(PEER_PONG) ("MIGD"), which a QEMU source would ignore.
PEER_PING = 0x4D494752
PEER_PONG = 0x4D494744
#: What else a `migrated` destination understands, in one more PONG unasked: the upper half is "MF", the lower one bits.
PEER_FEATURES = 0x4D460000
PEER_FEATURES_MASK = 0xFFFF0000
FEATURE_HANDOVER = 0x0002
FEATURE_PREFLIGHT = 0x0010


def encode_command(command: Command, payload: bytes = b"") -> bytes:
    """Encode one COMMAND element. Raises LocalProtocolError for a payload the table forbids."""
    if command not in LENGTHS:
        raise LocalProtocolError(f"{command.name} is never sent")
    expected = LENGTHS[command]
    if len(payload) > PAYLOAD_MAX_BYTES or expected not in (None, len(payload)):
        raise LocalProtocolError(f"{command.name} cannot carry {len(payload)} bytes")
    return bytes([SectionType.COMMAND]) + encode_be16(command) + encode_be16(len(payload)) + payload


def check_command(header: CommandHeader) -> Command:
    """Return the command a header names. Raises RemoteProtocolError for an unknown number or a wrong length."""
    length = len(header.payload)
    if header.number not in _KNOWN:
        raise RemoteProtocolError(
            f"MIG_CMD {header.number:#x} unknown (len {length:#x})", section="command", found=str(header.number)
        )
    command = Command(header.number)
    expected = LENGTHS[command]
    if expected not in (None, length):
        raise RemoteProtocolError(
            f"{command.name} received with bad length - expecting {expected}, got {length}", section="command"
        )
    return command


def ping_payload(value: int) -> bytes:
    """Return the payload of PING."""
    return encode_be32(value)


def encode_ping(value: int) -> bytes:
    """Encode a whole PING element."""
    return encode_command(Command.PING, ping_payload(value))


def parse_ping(payload: bytes) -> int:
    """Return the value of a PING that `check_command` let through."""
    return int.from_bytes(payload, "big")

"""COMMAND elements: bytes of the reference, the table of lengths, refusals in QEMU's words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.command import (
    LENGTHS,
    PEER_PING,
    PEER_PONG,
    Command,
    check_command,
    encode_command,
    encode_ping,
    parse_ping,
    ping_payload,
)
from migrated.wire.section import CommandHeader, parse_element
from tests.unit.wire.cuts import parse

# [V] a discard as a 7.2 source sends it: block pc.ram, 0x3e00000 bytes from 0x200000
DISCARD = bytes.fromhex("00 06 70632e72616d 00 0000000000200000 0000000003e00000")


def test_bytes() -> None:
    assert encode_command(Command.OPEN_RETURN_PATH) == bytes.fromhex("08 0001 0000")
    assert encode_ping(1) == bytes.fromhex("08 0002 0004 00000001")
    assert encode_ping(PEER_PING) == b"\x08\x00\x02\x00\x04MIGR"
    assert ping_payload(PEER_PONG) == b"MIGD"
    assert encode_command(Command.POSTCOPY_RAM_DISCARD, DISCARD) == b"\x08\x00\x06\x00\x19" + DISCARD


@pytest.mark.parametrize("command", LENGTHS)
def test_every_command_comes_back(command: Command) -> None:
    length = LENGTHS[command]
    payload = bytes(5 if length is None else length)
    header = parse(parse_element, encode_command(command, payload))
    assert header == CommandHeader(command, payload)
    assert isinstance(header, CommandHeader)
    assert check_command(header) is command


@pytest.mark.parametrize("number", [0, 12, 0x4D00, 0x4D06, 0xFFFF])
def test_unknown_numbers(number: int) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        check_command(CommandHeader(number, b"abcde"))
    assert caught.value.what == f"MIG_CMD {number:#x} unknown (len 0x5)"


@pytest.mark.parametrize("command", [command for command, length in LENGTHS.items() if length is not None])
def test_wrong_lengths(command: Command) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        check_command(CommandHeader(command, bytes(3)))
    assert caught.value.what == f"{command.name} received with bad length - expecting {LENGTHS[command]}, got 3"
    with pytest.raises(LocalProtocolError):
        encode_command(command, bytes(3))


def test_what_is_never_sent() -> None:
    with pytest.raises(LocalProtocolError, match="INVALID is never sent"):
        encode_command(Command.INVALID)
    with pytest.raises(LocalProtocolError, match="cannot carry 65536 bytes"):
        encode_command(Command.POSTCOPY_RAM_DISCARD, bytes(65536))


@given(st.integers(0, 2**32 - 1))
def test_ping_comes_back(value: int) -> None:
    assert parse_ping(ping_payload(value)) == value


@given(st.integers(0, 0xFFFF), st.binary(max_size=40))
def test_any_command_is_judged(number: int, payload: bytes) -> None:
    try:
        command = check_command(CommandHeader(number, payload))
    except RemoteProtocolError:
        return
    assert LENGTHS[command] in (None, len(payload))

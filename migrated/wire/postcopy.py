"""The payloads of the postcopy commands: advise, discard, packaged, received bitmap.

The rule of the file: encoders return whole COMMAND elements, parsers take the payload that `command.check_command` let
through, and a length is compared with its limit before anybody uses it. Whether a command is allowed *now* is
`model.postcopy`'s business, whether a range lies within a block that of whoever knows the block. Offsets and lengths
are bytes. Source: QEMU 7.2's MIG_CMD_POSTCOPY_*, MIG_CMD_PACKAGED, MIG_CMD_RECV_BITMAP; error texts are QEMU's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.command import Command, encode_command
from migrated.wire.primitives import decode_name, encode_be32, encode_be64, encode_counted_string

Offsets = NDArray[np.int64]

_ADVISE_BYTES = 16
_DISCARD_VERSION = 0
_RANGE = struct.Struct(">QQ")
#: QEMU's MAX_DISCARDS_PER_COMMAND.
RANGES_PER_DISCARD = 12
#: Version, an empty name, its NUL and one range, and a byte more: QEMU knows no block without a name.
_DISCARD_MIN_BYTES = 1 + 1 + 1 + 1 + _RANGE.size

#: A package is read whole before anything in it is looked at. It carries device sections and never RAM, and those of
#: a whole QEMU guest are some kilobytes; this leaves room for devices with memory of their own.
PACKAGE_MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Advise:
    """The source may change to postcopy. ``page_size_summary`` is the OR of the page sizes of all its RAM blocks."""

    page_size_summary: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Ranges of a block, as (start, length), that the destination must forget."""

    block: str
    ranges: tuple[tuple[int, int], ...]


# -- advise ----------------------------------------------------------------------------------------------------


def encode_advise(page_size_summary: int, page_size: int) -> bytes:
    """Encode the POSTCOPY_ADVISE of a source with postcopy-ram on."""
    return encode_command(Command.POSTCOPY_ADVISE, encode_be64(page_size_summary) + encode_be64(page_size))


def parse_advise(payload: bytes) -> Advise | None:
    """Return what the source advises; None from one whose RAM will not be postcopied (only dirty-bitmaps on)."""
    if not payload:
        return None
    if len(payload) != _ADVISE_BYTES:
        raise _refuse(f"CMD_POSTCOPY_ADVISE invalid length ({len(payload)})", expected="0 or 16")
    return Advise(*_RANGE.unpack(payload))


def check_advise(advise: Advise | None, local: Advise | None) -> None:
    """Raise RemoteProtocolError unless the source's advice fits what is here; None = no postcopy of RAM.

    ``local`` has the page sizes that blocks can have here: which one has which is seen when they are announced.
    """
    if advise is None:
        if local is not None:
            raise _refuse("RAM postcopy is enabled but have 0 byte advise")
        return
    if local is None:
        raise _refuse("RAM postcopy is disabled but have 16 byte advise")
    if not advise.page_size_summary or advise.page_size_summary & ~local.page_size_summary:
        sizes = f"s={advise.page_size_summary:x} d={local.page_size_summary:x}"
        raise _refuse(f"Postcopy needs matching RAM page sizes ({sizes})")
    if advise.page_size != local.page_size:
        raise _refuse(f"Postcopy needs matching target page sizes (s={advise.page_size} d={local.page_size})")


# -- discard ---------------------------------------------------------------------------------------------------


def encode_discards(block: str, starts: Offsets, ends: Offsets) -> bytes:
    """Encode the POSTCOPY_RAM_DISCARD commands for the bytes starts[i]..ends[i]-1 of every i; none where i is none.

    A range may be empty: a QEMU destination needs one discard before LISTEN, and an empty one will do.
    """
    starts, ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    if not block:
        raise LocalProtocolError("a discard needs the name of a RAM block")
    if starts.shape != ends.shape or starts.ndim != 1 or (starts < 0).any() or (starts > ends).any():
        raise LocalProtocolError(f"the ranges to discard of RAM block '{block}' are no ranges")
    ranges = np.empty((len(starts), 2), ">u8")
    ranges[:, 0] = starts
    ranges[:, 1] = ends - starts
    whole = len(ranges) // RANGES_PER_DISCARD * RANGES_PER_DISCARD
    return _discards(block, ranges[:whole], RANGES_PER_DISCARD) + _discards(block, ranges[whole:], len(ranges) - whole)


def _discards(block: str, ranges: NDArray[np.uint64], per_command: int) -> bytes:
    """Encode as many commands as there are groups of ``per_command`` ranges."""
    if not len(ranges):
        return b""
    # All commands of one size look alike but for their ranges: one row each.
    bodies = ranges.view(np.uint8).reshape(-1, per_command * _RANGE.size)
    head = bytes([_DISCARD_VERSION]) + encode_counted_string(block) + b"\0"
    first = encode_command(Command.POSTCOPY_RAM_DISCARD, head + bytes(bodies.shape[1]))
    prefix = first[: -bodies.shape[1]]
    commands = np.empty((len(bodies), len(first)), np.uint8)
    commands[:, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    commands[:, len(prefix) :] = bodies
    return commands.tobytes()


def parse_discard(payload: bytes) -> Discard:
    """Return what the source wants forgotten. A sender may put more than RANGES_PER_DISCARD ranges into one command."""
    if len(payload) < _DISCARD_MIN_BYTES:
        raise _refuse(f"CMD_POSTCOPY_RAM_DISCARD invalid length ({len(payload)})", expected="20 or more")
    if payload[0] != _DISCARD_VERSION:
        raise _refuse(f"CMD_POSTCOPY_RAM_DISCARD invalid version ({payload[0]})", expected=str(_DISCARD_VERSION))
    nil = 2 + payload[1]
    if nil >= len(payload):
        raise _refuse("CMD_POSTCOPY_RAM_DISCARD Failed to read RAMBlock ID", found=f"a name of {payload[1]} bytes")
    if payload[nil]:
        raise _refuse(f"CMD_POSTCOPY_RAM_DISCARD missing nil ({payload[nil]})")
    left = len(payload) - nil - 1
    if left % _RANGE.size:
        raise _refuse(f"CMD_POSTCOPY_RAM_DISCARD invalid length ({left})", expected="whole ranges of 16 bytes")
    block = decode_name(payload[2:nil], "a block name")
    return Discard(block, tuple((start, length) for start, length in _RANGE.iter_unpack(payload[nil + 1 :])))


# -- packaged, received bitmap ---------------------------------------------------------------------------------


def encode_packaged(size: int) -> bytes:
    """Encode the PACKAGED command; the ``size`` bytes of the package follow it."""
    if size > PACKAGE_MAX_BYTES:
        raise LocalProtocolError(f"a package has at most {PACKAGE_MAX_BYTES} bytes, not {size}")
    return encode_command(Command.PACKAGED, encode_be32(size))


def parse_packaged(payload: bytes) -> int:
    """Return how many bytes of package follow the command."""
    size = int.from_bytes(payload, "big")
    if size > PACKAGE_MAX_BYTES:
        raise _refuse(f"Unreasonably large packaged state: {size}", expected=f"at most {PACKAGE_MAX_BYTES} bytes")
    return size


def encode_recv_bitmap(block: str) -> bytes:
    """Encode the command that asks which pages of a block were received."""
    return encode_command(Command.RECV_BITMAP, encode_counted_string(block))


def parse_recv_bitmap(payload: bytes) -> str:
    """Return the block whose received bitmap the source wants."""
    if not payload or len(payload) != 1 + payload[0]:
        raise _refuse(f"RECV_BITMAP: invalid payload length ({len(payload)})", expected="one counted block name")
    return decode_name(payload[1:], "a block name")


def _refuse(what: str, *, expected: str = "", found: str = "") -> RemoteProtocolError:
    return RemoteProtocolError(what, section="command", expected=expected, found=found)

"""The frame of the stream: header, configuration, section headers and footers, EOF, VMDESCRIPTION.

The rule of the file: it frames, it does not judge. Whether a section is known, a machine type fits or a UUID is ours is
for the layers above; here nothing the peer sends becomes a length before it was compared with a limit.

Source of the format: QEMU 7.2's migration stream, version 3; error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.primitives import (
    decode_name,
    encode_be32,
    encode_counted_string,
    parse_be8,
    parse_be16,
    parse_be32,
    parse_name,
)
from migrated.wire.pull import Parser

STREAM_MAGIC = 0x5145564D
STREAM_VERSION = 3
#: Written and refused by QEMUs before 0.10.
OBSOLETE_VERSION = 2

#: Machine type names are short identifiers; QEMU itself sets no limit, its longest has 17 bytes.
MACHINE_TYPE_MAX_BYTES = 255
#: All QEMU versions together know fewer than 32 capabilities, and at most two of them are ever announced.
CAPABILITIES_MAX = 64
#: The largest description QEMU writes for a full PC has 99 KB; analyze-migration.py reads at most 10 MB.
VMDESCRIPTION_MAX_BYTES = 64 << 20
UUID_BYTES = 16
_SUBSECTION_VERSION = 1
_BRACE = ord("{")


class SectionType(IntEnum):
    """The byte every element of the stream begins with."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


EOF_BYTE = bytes([SectionType.EOF])
#: Kinds whose header carries idstr, instance and version.
FULL_HEADER_KINDS = frozenset({SectionType.START, SectionType.FULL})
SECTION_KINDS = FULL_HEADER_KINDS | {SectionType.PART, SectionType.END}


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the sender says about itself before the first section."""

    machine_type: str
    uuid: bytes | None = None
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """The head of a section; idstr, instance and version only travel with START and FULL."""

    kind: SectionType
    section_id: int
    idstr: str = ""
    instance_id: int = 0
    version_id: int = 0


@dataclass(frozen=True, slots=True)
class CommandHeader:
    """A COMMAND element with its payload; `command.check_command` says whether it is a legal one."""

    number: int
    payload: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EndOfFile:
    """The element that ends the element loop."""


Element = SectionHeader | CommandHeader | EndOfFile


# -- stream header ---------------------------------------------------------------------------------------------


def encode_stream_header() -> bytes:
    return encode_be32(STREAM_MAGIC) + encode_be32(STREAM_VERSION)


def parse_stream_header() -> Parser[None]:
    """Read magic and version."""
    magic = yield from parse_be32()
    if magic != STREAM_MAGIC:
        raise RemoteProtocolError("Not a migration stream", expected=f"{STREAM_MAGIC:#x}", found=f"{magic:#x}")
    version = yield from parse_be32()
    if version == OBSOLETE_VERSION:
        raise RemoteProtocolError(
            "SaveVM v2 format is obsolete and don't work anymore", expected=str(STREAM_VERSION), found=str(version)
        )
    if version != STREAM_VERSION:
        raise RemoteProtocolError(
            "Unsupported migration stream version", expected=str(STREAM_VERSION), found=str(version)
        )


# -- configuration ---------------------------------------------------------------------------------------------

_SECTION = "configuration"


def encode_configuration(configuration: Configuration) -> bytes:
    """Encode the CONFIGURATION section; subsections stand in QEMU's order and only where they say something."""
    machine_type = configuration.machine_type.encode()
    if len(machine_type) > MACHINE_TYPE_MAX_BYTES:
        raise LocalProtocolError(f"a machine type name has at most {MACHINE_TYPE_MAX_BYTES} bytes")
    parts = [bytes([SectionType.CONFIGURATION]), encode_be32(len(machine_type)), machine_type]
    if configuration.target_page_bits is not None:
        parts += _subsection("target-page-bits", encode_be32(configuration.target_page_bits))
    if configuration.capabilities:
        names = b"".join(encode_counted_string(name) for name in configuration.capabilities)
        parts += _subsection("capabilities", encode_be32(len(configuration.capabilities)) + names)
    if configuration.uuid is not None:
        if len(configuration.uuid) != UUID_BYTES:
            raise LocalProtocolError(f"a UUID has {UUID_BYTES} bytes, not {len(configuration.uuid)}")
        parts += _subsection("uuid", configuration.uuid)
    return b"".join(parts)


def _subsection(name: str, body: bytes) -> list[bytes]:
    head = bytes([SectionType.SUBSECTION]) + encode_counted_string(f"{_SECTION}/{name}")
    return [head, encode_be32(_SUBSECTION_VERSION), body]


def parse_preamble() -> Parser[tuple[Configuration, int]]:
    """Read the CONFIGURATION section from its type byte on.

    Only the byte behind it tells that no further subsection follows, so that byte is returned, too: it is the type of
    the first element (`parse_element` takes it).
    """
    kind = yield from parse_be8()
    if kind != SectionType.CONFIGURATION:
        raise RemoteProtocolError(
            "Configuration section missing", expected=f"{SectionType.CONFIGURATION:#04x}", found=f"{kind:#04x}"
        )
    length = yield from parse_be32()
    _check_limit("machine type name", length, MACHINE_TYPE_MAX_BYTES)
    machine_type = decode_name((yield length), "the machine type name") if length else ""
    found: dict[str, Any] = {}
    while (following := (yield from parse_be8())) == SectionType.SUBSECTION:
        name = yield from parse_name()
        _check_subsection(name, found)
        version = yield from parse_be32()
        if version != _SUBSECTION_VERSION:
            raise RemoteProtocolError(
                f"unsupported version of subsection {name}",
                section=_SECTION, expected=str(_SUBSECTION_VERSION), found=str(version),
            )  # fmt: skip
        member, parse_body = _SUBSECTIONS[name]
        found[member] = yield from parse_body()
    return Configuration(machine_type, **found), following


def _check_subsection(name: str, found: dict[str, Any]) -> None:
    if name not in _SUBSECTIONS:
        raise RemoteProtocolError(
            "unknown subsection", section=_SECTION, expected="one of " + ", ".join(_SUBSECTIONS), found=name
        )
    if _SUBSECTIONS[name][0] in found:
        raise RemoteProtocolError("subsection sent twice", section=_SECTION, found=name)


def _check_limit(what: str, length: int, limit: int) -> None:
    if length > limit:
        raise RemoteProtocolError(
            f"{what} is too long", section=_SECTION, expected=f"at most {limit}", found=str(length)
        )


def _parse_capabilities() -> Parser[tuple[str, ...]]:
    count = yield from parse_be32()
    _check_limit("list of capabilities", count, CAPABILITIES_MAX)
    names: list[str] = []
    while len(names) < count:
        names.append((yield from parse_name()))
    return tuple(names)


def _parse_uuid() -> Parser[bytes]:
    return (yield UUID_BYTES)


_SUBSECTIONS: dict[str, tuple[str, Callable[[], Parser[Any]]]] = {
    f"{_SECTION}/target-page-bits": ("target_page_bits", parse_be32),
    f"{_SECTION}/capabilities": ("capabilities", _parse_capabilities),
    f"{_SECTION}/uuid": ("uuid", _parse_uuid),
}


# -- elements --------------------------------------------------------------------------------------------------


def encode_section_header(header: SectionHeader) -> bytes:
    """Encode a section's head: the long one for START and FULL, type and id alone for PART and END."""
    if header.kind not in SECTION_KINDS:
        raise LocalProtocolError(f"{header.kind.name} is not a section")
    head = bytes([header.kind]) + encode_be32(header.section_id)
    if header.kind not in FULL_HEADER_KINDS:
        return head
    idstr = encode_counted_string(header.idstr)
    return head + idstr + encode_be32(header.instance_id) + encode_be32(header.version_id)


def encode_footer(section_id: int) -> bytes:
    return bytes([SectionType.FOOTER]) + encode_be32(section_id)


def footer_pattern(section_id: int) -> re.Pattern[bytes]:
    """Return what finds a section's footer together with the beginning of the element behind it."""
    following = bytes(sorted({SectionType.EOF, SectionType.COMMAND, *SECTION_KINDS}))
    return re.compile(re.escape(encode_footer(section_id)) + b"(?=[" + re.escape(following) + b"])", re.DOTALL)


def parse_element(first: int | None = None) -> Parser[Element]:
    """Read the next element up to where its body begins; ``first`` is its type byte if that was read already."""
    kind = first if first is not None else (yield from parse_be8())
    if kind == SectionType.EOF:
        return EndOfFile()
    if kind == SectionType.COMMAND:
        number = yield from parse_be16()
        length = yield from parse_be16()
        return CommandHeader(number, (yield length) if length else b"")
    if kind not in SECTION_KINDS:
        raise RemoteProtocolError(f"Unknown savevm section type {kind}")
    section_id = yield from parse_be32()
    if kind not in FULL_HEADER_KINDS:
        return SectionHeader(SectionType(kind), section_id)
    idstr = yield from parse_name()
    if not idstr:
        raise RemoteProtocolError(f"Unable to read ID string for section {section_id}")
    instance_id = yield from parse_be32()
    version_id = yield from parse_be32()
    return SectionHeader(SectionType(kind), section_id, idstr, instance_id, version_id)


def parse_footer(section_id: int, idstr: str) -> Parser[None]:
    """Read the footer of the section ``section_id``; ``idstr`` is for the error texts."""
    kind = yield from parse_be8()
    if kind != SectionType.FOOTER:
        raise RemoteProtocolError(
            f"Missing section footer for {idstr}",
            section=idstr, expected=f"{SectionType.FOOTER:#04x}", found=f"{kind:#04x}",
        )  # fmt: skip
    read = yield from parse_be32()
    if read != section_id:
        raise RemoteProtocolError(
            f"Mismatched section id in footer for {idstr} - read {read:#x} expected {section_id:#x}", section=idstr
        )


# -- the end ---------------------------------------------------------------------------------------------------


def encode_vmdescription(text: str) -> bytes:
    """Encode the description that follows EOF.

    analyze-migration.py looks for the first brace behind the last NUL of a capture, and that NUL may be in the length:
    no byte of the length may be a brace, no byte of the text a NUL. Blanks before the last character see to it.
    """
    raw = text.encode()
    if b"\0" in raw:
        raise LocalProtocolError("a VMDESCRIPTION contains no NUL")
    length = len(raw)
    for shift in (16, 8, 0):
        if length >> shift & 0xFF == _BRACE:
            length = ((length >> shift) + 1) << shift
    if length > VMDESCRIPTION_MAX_BYTES:
        raise LocalProtocolError(f"a VMDESCRIPTION has at most {VMDESCRIPTION_MAX_BYTES} bytes, not {length}")
    padded = raw[:-1] + b" " * (length - len(raw)) + raw[-1:]
    return bytes([SectionType.VMDESCRIPTION]) + encode_be32(length) + padded


def parse_vmdescription_length() -> Parser[int]:
    """Read type and length of the description; its text is for tools and may be dropped."""
    kind = yield from parse_be8()
    if kind != SectionType.VMDESCRIPTION:
        raise RemoteProtocolError(
            f"Expected vmdescription section, but got {kind}", expected=str(SectionType.VMDESCRIPTION.value)
        )
    length = yield from parse_be32()
    if length > VMDESCRIPTION_MAX_BYTES:
        raise RemoteProtocolError(
            "VMDESCRIPTION is too long", expected=f"at most {VMDESCRIPTION_MAX_BYTES} bytes", found=f"{length} bytes"
        )
    return length

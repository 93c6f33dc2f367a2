"""The sections a `migrated` source is going to send, said before the first of them: a peer extension.

The rule of the file: it says what a section header will say, and nothing of what is in the section. Sent only to a peer
that has shown, by a bit of its features, that it knows this command. A list that does not fit one command goes on in
the next; each says whether another one follows.

    X_SECTIONS: u8 more, [ counted idstr, be32 instance_id, be32 version_id, u8 how ]*      how: 0x01 live, 0x04 FULL
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from migrated.errors import RemoteProtocolError
from migrated.wire.command import PAYLOAD_MAX_BYTES, Command, encode_command
from migrated.wire.primitives import encode_be32, encode_counted_string, parse_be8, parse_be32, parse_name
from migrated.wire.pull import Parser, feed
from migrated.wire.section import SectionType

#: Four times as many devices as workloads may declare.
SECTIONS_MAX = 4096
_HOW = {SectionType.START: True, SectionType.FULL: False}
_MORE = 1


@dataclass(frozen=True, slots=True)
class AnnouncedSection:
    """One handler that will send: ``live``, in parts from START to END, or all at once in a FULL section."""

    idstr: str
    instance_id: int
    version_id: int
    live: bool

    def __str__(self) -> str:
        return f"{self.idstr}/{self.instance_id}"


def encode_announcement(sections: Iterable[AnnouncedSection]) -> bytes:
    """Encode the whole list, as one command or several."""
    payloads = [bytearray()]
    for section in sections:
        entry = _encode(section)
        if 1 + len(payloads[-1]) + len(entry) > PAYLOAD_MAX_BYTES:
            payloads.append(bytearray())
        payloads[-1] += entry
    last = len(payloads) - 1
    return b"".join(
        encode_command(Command.X_SECTIONS, bytes([_MORE * (at < last)]) + payload)
        for at, payload in enumerate(payloads)
    )


def _encode(section: AnnouncedSection) -> bytes:
    how = SectionType.START if section.live else SectionType.FULL
    numbers = encode_be32(section.instance_id) + encode_be32(section.version_id)
    return encode_counted_string(section.idstr) + numbers + bytes([how])


def parse_announcement(payload: bytes) -> tuple[list[AnnouncedSection], bool]:
    """Return what one command lists, and whether another one follows. Raises RemoteProtocolError."""
    return feed(_parse(len(payload)), [payload])


def _parse(length: int) -> Parser[tuple[list[AnnouncedSection], bool]]:
    more = yield from parse_be8()
    if more not in (0, _MORE):
        raise RemoteProtocolError("X_SECTIONS goes on or not", section="command", expected="0 or 1", found=str(more))
    sections = []
    left = length - 1
    while left > 0:
        idstr = yield from parse_name()
        instance_id = yield from parse_be32()
        version_id = yield from parse_be32()
        how = yield from parse_be8()
        if how not in _HOW or not idstr:
            raise RemoteProtocolError(
                "X_SECTIONS lists no section",
                section="command",
                expected="a name, and 1 or 4",
                found=f"{idstr!r}, {how}",
            )
        sections.append(AnnouncedSection(idstr, instance_id, version_id, _HOW[SectionType(how)]))
        left -= 1 + len(idstr.encode()) + 4 + 4 + 1
    return sections, bool(more)

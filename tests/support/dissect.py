"""An independent reader of captured migration streams, in the manner of QEMU's analyze-migration script.

The rule of the file: written from the description of the format and nothing else (nothing of the product is imported),
plain and slow, and strict: whatever is not exactly as described is a `BadStreamError` with the offset.

    QEVM, version 3, CONFIGURATION, [ COMMAND ]*, [ section, footer ]*, EOF, VMDESCRIPTION, and nothing behind it

A postcopy has no description, the devices in a PACKAGED command, and may go on over further connections:

    ... ADVISE, START, PARTs, RAM_DISCARDs, PACKAGED{ LISTEN, FULLs, PING, RUN }, PARTs, END, EOF, and nothing behind it
    RECV_BITMAP of each block, POSTCOPY_RESUME, PARTs, END, EOF
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from xxhash import xxh3_64

from tests.support.dissect_fields import BadFieldsError, read_section

PAGE = 4096
KINDS = {1: "START", 2: "PART", 3: "END", 4: "FULL"}
#: Commands.
PING, ADVISE, LISTEN, RUN, DISCARD, PACKAGED, RESUME, RECV_BITMAP = 2, 3, 4, 5, 6, 7, 9, 10
OFFER, COMMIT, CHECKSUM, PREFLIGHT = 0x4D02, 0x4D03, 0x4D05, 0x4D10
#: Bits of a page record's first word.
ZERO, MEM_SIZE, WHOLE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20


class BadStreamError(Exception):
    """The stream is not as described."""


class CutStreamError(BadStreamError):
    """The stream ends in the middle."""


@dataclass
class Section:
    """One section; ``body`` is empty for RAM, whose content is in `Dissection.memory`."""

    kind: str
    number: int
    idstr: str
    instance: int
    version: int
    offset: int
    body: bytes = b""


@dataclass
class Dissection:
    """All that a stream says."""

    machine_type: str = ""
    configuration: dict[str, bytes] = field(default_factory=dict)
    commands: list[tuple[int, bytes]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    blocks: dict[str, int] = field(default_factory=dict)
    memory: dict[str, bytearray] = field(default_factory=dict)
    seen: dict[str, set[int]] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    description_length: int = 0
    states: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """The fields of every device, as the description says how to read them."""
    borders: list[int] = field(default_factory=list)
    """Offsets at which an element begins."""
    discarded: dict[str, set[int]] = field(default_factory=dict)
    """Postcopy: the pages that the destination was told to drop."""
    early: dict[str, set[int]] = field(default_factory=dict)
    """Postcopy: the pages that came before the package, and stayed."""

    def devices(self) -> list[Section]:
        """Return the FULL sections."""
        return [section for section in self.sections if section.kind == "FULL"]

    def missing(self) -> dict[str, int]:
        """Return how many pages of which block never came."""
        counts = {name: size // PAGE - len(self.seen[name]) for name, size in self.blocks.items()}
        return {name: count for name, count in counts.items() if count}


def dissect(stream: bytes) -> Dissection:
    """Read a whole stream; raise BadStreamError unless it ends exactly where it should."""
    return _Dissector(stream).run()


def dissect_postcopy(stream: bytes, *resumed: bytes) -> Dissection:
    """Read a whole postcopy: one connection that ends in order, or several, of which all but the last were cut."""
    return _PostcopyDissector(stream).run_all(*resumed)


class _Dissector:
    def __init__(self, stream: bytes) -> None:
        self._stream = stream
        self._at = 0
        self._block = ""
        self._known: dict[int, Section] = {}
        self._sizes: dict[tuple[str, int], int] = {}
        self.found = Dissection()

    def run(self) -> Dissection:
        self._sizes = _device_sizes(self._stream)
        self._preamble()
        while (kind := self._element()) != 0:
            if kind == 8:
                number, length = self._number(2), self._number(2)
                self.found.commands.append((number, self._take(length)))
            elif kind in KINDS:
                self._section(KINDS[kind])
            else:
                raise self._bad(f"no element has the type {kind}")
        self._description()
        if self._at != len(self._stream):
            raise self._bad(f"{len(self._stream) - self._at} bytes behind the end")
        self._check_order()
        return self.found

    def _bad(self, what: str) -> BadStreamError:
        return BadStreamError(f"{what} (offset {self._at:#x})")

    def _take(self, count: int) -> bytes:
        data = self._stream[self._at : self._at + count]
        if len(data) < count:
            raise CutStreamError(f"the stream ends: {count} bytes wanted, {len(data)} there (offset {self._at:#x})")
        self._at += count
        return data

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "big")

    def _text(self) -> str:
        return self._take(self._number(1)).decode()

    def _element(self) -> int:
        self.found.borders.append(self._at)
        return self._number(1)

    def _preamble(self) -> None:
        if self._take(8) != b"QEVM\x00\x00\x00\x03":
            raise self._bad("no magic, or not version 3")
        if self._element() != 7:
            raise self._bad("no configuration")
        self.found.machine_type = self._take(self._number(4)).decode()
        while self._stream[self._at : self._at + 1] == b"\x05":
            self._take(1)
            name, version = self._text(), self._number(4)
            if version != 1 or name in self.found.configuration:
                raise self._bad(f"subsection {name} v{version}")
            self.found.configuration[name] = self._subsection(name)

    def _subsection(self, name: str) -> bytes:
        match name:
            case "configuration/uuid":
                return self._take(16)
            case "configuration/target-page-bits":
                return self._take(4)
            case "configuration/capabilities":
                return b",".join(self._text().encode() for _ in range(self._number(4)))
        raise self._bad(f"unknown subsection {name}")

    # -- sections ----------------------------------------------------------------------------------------------

    def _section(self, kind: str) -> None:
        offset, number = self._at - 1, self._number(4)
        if kind in ("START", "FULL"):
            section = Section(kind, number, self._text(), self._number(4), self._number(4), offset)
            if number in self._known:
                raise self._bad(f"section {number} starts twice")
            self._known[number] = section
        else:
            if number not in self._known:
                raise self._bad(f"section {number} goes on and never started")
            started = self._known[number]
            section = Section(kind, number, started.idstr, started.instance, started.version, offset)
        self.found.sections.append(section)
        if section.idstr == "ram":
            if (section.instance, section.version) != (0, 4):
                raise self._bad(f"ram {section.instance} v{section.version}")
            self._ram()
        else:
            section.body = self._take(self._size_of(section))
        if self._number(1) != 0x7E or self._number(4) != number:
            raise self._bad(f"no footer of section {number} ({section.idstr})")

    def _size_of(self, section: Section) -> int:
        try:
            return self._sizes[section.idstr, section.instance]
        except KeyError:
            raise self._bad(f"the description says nothing of {section.idstr}/{section.instance}") from None

    def _ram(self) -> None:
        while True:
            word = self._number(8)
            offset, flags = word & ~0xFFF, word & 0xFFF
            if word == EOS:
                return
            if flags == MEM_SIZE:
                self._block_list(offset)
            elif flags & ~CONTINUE in (ZERO, WHOLE):
                self._page(offset, flags)
            else:
                raise self._bad(f"a record with the flags {flags:#x}")

    def _block_list(self, total: int) -> None:
        if self.found.blocks:
            raise self._bad("a second block list")
        while sum(self.found.blocks.values()) < total:
            name, length = self._text(), self._number(8)
            if name in self.found.blocks or not length or length % PAGE:
                raise self._bad(f"block {name} of {length} bytes")
            self.found.blocks[name] = length
            self.found.memory[name] = bytearray(length)
            self.found.seen[name] = set()
        if sum(self.found.blocks.values()) != total:
            raise self._bad("the blocks are more than their total")

    def _page(self, offset: int, flags: int) -> None:
        if not flags & CONTINUE:
            self._block = self._text()
        if self._block not in self.found.blocks:
            raise self._bad(f"a page of block {self._block!r}")
        if offset >= self.found.blocks[self._block]:
            raise self._bad(f"offset {offset:#x} is outside block {self._block}")
        if flags & ZERO:
            if fill := self._number(1):
                raise self._bad(f"a zero page with {fill}")
            page = bytes(PAGE)
        else:
            page = self._take(PAGE)
        self.found.memory[self._block][offset : offset + PAGE] = page
        self.found.seen[self._block].add(offset // PAGE)

    # -- the end -----------------------------------------------------------------------------------------------

    def _description(self) -> None:
        if self._element() != 6:
            raise self._bad("no description behind EOF")
        length = self._take(4)
        text = self._take(int.from_bytes(length, "big"))
        self.found.description_length = len(text)
        if b"{" in length or b"\0" in text:
            raise self._bad("analyze-migration.py could not find this description")
        self.found.description = json.loads(text)
        if self.found.description["page_size"] != PAGE:
            raise self._bad("the description has another page size")
        listed = [(d["name"], d["instance_id"], _size(d)) for d in self.found.description["devices"]]
        sent = [(s.idstr, s.instance, len(s.body)) for s in self.found.devices()]
        if listed != sent:
            raise self._bad(f"the description lists {listed}, the stream has {sent}")
        for section, entry in zip(self.found.devices(), self.found.description["devices"], strict=True):
            try:
                self.found.states[section.idstr, section.instance] = read_section(entry, section.body)
            except BadFieldsError as error:
                raise self._bad(str(error)) from error
            if entry.get("version", section.version) != section.version:
                raise self._bad(f"{section.idstr} is v{section.version}, and described as v{entry['version']}")

    def _check_order(self) -> None:
        """START before PART before END of each live section; all of them before the first FULL one."""
        rank = {"START": 0, "PART": 1, "END": 2, "FULL": 3}
        kinds = [section.kind for section in self.found.sections]
        if kinds != sorted(kinds, key=rank.__getitem__):
            raise self._bad(f"sections come in the order {kinds}")
        live = {s.number for s in self.found.sections if s.kind == "START"}
        if live != {s.number for s in self.found.sections if s.kind == "END"}:
            raise self._bad("a live section has no end")


class _PostcopyDissector(_Dissector):
    """Beside a stream of its own format: after the package no page comes twice over one connection."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._offered = b""
        self._summed = 0
        self._advised = self._listening = self._ran = self._ended = False
        self._here: dict[str, set[int]] = {}

    def run_all(self, *resumed: bytes) -> Dissection:
        self._preamble()
        for following in resumed:
            try:
                self._elements()
            except CutStreamError:
                self._next(following)
            else:
                raise self._bad("a whole stream, and yet another connection")
        self._elements()
        if self._at != len(self._stream):
            raise self._bad(f"{len(self._stream) - self._at} bytes behind the end")
        if not self._ran or not self._ended:
            raise self._bad("the end without a package, or without an END of ram")
        return self.found

    def _next(self, stream: bytes) -> None:
        """Go on with another connection, which begins with questions: nobody remembers the last block."""
        self._stream, self._at, self._block = stream, 0, ""
        self._here = {name: set() for name in self.found.blocks}
        asked = set()
        for _ in self.found.blocks:
            number, payload = self._command()
            if number != RECV_BITMAP or payload[0] != len(payload) - 1:
                raise self._bad(f"command {number} where a block's bitmap should be asked for")
            asked.add(payload[1:].decode())
        if asked != set(self.found.blocks) or self._command() != (RESUME, b""):
            raise self._bad(f"asked for {sorted(asked)}, or no POSTCOPY_RESUME behind that")

    def _command(self) -> tuple[int, bytes]:
        if self._element() != 8:
            raise self._bad("no command")
        self.found.commands.append((self._number(2), self._take(self._number(2))))
        return self.found.commands[-1]

    def _elements(self) -> None:
        while (kind := self._element()) != 0:
            if kind == 8:
                self.found.commands.append((self._number(2), self._take(self._number(2))))
                self._obey(*self.found.commands[-1])
            elif kind in KINDS:
                before = len(self.found.sections)
                self._section(KINDS[kind])
                self._check_section(self.found.sections[before])
            else:
                raise self._bad(f"no element has the type {kind}")

    def _check_section(self, section: Section) -> None:
        if (section.idstr == "ram") == (self._listening and not self._ran) or self._ended:
            raise self._bad(f"{section.kind} of {section.idstr} at this place")
        self._ended = section.kind == "END"
        if self._ended and not self._ran:
            raise self._bad("END before the package")

    def _obey(self, number: int, payload: bytes) -> None:
        if number == ADVISE:
            if self._advised or self.found.blocks or payload != PAGE.to_bytes(8, "big") * 2:
                raise self._bad("a second ADVISE, a late one, or one of other page sizes")
            self._advised = True
        elif number == DISCARD:
            self._discard(payload)
        elif number == PACKAGED:
            self._package(int.from_bytes(payload, "big"))
        elif number == PREFLIGHT and not self.found.blocks:
            return  # what follows, for a `migrated` destination
        elif number == OFFER and not self.found.blocks:
            self._offered, self._summed = payload, self._at
        elif number == CHECKSUM:
            self._check_sum(payload)
        elif number == COMMIT and self._ran:
            # What was offered, or with another epoch, and that memory follows.
            size = 1 + self._offered[0]
            if payload[:size] != self._offered[:size] or payload[size + 8 :] != b"\x01":
                raise self._bad("a commit of another offer")
        elif number != PING and self._advised:
            raise self._bad(f"command {number} at this place")

    def _check_sum(self, payload: bytes) -> None:
        if xxh3_64(self._stream[self._summed : self._at - len(payload)]).digest() != payload:
            raise self._bad("a checksum of something else")
        self._summed = self._at

    def _discard(self, payload: bytes) -> None:
        name_end = 2 + payload[1]
        block, ranges = payload[2:name_end].decode(), payload[name_end + 1 :]
        if payload[0] or payload[name_end] or len(ranges) % 16 or len(ranges) > 12 * 16 or self._listening:
            raise self._bad("a discard that is late, or not version 0, a block, NUL and at most 12 ranges")
        for at in range(0, len(ranges), 16):
            start, length = (int.from_bytes(ranges[at + i : at + i + 8], "big") for i in (0, 8))
            if start % PAGE or length % PAGE or start + length > self.found.blocks[block]:
                raise self._bad(f"discard of {length:#x} bytes from {start:#x} of block {block}")
            pages = range(start // PAGE, (start + length) // PAGE)
            self.found.discarded.setdefault(block, set()).update(pages)
            self.found.seen[block].difference_update(pages)

    def _package(self, size: int) -> None:
        if not self.found.discarded or self._ran:
            raise self._bad("a package without a discard before it, or a second one")
        self.found.early = {name: set(pages) for name, pages in self.found.seen.items()}
        self._here = {name: set(pages) for name, pages in self.found.seen.items()}
        end = self._at + size
        self._listening = True
        self._summed = self._at
        if self._command() != (LISTEN, b""):
            raise self._bad("a package begins with LISTEN")
        while self._stream[self._at : self._at + 1] == b"\x04":
            self._element()
            before = len(self.found.sections)
            self._section("FULL")
            self._check_section(self.found.sections[before])
            if self._offered and self._command()[0] == CHECKSUM:
                self._check_sum(self.found.commands[-1][1])
        if self._command()[0] != PING or self._command() != (RUN, b"") or self._at != end:
            raise self._bad("a package ends with PING and RUN")
        self._ran = True

    def _size_of(self, section: Section) -> int:
        """Find a body's end: its footer, and the next section or command behind it. Nobody describes it here."""
        footer, at = b"\x7e" + section.number.to_bytes(4, "big"), self._at
        while (at := self._stream.find(footer, at)) >= 0:
            if self._stream[at + 5] in (4, 8):
                return at - self._at
            at += 1
        raise self._bad(f"no end of {section.idstr}")

    def _page(self, offset: int, flags: int) -> None:
        super()._page(offset, flags)
        if self._listening:
            if offset // PAGE in self._here[self._block]:
                raise self._bad(f"page {offset:#x} of block {self._block} comes once more: a QEMU exits on that")
            self._here[self._block].add(offset // PAGE)


def _device_sizes(stream: bytes) -> dict[tuple[str, int], int]:
    """Find the description as analyze-migration.py does, and return each device's body size."""
    start = stream.rfind(b"\0")
    brace = stream.find(b"{", start)
    if brace < 5 or stream[brace - 5] != 6:
        raise BadStreamError("no description where analyze-migration.py looks for it")
    devices = json.loads(stream[brace:])["devices"]
    return {(device["name"], device["instance_id"]): _size(device) for device in devices}


def _size(entry: dict[str, Any]) -> int:
    """Return the bytes a description entry stands for: its own ``size``, or the sum of its fields and subsections."""
    if "size" in entry:
        return int(entry["size"])
    total = sum(int(item["size"]) * int(item.get("array_len", 1)) for item in entry.get("fields", []))
    for sub in entry.get("subsections", []):
        total += 1 + 1 + len(sub["vmsd_name"]) + 4 + _size(sub)
    return total

"""What a stream amounts to for a destination that takes it: memory, devices, run state; and where its numbers are.

The rule of the file: written from the description of the format, and as lenient as a destination may be. `dissect`
says whether a stream is as a source should write it; this says what one means that is a little odd and still whole.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from tests.support.craft import COMMIT, CONTINUE, END, EOS, FULL, MEM_SIZE, PAGE, PART, START, WHOLE, ZERO

FLAGS = PAGE - 1
GLOBALSTATE_BYTES = 100
TIMER_BYTES = 24
#: Run states in which a machine does not arrive: it comes paused.
PASSING = ("inmigrate", "finish-migrate", "restore-vm", "save-vm", "colo")


class NoGistError(Exception):
    """The stream breaks off, or says something that has no meaning."""


@dataclass
class Gist:
    """What the stream says, and its anatomy."""

    memory: dict[str, bytearray] = field(default_factory=dict)
    devices: dict[str, bytes] = field(default_factory=dict)
    run_state: str = "running"
    numbers: list[tuple[int, int]] = field(default_factory=list)
    """(offset, bytes) of every number: lengths, counts, ids, flags, types."""
    elements: list[int] = field(default_factory=list)
    """Where an element begins."""
    records: list[int] = field(default_factory=list)
    """Where a record of the "ram" section begins."""


def read(stream: bytes) -> Gist:
    """Read a whole stream. Raises NoGistError."""
    return _Reader(stream).run()


class _Reader:
    def __init__(self, stream: bytes) -> None:
        self._stream = stream
        self._at = 0
        self._block = ""
        self._titles: dict[int, str] = {}
        self._gist = Gist()

    def run(self) -> Gist:
        self._take(8)
        self._gist.elements.append(self._at)
        self._number(1)
        self._take(self._number(4))
        while self._stream[self._at : self._at + 1] == b"\x05":
            self._subsection()
        while (kind := self._element()) != 0:
            if kind == 8:
                self._number(2)
                self._take(self._number(2))
            elif kind in (START, PART, END, FULL):
                self._section(kind)
            else:
                raise NoGistError(f"element {kind}")
        self._element()
        self._take(self._number(4))
        with contextlib.suppress(NoGistError):  # what is behind a whole machine does not change what it is
            while self._element() == 8 and self._number(2) != COMMIT:
                self._take(self._number(2))
            self._take(self._number(2))
        return self._gist

    def _take(self, count: int) -> bytes:
        data = self._stream[self._at : self._at + count]
        if len(data) < count:
            raise NoGistError(f"{count} bytes wanted at {self._at:#x}, {len(data)} there")
        self._at += count
        return data

    def _number(self, count: int) -> int:
        self._gist.numbers.append((self._at, count))
        return int.from_bytes(self._take(count), "big")

    def _text(self) -> str:
        return self._take(self._number(1)).decode()

    def _element(self) -> int:
        self._gist.elements.append(self._at)
        return self._number(1)

    def _subsection(self) -> None:
        self._number(1)
        title = self._text()
        self._number(4)
        match title:
            case "configuration/uuid":
                self._take(16)
            case "configuration/target-page-bits":
                self._number(4)
            case "configuration/capabilities":
                for _ in range(self._number(4)):
                    self._text()
            case _:
                raise NoGistError(f"subsection {title}")

    def _section(self, kind: int) -> None:
        number = self._number(4)
        if kind in (START, FULL):
            self._titles[number] = self._text()
            self._number(4)
            self._number(4)
        match self._titles.get(number):
            case None:
                raise NoGistError(f"section {number} never began")
            case "ram":
                self._ram()
            case "globalstate":
                self._number(4)
                name = self._take(GLOBALSTATE_BYTES).split(b"\0")[0].decode()
                self._gist.run_state = "paused" if name in PASSING else name or "running"
            case "timer":
                self._take(TIMER_BYTES)
            case title:
                self._gist.devices[title] = self._take(self._number(4))
        self._number(1)
        self._number(4)

    def _ram(self) -> None:
        while True:
            self._gist.records.append(self._at)
            word = self._number(8)
            flags, offset = word & FLAGS, word & ~FLAGS
            if flags == EOS:
                return
            if flags == MEM_SIZE:
                self._block_list(offset)
                continue
            if not flags & CONTINUE:
                self._block = self._text()
            memory = self._gist.memory.get(self._block)
            if memory is None or offset >= len(memory) or flags & ~CONTINUE not in (ZERO, WHOLE):
                raise NoGistError(f"record {word:#x} of block {self._block!r}")
            memory[offset : offset + PAGE] = self._take(PAGE) if flags & WHOLE else self._take(1) * PAGE

    def _block_list(self, left: int) -> None:
        while left > 0:
            name, length = self._text(), self._number(8)
            self._gist.memory[name] = bytearray(min(length, left))
            left -= length or 1

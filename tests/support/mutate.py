"""Damage to migration streams, by a seeded generator: the same seed, the same damage.

The rule of the file: it knows where a stream has its numbers, elements and records (`gist`), because damage anywhere
would mostly hit the content of a page; and it says what it did, so that a failure can be understood.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.support import gist

#: What a length is replaced by.
EDGES = (0, 1, 2, 0x7FF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
#: Texts that mean something in a stream, and one that does not.
WORDS = (
    b"ram", b"mem0", b"vram", b"disk", b"timer", b"globalstate", b"none", b"paused", b"running", b"inmigrate", b"colo",
    b"postmigrate", b"save-vm", b"restore-vm", b"finish-migrate", b"prelaunch", b"shutdown", b"suspended", b"\xff\xfe",
)  # fmt: skip
#: More would only hide each other: what is refused first is all that counts.
STEPS_MAX = 3


@dataclass(frozen=True)
class Damaged:
    """A stream, and what was done to it."""

    stream: bytes
    what: str


class Mutator:
    """Makes damaged streams out of good ones."""

    def __init__(self, streams: Sequence[bytes]) -> None:
        self._anatomy = [(stream, gist.read(stream)) for stream in streams]
        self._steps: list[Callable[[random.Random, bytearray, gist.Gist], str]] = [
            self._flip, self._scribble, self._number, self._number, self._number, self._cut, self._remove,
            self._double, self._swap, self._insert, self._word, self._transplant,
        ]  # fmt: skip

    def damage(self, seed: str) -> Damaged:
        """Return the damaged stream of this seed."""
        generator = random.Random(seed)
        index = generator.randrange(len(self._anatomy))
        stream, anatomy = self._anatomy[index]
        data = bytearray(stream)
        steps = generator.choices(self._steps, k=generator.randint(1, STEPS_MAX))
        done = "; ".join(step(generator, data, anatomy) for step in steps)
        return Damaged(bytes(data), f"stream {index}: {done}")

    # -- bytes -------------------------------------------------------------------------------------------------

    def _flip(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        at = _place(generator, data, anatomy)
        bit = generator.randrange(8)
        data[at : at + 1] = bytes([byte ^ 1 << bit for byte in data[at : at + 1]])
        return f"bit {bit} of {at:#x} flipped"

    def _scribble(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        at = _place(generator, data, anatomy)
        noise = generator.randbytes(generator.choice((1, 1, 2, 4, 16)))
        data[at : at + len(noise)] = noise
        return f"{noise.hex()} over {at:#x}"

    def _insert(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        at = _place(generator, data, anatomy)
        noise = generator.choice((bytes, generator.randbytes))(generator.choice((1, 2, 8, 100, 5000)))
        data[at:at] = noise
        return f"{len(noise)} bytes inserted at {at:#x}"

    def _cut(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        at = _place(generator, data, anatomy)
        del data[at:]
        return f"cut at {at:#x}"

    # -- what means something ----------------------------------------------------------------------------------

    def _number(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        at, width = generator.choice(anatomy.numbers)
        value = generator.choice(EDGES) % 256**width
        data[at : at + width] = value.to_bytes(width, "big")
        return f"{value:#x} in the {width} bytes at {at:#x}"

    def _word(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        here = [word for word in WORDS if word in data]
        if not here:
            return "no word to replace"
        old, new = generator.choice(here), generator.choice(WORDS)
        at = data.find(old)
        if generator.random() < 0.5:
            # With its count, if it has one: another text, and nothing else.
            for width, extra in ((1, 0), (4, 0), (4, 1)):
                if data[at - width : at] == (len(old) + extra).to_bytes(width, "big"):
                    data[at - width : at] = (len(new) + extra).to_bytes(width, "big")
        # What is padded stays as long as it was.
        padded = data[at + len(old) : at + len(old) + 1] == b"\0"
        end = at + (max(len(old), len(new)) if padded else len(old))
        data[at:end] = new.ljust(end - at, b"\0") if padded else new
        return f"{new!r} for {old!r} at {at:#x}"

    # -- pieces ------------------------------------------------------------------------------------------------

    def _remove(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        start, end = _piece(generator, anatomy)
        del data[start:end]
        return f"{start:#x}..{end:#x} removed"

    def _double(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        start, end = _piece(generator, anatomy)
        data[end:end] = data[start:end]
        return f"{start:#x}..{end:#x} doubled"

    def _swap(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        (start, end), (other, other_end) = sorted((_piece(generator, anatomy), _piece(generator, anatomy)))
        if end > other:
            return "nothing swapped"
        data[start:other_end] = data[other:other_end] + data[end:other] + data[start:end]
        return f"{start:#x}..{end:#x} and {other:#x}..{other_end:#x} swapped"

    def _transplant(self, generator: random.Random, data: bytearray, anatomy: gist.Gist) -> str:
        index = generator.randrange(len(self._anatomy))
        stream, other = self._anatomy[index]
        start, end = _piece(generator, other)
        at, _ = _piece(generator, anatomy)
        data[at:at] = stream[start:end]
        return f"{start:#x}..{end:#x} of stream {index} put in at {at:#x}"


def _place(generator: random.Random, data: bytearray, anatomy: gist.Gist) -> int:
    """Return an offset: mostly one where a number is."""
    if generator.random() < 0.2:
        return generator.randrange(len(data) + 1)
    at, width = generator.choice(anatomy.numbers)
    return min(at + generator.randrange(width + 1), len(data))


def _piece(generator: random.Random, anatomy: gist.Gist) -> tuple[int, int]:
    """Return start and end of an element or a record, or of a few in a row."""
    borders = generator.choice((anatomy.elements, anatomy.records))
    first = generator.randrange(len(borders) - 1)
    return borders[first], borders[min(first + generator.choice((1, 1, 1, 2, 5)), len(borders) - 1)]

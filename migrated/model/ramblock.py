"""What a RAM block is, and whether the blocks a stream announces fit the ones that are here.

The rule of the file: an answer names every problem at once, so that an operator mends a setup in one go. Error texts
are QEMU's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from migrated.errors import RemoteProtocolError

#: A name travels behind one length byte.
NAME_MAX_BYTES = 255
#: Half of what one x86-64 process can map (47 bits of address space).
SIZE_MAX_BYTES = 1 << 46
TARGET_PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
#: Of what a block may consist here, or-ed together.
PAGE_SIZES = TARGET_PAGE_BYTES | HUGE_PAGE_BYTES


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A piece of the machine's memory with a name. Raises ValueError for one that cannot travel."""

    name: str
    size_bytes: int
    page_size: int = TARGET_PAGE_BYTES

    def __post_init__(self) -> None:
        if not 0 < len(self.name.encode()) <= NAME_MAX_BYTES:
            raise ValueError(f"a RAM block's name has 1 to {NAME_MAX_BYTES} bytes: {self.name[:NAME_MAX_BYTES]!r}")
        if self.page_size < TARGET_PAGE_BYTES or self.page_size & (self.page_size - 1):
            raise ValueError(f"page size {self.page_size} of RAM block '{self.name}' is no power of two from 4096 on")
        if not 0 < self.size_bytes <= SIZE_MAX_BYTES or self.size_bytes % self.page_size:
            raise ValueError(
                f"size {self.size_bytes} of RAM block '{self.name}' is no multiple of {self.page_size} up to 64 TiB"
            )

    @property
    def pages(self) -> int:
        """How many pages the block has."""
        return self.size_bytes // self.page_size


def page_size_summary(page_sizes: Iterable[int]) -> int:
    """Return page sizes as POSTCOPY_ADVISE has them: or-ed together."""
    summary = 0
    for page_size in page_sizes:
        summary |= page_size
    return summary


def check_block_list(
    received: Sequence[tuple[str, int]], local: Iterable[RamBlock], page_sizes: Mapping[str, int] | None = None
) -> None:
    """Raise RemoteProtocolError unless every received (name, length) is a local block; others may exist here.

    ``page_sizes`` are those of the blocks that do not consist of target pages; None where nothing is said of that.
    """
    blocks = {block.name: block for block in local}
    known = {name: block.size_bytes for name, block in blocks.items()}
    problems = []
    for name, length in received:
        if name not in known:
            problems.append(f'Unknown ramblock "{name}", cannot accept migration')
        elif length != known[name]:
            problems.append(f"Size mismatch: {name}: {length:#x} != {known[name]:#x}: Invalid argument")
        elif page_sizes is not None:
            here, there = blocks[name].page_size, page_sizes.get(name, TARGET_PAGE_BYTES)
            if here != there:
                problems.append(f"Mismatched RAM page size {name} (local) {here} != {there}")
    if problems:
        raise RemoteProtocolError(
            "; ".join(problems),
            section="ram",
            expected="blocks " + (", ".join(f"{name} ({size:#x})" for name, size in known.items()) or "none"),
        )

"""A RAM block of a test's own: a real memfd, which nobody else maps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migrated.kernel.memory import Mapping, create_memfd
from migrated.savevm.ports import TrackedMapping
from migrated.wire.ram import PAGE


@dataclass
class Block:
    """Implements RamBlockPort."""

    memfd: int
    pages: NDArray[np.uint8]
    name: str
    size_bytes: int
    page_size: int = PAGE
    mappings: tuple[TrackedMapping, ...] = ()


@contextmanager
def memory_block(pages: int, name: str = "heap", page_size: int = PAGE) -> Iterator[Block]:
    """Have a block of zeros inside the ``with`` block; ``pages`` are target pages."""
    memfd = create_memfd(name, pages * PAGE, page_size)
    mapping = Mapping(memfd, pages * PAGE)
    yield Block(memfd, np.frombuffer(mapping.view, np.uint8).reshape(pages, PAGE), name, pages * PAGE, page_size)
    mapping.close()
    os.close(memfd)

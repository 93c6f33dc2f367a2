"""The hash of a block's content: only what is in it counts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from migrated.errors import KernelError
from migrated.kernel.memory import Mapping, create_memfd, punch_hole
from migrated.ram.content import PIECE_BYTES, STRETCH_PIECES, hash_content
from migrated.savevm.ports import TrackedMapping

PAGE = 4096
SIZE = 4 * PIECE_BYTES + 3 * PAGE


class Block:
    """A RamBlockPort of this process."""

    name = "heap"
    page_size = PAGE
    mappings: Sequence[TrackedMapping] = ()

    def __init__(self, size: int) -> None:
        self.size_bytes = size
        self.memfd = create_memfd("content", size)
        self._mapping = Mapping(self.memfd, size)

    @property
    def pages(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._mapping.view, np.uint8).reshape(-1, PAGE)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self.memfd, data, offset)

    def close(self) -> None:
        self._mapping.close()
        os.close(self.memfd)

    @property
    def allocated_bytes(self) -> int:
        return os.fstat(self.memfd).st_blocks * 512


@pytest.fixture
def blocks() -> Iterator[tuple[Block, Block]]:
    pair = Block(SIZE), Block(SIZE)
    yield pair
    for block in pair:
        block.close()


async def test_equal_content_equal_hash_however_it_is_kept(blocks: tuple[Block, Block]) -> None:
    one, other = blocks
    data = random.Random(3).randbytes(PIECE_BYTES)
    for offset in (0, 2 * PIECE_BYTES - PAGE, 4 * PIECE_BYTES):
        one.write(offset, data[: SIZE - offset])
        other.write(offset, data[: SIZE - offset])
    other.write(PIECE_BYTES, bytes(PAGE))  # zeros that are there, for the other's hole
    other.write(3 * PIECE_BYTES + PAGE, bytes(PIECE_BYTES - PAGE))
    assert one.allocated_bytes != other.allocated_bytes
    before = one.allocated_bytes
    assert await hash_content(one) == await hash_content(other)
    assert one.allocated_bytes == before, "no hole was filled by looking"


@pytest.mark.parametrize("offset", [0, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES + 5, SIZE - 1])
async def test_every_byte_counts(blocks: tuple[Block, Block], offset: int) -> None:
    one, other = blocks
    one.write(0, bytes(SIZE))
    before = await hash_content(one)
    assert before == await hash_content(other)
    for block in blocks:
        block.write(offset, b"\1")
        assert await hash_content(block) != before
    assert await hash_content(one) == await hash_content(other)
    punch_hole(other.memfd, offset // PAGE * PAGE, PAGE)
    assert await hash_content(other) == before


async def test_more_than_one_stretch() -> None:
    block = Block(2 * STRETCH_PIECES * PIECE_BYTES)
    empty = await hash_content(block)
    block.write(STRETCH_PIECES * PIECE_BYTES, b"\1")
    assert await hash_content(block) != empty
    block.close()


async def test_a_block_that_went() -> None:
    null = os.open(os.devnull, os.O_RDWR)

    class Gone(Block):
        def __init__(self) -> None:
            self.size_bytes = SIZE
            self.memfd = null

    with pytest.raises(KernelError, match="what was a memfd is none any more"):
        await hash_content(Gone())
    os.close(null)

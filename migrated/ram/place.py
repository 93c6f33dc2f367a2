"""Landing pages in a workload that runs: UFFDIO_COPY, and nothing else.

The rule of the file: a page enters memory only where none was. A page that is there already and was received is a
harmless repetition; one that is there and was not received means that somebody touched memory he should not have (a
mapping that nobody declared, a read by descriptor): that is corruption, and said so.

One process's mapping takes the page; it is in the block's memory then, and the others find it there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from migrated.errors import WorkloadError
from migrated.kernel import userfault_place
from migrated.savevm.ports import RamBlockPort, TrackedMapping
from migrated.wire.ram import PAGE


def copy_pages(block: RamBlockPort, first: int, source: int, count: int, is_received: Callable[[int], bool]) -> int:
    """Place ``count`` pages, whole host pages, that lie at address ``source`` from page ``first`` on.

    ``is_received`` says of a page whether it was before. Return the userfaultfd whose waiters are awake now.

    Raises WorkloadError.
    """
    mappings = block.mappings
    if not mappings:
        raise WorkloadError("(gone)", f"nobody maps block {block.name} any more")
    mapping = mappings[0]
    # For one page, which somebody waits for, without any detours; what stands in its way is found out below.
    if count > 1 or userfault_place.copy_page(mapping.userfault, mapping.address + first * PAGE, source):
        _copy(block, mapping, first, source, count, is_received)
    return mapping.userfault


def place_zeros(fd: int, address: int, page_size: int) -> int:
    """Place a page of zeros where one was touched; return the errno of an obstacle, 0 without. Raises KernelError."""
    if page_size == PAGE:
        return userfault_place.zeropage(fd, address, PAGE).obstacle
    # There is no zero page of that size.
    return userfault_place.copy(fd, address, _zeros(page_size).__array_interface__["data"][0], page_size).obstacle


@cache
def _zeros(size: int) -> NDArray[np.uint8]:
    return np.zeros(size, np.uint8)


def _copy(
    block: RamBlockPort,
    mapping: TrackedMapping,
    first: int,
    source: int,
    count: int,
    is_received: Callable[[int], bool],
) -> None:
    unit = block.page_size // PAGE
    done, step = 0, count
    while done < count:
        page = first + done
        length = min(step, count - done) * PAGE
        placed = userfault_place.copy(mapping.userfault, mapping.address + page * PAGE, source + done * PAGE, length)
        done += placed.placed // PAGE
        match placed.obstacle:
            case 0:
                continue
            case errno.EEXIST:
                _check_repeated(block, first + done, is_received(first + done))
                done += unit
            case errno.ENOENT if step > unit:
                # The range crosses from one mapping into the next (the process split it): page by page, then.
                step = unit
            case obstacle:
                raise WorkloadError(
                    mapping.workload,
                    f"page {first + done} of block {block.name} cannot be placed: {os.strerror(obstacle)}",
                )


def _check_repeated(block: RamBlockPort, page: int, received: bool) -> None:
    if not received:
        raise WorkloadError(
            ", ".join(sorted({mapping.workload for mapping in block.mappings})),
            f"page {page} of block {block.name} was touched past its userfaultfd before it had arrived: what is there"
            " is not the machine's",
        )

"""Landing pages in a workload that runs: UFFDIO_COPY, and nothing else.

The rule of the file: a page enters memory only where none was. A page that is there already and was received is a
harmless repetition; one that is there and was not received means that somebody touched memory he should not have (a
mapping that nobody declared, a read by descriptor): that is corruption, and said so.

One process's mapping takes the page; it is in the block's memory then, and the others find it there.
"""

from __future__ import annotations

import errno
import os

import numpy as np
from numpy.typing import NDArray

from migrated.errors import WorkloadError
from migrated.kernel import userfault_place
from migrated.model.bitmap import PageBitmap
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PAGE


def copy_pages(block: RamBlockPort, first: int, data: NDArray[np.uint8], received: PageBitmap) -> None:
    """Place ``data``, shape (n, PAGE) and contiguous, at pages first..first+n-1; ``received`` as it was before.

    Raises WorkloadError.
    """
    source: int = data.__array_interface__["data"][0]
    count, done = len(data), 0
    step = count
    if not block.mappings:
        raise WorkloadError("(gone)", f"nobody maps block {block.name} any more")
    mapping = block.mappings[0]
    while done < count:
        page = first + done
        length = min(step, count - done) * PAGE
        placed = userfault_place.copy(mapping.userfault, mapping.address + page * PAGE, source + done * PAGE, length)
        done += placed.placed // PAGE
        match placed.obstacle:
            case 0:
                continue
            case errno.EEXIST:
                _check_repeated(block, first + done, received)
                done += 1
            case errno.ENOENT if step > 1:
                # The range crosses from one mapping into the next (the process split it): page by page, then.
                step = 1
            case obstacle:
                raise WorkloadError(
                    mapping.workload,
                    f"page {first + done} of block {block.name} cannot be placed: {os.strerror(obstacle)}",
                )


def _check_repeated(block: RamBlockPort, page: int, received: PageBitmap) -> None:
    if not received.test(page):
        raise WorkloadError(
            ", ".join(sorted({mapping.workload for mapping in block.mappings})),
            f"page {page} of block {block.name} was touched past its userfaultfd before it had arrived: what is there"
            " is not the machine's",
        )

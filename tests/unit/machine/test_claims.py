"""What a workload claims, where this process may not look at it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from migrated.kernel import memory, userfault
from migrated.machine.claims import ClaimRefused, check_mapping

SIZE = 8 * memory.PAGE_SIZE
#: Beyond any pid_max: its /proc looks like that of another user where ProtectProc=invisible hides it.
HIDDEN = 1 << 30


@pytest.fixture
def tracking() -> Iterator[int]:
    fd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
    yield fd
    os.close(fd)


@pytest.fixture
def pagemap() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_hidden_process_is_proven_by_its_descriptors(tracking: int, pagemap: int) -> None:
    memfd = memory.create_memfd("heap", SIZE)
    mapping = memory.Mapping(memfd, SIZE)
    try:
        check_mapping(HIDDEN, memfd, mapping.address, SIZE, pagemap=pagemap, tracking=tracking)
        beyond = mapping.address + (1 << 40)
        with pytest.raises(ClaimRefused, match="cannot be tracked"):
            check_mapping(HIDDEN, memfd, beyond, SIZE, pagemap=pagemap, tracking=tracking)
    finally:
        mapping.close()
        os.close(memfd)

"""One RAM block: a sealed memfd, who maps it, and the daemon's own mapping.

The rule of the file: the daemon never touches RAM through a mapping that is registered with a userfaultfd: its own
mapping is a plain one, made when somebody first asks for it (a machine that never migrates costs no page tables).

Closing order: numpy views hold the mmap, the mmap holds its own descriptor; whoever still has a view keeps the memory,
nobody gets a dangling one. The memfd's number is retired, not closed (machine.retired).
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from migrated.errors import WorkloadError
from migrated.kernel.huge_pages import page_size_of
from migrated.kernel.memory import PAGE_SIZE, Mapping, memfd_identity
from migrated.machine.retired import RetiredDescriptors
from migrated.savevm.ports import TrackedMapping


class MachineBlock:
    """A RamBlockPort. Owns ``memfd``, which must be sealed and of ``size_bytes``."""

    def __init__(self, name: str, size_bytes: int, memfd: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.memfd = memfd
        self.page_size = page_size_of(memfd)
        self.identity = memfd_identity(memfd)
        self._mappings: dict[str, TrackedMapping] = {}
        self._last_workload = ""
        self._closed = False
        self._own: Mapping | None = None
        self._pages: NDArray[np.uint8] | None = None
        # Handlers ask for `pages` from worker threads too: two of them must not map twice.
        self._lock = threading.Lock()

    @property
    def pages(self) -> NDArray[np.uint8]:
        """All target pages, shape (pages, 4096), in whatever they are kept.

        Raises WorkloadError when the block went with its workload.
        """
        with self._lock:
            if self._closed:
                raise WorkloadError(self._last_workload or "?", f"RAM block {self.name} is gone with it")
            if self._pages is None:
                self._own = Mapping(self.memfd, self.size_bytes)
                self._pages = np.frombuffer(self._own.view, np.uint8).reshape(-1, PAGE_SIZE)
            return self._pages

    @property
    def mappings(self) -> tuple[TrackedMapping, ...]:
        """The attached processes' mappings."""
        return tuple(self._mappings.values())

    @property
    def workloads(self) -> tuple[str, ...]:
        """Names of the workloads that map this block."""
        return tuple(self._mappings)

    def add_mapping(self, mapping: TrackedMapping) -> None:
        """Add one process's mapping (one per workload)."""
        self._mappings[mapping.workload] = mapping

    def remove_mapping(self, workload: str) -> None:
        """Remove what `add_mapping` added; unknown is fine."""
        if self._mappings.pop(workload, None) is not None:
            self._last_workload = workload

    def close(self, retired: RetiredDescriptors) -> None:
        """Let go of the memory. Twice does no harm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            own, self._own, self._pages = self._own, None, None
        if own is not None:
            own.close()
        retired.retire(self.memfd)

"""The dirty log: which pages were written since the last look, read from the kernel.

The rule of the file: a page that might have been written is dirty. A lost registration, a mapping that appeared since
the last look, a page table entry that vanished: all of it counts as dirty. Only a write that goes past the page tables
of every attached process is invisible (``pwrite`` on the memfd, DMA, a hole punched by descriptor): README, Limits.

One log serves one migration: `start`, then `sync` any number of times, then `stop`. The blocking halves run in a
thread, and to their end: a look that was left behind would clear the log of the next migration, or use descriptors
given back by then. The ioctls release the GIL. A workload without a userfaultfd is compared by page hashes (last
resort, about 0.2 s/GiB per look).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from migrated.errors import KernelError, WorkloadError
from migrated.kernel import pagemap, userfault
from migrated.kernel.memory import data_extents
from migrated.model.bitmap import PageBitmap
from migrated.ram.page_read import read_run
from migrated.savevm.ports import RamBlockPort, TrackedMapping
from migrated.transport.thread import in_thread
from migrated.wire.ram import PAGE

#: 1 MiB: what is read is hashed while it is in the processor's cache.
PIECE_PAGES = 256
_DIGEST_OF_ZEROS = xxh3_128_digest(bytes(PAGE))


@dataclass(frozen=True, slots=True)
class StrayWrite:
    """A page written after its workload said that it had stopped."""

    workload: str
    block: str
    page: int
    pages: int


@dataclass(slots=True)
class _BlockLog:
    block: RamBlockPort
    registered: set[TrackedMapping] = field(default_factory=set)
    hashes: PageHashes | None = None


class DirtyLog:
    """Write tracking of all RAM blocks of one machine, for the length of one migration."""

    def __init__(self, blocks: Sequence[RamBlockPort]) -> None:
        self._logs = [_BlockLog(block) for block in blocks]

    async def start(self) -> None:
        """Write-protect every mapping. From here on each first write to a page is seen by `sync`."""
        await in_thread(self._start)

    async def sync(self, dirty: Mapping[str, PageBitmap]) -> int:
        """Read and clear the log into ``dirty`` (by block name); return how many pages became dirty by it.

        Raises WorkloadError when a tracked process is gone.
        """
        return await in_thread(self._sync, dirty)

    async def stray_write(self, *, clear: bool = False) -> StrayWrite | None:
        """Look once more without a writer being allowed to exist: the first page that was written, if any.

        ``clear``: what was written up to now is not looked at.
        """
        if clear:
            await in_thread(self._clear)
        return await in_thread(self._stray_write)

    async def stop(self) -> None:
        """Give the workloads their full speed back. Twice does no harm; a process that is gone neither."""
        await in_thread(self._stop)

    # -- in a thread -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for log in self._logs:
            for mapping in log.block.mappings:
                self._protect(log, mapping)

    def _protect(self, log: _BlockLog, mapping: TrackedMapping) -> None:
        if mapping.userfault < 0:
            log.hashes = log.hashes or PageHashes(log.block)
            return
        try:
            userfault.register(mapping.userfault, mapping.address, mapping.length, userfault.MODE_WP)
            pagemap.protect(mapping.pagemap, mapping.address, mapping.length)
        except KernelError as error:
            raise _explain(error, log.block, mapping) from error
        log.registered.add(mapping)

    def _sync(self, dirty: Mapping[str, PageBitmap]) -> int:
        return sum(self._sync_block(log, dirty[log.block.name]) for log in self._logs)

    def _sync_block(self, log: _BlockLog, bitmap: PageBitmap) -> int:
        before = bitmap.count
        current = set(log.block.mappings)
        log.registered &= current
        for mapping in current:
            if _is_new(log, mapping):
                # Attached after the last look: whatever it wrote until now was not seen.
                self._protect(log, mapping)
                bitmap.set_all()
                continue
            for starts, ends in self._scan(log, mapping):
                bitmap.set_ranges(starts, ends)
        if log.hashes is not None:
            bitmap.set_pages(log.hashes.changed())
        return bitmap.count - before

    def _scan(self, log: _BlockLog, mapping: TrackedMapping) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        if mapping.userfault < 0:
            return []
        try:
            return [pagemap.scan_and_clear(mapping.pagemap, mapping.address, mapping.length)]
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise _explain(error, log.block, mapping) from error
        # The workload mapped something over the range, which drops the registration: all of it may be dirty.
        log.registered.discard(mapping)
        self._protect(log, mapping)
        return [(np.array([0]), np.array([mapping.length // PAGE]))]

    def _clear(self) -> None:
        self._sync({log.block.name: PageBitmap(log.block.size_bytes // PAGE) for log in self._logs})

    def _stray_write(self) -> StrayWrite | None:
        for log in self._logs:
            for mapping in log.block.mappings:
                if mapping.userfault < 0 and _is_new(log, mapping):
                    return StrayWrite(mapping.workload, log.block.name, 0, mapping.length // PAGE)
                for starts, ends in self._scan(log, mapping):
                    if len(starts):
                        pages = int((ends - starts).sum())
                        return StrayWrite(mapping.workload, log.block.name, int(starts[0]), pages)
            if log.hashes is not None and len(changed := log.hashes.changed()):
                names = ", ".join(sorted({m.workload for m in log.block.mappings}))
                return StrayWrite(names, log.block.name, int(changed[0]), len(changed))
        return None

    def _stop(self) -> None:
        for log in self._logs:
            registered, log.registered = log.registered, set()
            log.hashes = None
            for mapping in registered & set(log.block.mappings):
                try:
                    userfault.unregister(mapping.userfault, mapping.address, mapping.length)
                except KernelError:
                    continue  # the process is gone, and its registration with it


def _is_new(log: _BlockLog, mapping: TrackedMapping) -> bool:
    return log.hashes is None if mapping.userfault < 0 else mapping not in log.registered


class PageHashes:
    """Page hashes of one block: the dirty log of last resort, for a workload that cannot have a userfaultfd."""

    DIGEST = np.dtype("V16")

    def __init__(self, block: RamBlockPort) -> None:
        self._block = block
        self._digests = self._hash()

    def changed(self) -> NDArray[np.int64]:
        """Return the pages whose content differs from the last look, ascending."""
        digests = self._hash()
        changed = np.flatnonzero(digests.view(np.uint64).reshape(-1, 2) != self._digests.view(np.uint64).reshape(-1, 2))
        self._digests = digests
        return np.unique(changed // 2)

    def _hash(self) -> NDArray[np.void]:
        """Return all digests. Holes are not read: in a mapping that would fill them."""
        size = self._block.size_bytes
        digests = np.full(size // PAGE, np.frombuffer(_DIGEST_OF_ZEROS, self.DIGEST))
        rows = np.empty((PIECE_PAGES, PAGE), np.uint8)
        for start, end in data_extents(self._block.memfd, 0, size):
            for first in range(start // PAGE, -(-end // PAGE), PIECE_PAGES):
                part = rows[: min(PIECE_PAGES, -(-end // PAGE) - first)]
                read_run(self._block, first, part)
                digests[first : first + len(part)] = np.frombuffer(b"".join(map(xxh3_128_digest, part)), self.DIGEST)
        return digests


def _explain(error: KernelError, block: RamBlockPort, mapping: TrackedMapping) -> WorkloadError:
    if error.errno == errno.ESRCH:
        return WorkloadError(
            mapping.workload, f"its process is gone (found while tracking writes to block {block.name})"
        )
    return WorkloadError(mapping.workload, f"writes to block {block.name} cannot be tracked: {error}")

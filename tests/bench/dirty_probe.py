"""The process of `tests.bench.dirty`: workload and daemon in one, with real memory and the real PAGEMAP_SCAN.

The rule of the file: a pass goes through the "ram" handler and its encoder into a channel that drops the bytes, so that
only our own cost shows.

Run as ``python -m tests.bench.dirty_probe sync|pass SIZE STEP LOOKS``: prints ``took MS`` per look.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from migrated.kernel import userfault
from migrated.kernel.memory import PAGE_SIZE, Mapping, create_memfd
from migrated.model.bitmap import PageBitmap
from migrated.model.stats import BandwidthMeter, RamStats
from migrated.ram.dirty import DirtyLog
from migrated.ram.save import RamSave
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.ports import MachinePort, TrackedMapping
from migrated.stream.outgoing import OutgoingStream


class Block:
    """A RamBlockPort of this very process: mapped once for the daemon and once, tracked, for the workload."""

    name = "mem0"
    page_size = PAGE_SIZE

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.memfd = create_memfd("bench", size_bytes)
        self._daemons, self._workloads = Mapping(self.memfd, size_bytes), Mapping(self.memfd, size_bytes)
        self.pages = np.frombuffer(self._daemons.view, np.uint8).reshape(-1, PAGE_SIZE)
        self.written = np.frombuffer(self._workloads.view, np.uint8).reshape(-1, PAGE_SIZE)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        uffd = userfault.open_userfaultfd(userfault.FEATURES_TRACKING)
        self.mappings: Sequence[TrackedMapping] = (
            TrackedMapping("bench", self._workloads.address, size_bytes, pagemap, uffd),
        )
        self.written[:, 0] = 1

    def write(self, step: int) -> None:
        """Write every ``step``-th page; 0: none."""
        if step:
            self.written[::step, 0] += 2


class Machine:
    """As much of a MachinePort as the sending half of the "ram" handler asks for."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def ram_blocks(self) -> Sequence[Block]:
        return [self._block]


class Sink:
    """A Channel that drops what is sent."""

    peer = "nowhere"
    has_return_path = False
    bytes_sent = 0
    bytes_received = 0
    silence_timeout_s = 10.0

    async def send(self, data: Any) -> None:
        self.bytes_sent += len(data)

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        raise NotImplementedError

    def shutdown_write(self) -> None: ...
    async def close(self) -> None: ...
    def abort(self) -> None: ...


async def sync(size_bytes: int, step: int, looks: int) -> None:
    """Time `DirtyLog.sync`."""
    block = Block(size_bytes)
    log = DirtyLog([block])
    dirty = {block.name: PageBitmap(size_bytes // PAGE_SIZE)}
    await log.start()
    await log.sync(dirty)
    for _ in range(looks):
        dirty[block.name].clear_all()
        block.write(step)
        started = time.monotonic()
        await log.sync(dirty)
        print("took", (time.monotonic() - started) * 1000, flush=True)


async def make_passes(size_bytes: int, step: int, looks: int) -> None:
    """Time one look at the log and the sending of what it shows."""
    block, lock, stats = Block(size_bytes), IothreadLock(), RamStats()
    save = RamSave(cast(MachinePort, Machine(block)), lock, stats, on_sync=lambda newly: None)
    f = OutgoingStream(Sink(), BandwidthMeter())
    everything = 2 * size_bytes
    await save.save_setup(f, None)
    for look in range(looks + 2):
        if look:
            block.write(step)
        started = time.monotonic()
        await save.save_live_pending(f, None, everything)
        while not await save.save_live_iterate(f, None):
            await f.drain()
        await f.drain()
        if look > 1:
            print("took", (time.monotonic() - started) * 1000, flush=True)
    await save.save_cleanup(None)


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    asyncio.run({"sync": sync, "pass": make_passes}[what](*map(int, numbers)))

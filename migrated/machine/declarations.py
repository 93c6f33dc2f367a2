"""What the attached workloads declared: RAM blocks and devices.

The rule of the file: a declaration is added whole or not at all, and each limit says why it is there. While a migration
is under way (`hold`), the set of blocks and devices does not grow: what the stream announced is what must arrive.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol

from migrated.errors import KernelError, MigratedError
from migrated.kernel import memory
from migrated.kernel.huge_pages import page_size_of
from migrated.machine.block import MachineBlock
from migrated.machine.claims import ClaimRefused, check_mapping, check_range
from migrated.machine.device import WorkloadDevice
from migrated.machine.retired import RetiredDescriptors
from migrated.machine.workload import Workload
from migrated.savevm.ports import DevicePort, TrackedMapping
from migrated.wire import attach

#: Each block keeps two descriptors (memfd, mmap) and one mapping; RLIMIT_NOFILE is 1024 by default.
MAX_BLOCKS = 256
#: A device costs a section header and a round trip in the downtime each; a real machine has tens.
MAX_DEVICES = 1024
#: For people.
_PAGE_SIZES = " or ".join(map(str, memory.PAGE_SIZES))


class DeviceCallback(Protocol):
    """Told of each device that comes or goes."""

    def __call__(self, device: DevicePort, /) -> None: ...


class Declarations:
    """The blocks and devices of one machine. Used from the event loop only."""

    def __init__(
        self, retired: RetiredDescriptors, on_device_declared: DeviceCallback, on_device_withdrawn: DeviceCallback
    ) -> None:
        self.blocks: dict[str, MachineBlock] = {}
        self.devices: dict[tuple[str, int], WorkloadDevice] = {}
        self.hold: Callable[[], str] = lambda: ""
        """Why nothing may be added now; empty: it may."""
        self.bar: Callable[[], str] = lambda: ""
        """Why nothing may be mapped now, not even a block that exists; empty: it may."""
        self._retired = retired
        self._on_device_declared = on_device_declared
        self._on_device_withdrawn = on_device_withdrawn
        self._reserved: dict[str, str] = {}

    def offer_block(self, workload: Workload, request: attach.BlockRequest) -> MachineBlock | None:
        """Return the block that exists, or reserve the name for ``workload``. Raises ClaimRefused."""
        if request.page_size not in memory.PAGE_SIZES:
            raise ClaimRefused("page_size", expected=_PAGE_SIZES, found=str(request.page_size))
        if (block := self.blocks.get(request.name)) is not None:
            _check_existing(block, workload, request)
            return block
        if request.size == 0:
            raise ClaimRefused(f"no block '{request.name}' exists", expected="a size, to create it", found="0")
        check_range(request.page_size, request.size, request.page_size)
        holder = self._reserved.get(request.name, workload.name)
        if holder != workload.name:
            raise ClaimRefused(f"block '{request.name}' is being created by workload {holder}", again=True)
        self._check_room(request.name)
        self._reserved[request.name] = workload.name
        return None

    def _check_room(self, name: str) -> None:
        if why := self.hold():
            raise ClaimRefused(f"no new block: {why}", again=True)
        taken = self.blocks.keys() | self._reserved.keys()
        if len(taken | {name}) > MAX_BLOCKS:
            raise ClaimRefused("too many RAM blocks", expected=f"at most {MAX_BLOCKS}", found=str(len(taken) + 1))

    async def map_block(self, workload: Workload, request: attach.MapRequest, memfd: int) -> None:
        """Add a workload's mapping, with the block if it is new. Owns ``memfd``. Raises ClaimRefused."""
        kept = False
        try:
            self._check_request(workload, request, memfd)
            try:
                memory.seal_size(memfd, request.size)
                check_range(request.address, request.size, _page_size(request.name, memfd))
            except KernelError as error:
                raise ClaimRefused(f"the memfd of block '{request.name}' is refused: {error}") from error
            await asyncio.to_thread(
                check_mapping,
                workload.pid, memfd, request.address, request.size,
                pagemap=workload.pagemap, tracking=workload.tracking,
            )  # fmt: skip
            # Time has passed: the block may have gone with its last workload.
            self._check_request(workload, request, memfd)
            kept = self._add_mapping(workload, request, memfd)
        finally:
            if not kept:
                os.close(memfd)

    def _check_request(self, workload: Workload, request: attach.MapRequest, memfd: int) -> None:
        name = request.name
        if why := self.bar():
            raise ClaimRefused(f"block '{name}' is not mapped: {why}", again=True)
        check_range(request.address, request.size)
        for other in self.mappings_of(workload):
            if request.address < other.address + other.length and other.address < request.address + request.size:
                raise ClaimRefused(
                    f"the mapping of block '{name}' overlaps one that this workload declared before",
                    found=f"{request.size} bytes at {request.address:#x}",
                )
        block = self.blocks.get(name)
        if block is None:
            if self._reserved.get(name) != workload.name:
                raise ClaimRefused(
                    f"'map' of block '{name}'", expected="a 'block' request that was answered before", again=True
                )
            if why := self.hold():
                raise ClaimRefused(f"no new block: {why}", again=True)
            return
        if workload.name in block.workloads:
            raise ClaimRefused(f"this workload has mapped block '{name}' already")
        if request.size != block.size_bytes:
            raise _wrong_size(name, block.size_bytes, request.size)
        if memory.memfd_identity(memfd) != block.identity:
            raise ClaimRefused(f"the memfd is not that of block '{name}', which exists", again=True)

    def _add_mapping(self, workload: Workload, request: attach.MapRequest, memfd: int) -> bool:
        """Return True when ``memfd`` is kept as that of a new block."""
        block = self.blocks.get(request.name)
        new = block is None
        if block is None:
            block = self.blocks[request.name] = MachineBlock(request.name, request.size, memfd)
            del self._reserved[request.name]
        block.add_mapping(
            TrackedMapping(workload.name, request.address, request.size, workload.pagemap, workload.tracking)
        )
        return new

    def add_device(self, workload: Workload, request: attach.DeviceRequest) -> None:
        """Add a device. Raises ClaimRefused."""
        if workload.signalled:
            raise ClaimRefused(
                'a workload with pause "signal" has RAM only: its threads are stopped when a device would be saved'
            )
        key = request.name, request.instance_id
        if (other := self.devices.get(key)) is not None:
            raise ClaimRefused(f"device '{request.name}/{request.instance_id}' is declared already by {other.workload}")
        if why := self.hold():
            raise ClaimRefused(f"no new device: {why}", again=True)
        if len(self.devices) >= MAX_DEVICES:
            raise ClaimRefused("too many devices", expected=f"at most {MAX_DEVICES}", found=str(MAX_DEVICES + 1))
        device = WorkloadDevice(workload, request)
        try:
            self._on_device_declared(device)
        except MigratedError as error:
            raise ClaimRefused(f"device '{request.name}/{request.instance_id}' is refused: {error}") from error
        self.devices[key] = device

    def withdraw(self, workload: Workload, *, keep_blocks: bool) -> bool:
        """Remove what a workload declared; say whether it had declared anything. Twice does no harm."""
        had = False
        for key in [key for key, device in self.devices.items() if device.workload == workload.name]:
            self._on_device_withdrawn(self.devices.pop(key))
            had = True
        for block in self.blocks.values():
            if workload.name in block.workloads:
                block.remove_mapping(workload.name)
                had = True
        self._reserved = {name: holder for name, holder in self._reserved.items() if holder != workload.name}
        if had and not keep_blocks:
            self.drop_unmapped()
        return had

    def drop_unmapped(self) -> list[str]:
        """Let go of the blocks nobody maps; return their names."""
        names = [name for name, block in self.blocks.items() if not block.mappings]
        for name in names:
            self.blocks.pop(name).close(self._retired)
        return names

    def mappings_of(self, workload: Workload) -> list[TrackedMapping]:
        """Return what one workload maps."""
        return [m for block in self.blocks.values() for m in block.mappings if m.workload == workload.name]

    def close(self) -> None:
        """Let go of all blocks. Twice does no harm."""
        while self.blocks:
            self.blocks.popitem()[1].close(self._retired)


def _check_existing(block: MachineBlock, workload: Workload, request: attach.BlockRequest) -> None:
    if workload.name in block.workloads:
        raise ClaimRefused(f"this workload has mapped block '{request.name}' already")
    if request.size not in (0, block.size_bytes):
        raise _wrong_size(request.name, block.size_bytes, request.size)
    if request.size and request.page_size != block.page_size:
        raise ClaimRefused(
            f"block '{request.name}' exists with pages of another size",
            expected=f"{block.page_size} bytes", found=f"{request.page_size}",
        )  # fmt: skip


def _page_size(name: str, memfd: int) -> int:
    """Return what a memfd consists of, whatever was said: the kernel knows better."""
    if (page_size := page_size_of(memfd)) not in memory.PAGE_SIZES:
        raise ClaimRefused(f"the pages of block '{name}'", expected=f"{_PAGE_SIZES} bytes each", found=str(page_size))
    return page_size


def _wrong_size(name: str, expected: int, found: int) -> ClaimRefused:
    return ClaimRefused(f"block '{name}' exists with another size", expected=f"{expected} bytes", found=f"{found}")

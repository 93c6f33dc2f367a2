"""Saving a snapshot: the savevm path of the handler contract, into a file.

The rule of the file: the machine stands still from the stop to the last byte, and goes on as before however that ends;
only then does the disk get its time. Everything is written aside; until the rename there is no snapshot of that name.

    room for it on the disk -> lock, stop -> [lock given up: START] -> PART ... until nothing is left -> END -> FULL
        -> EOF, VMDESCRIPTION -> resume, unlock -> fsync -> manifest -> rename

The iteration holds the iothread lock, as the contract has it. Write tracking is armed all the same: it costs about a
thirtieth of the time, and its last look proves that nobody wrote to the stopped machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from migrated.errors import ChannelClosed
from migrated.migration.handshake import own_configuration
from migrated.migration.host import Host, insist, resume_machine
from migrated.migration.jobs import Job
from migrated.migration.snapshot_host import HashContent, SnapshotHost, watched
from migrated.migration.snapshot_store import STREAM
from migrated.model.runstate import RunState
from migrated.model.stats import BandwidthMeter
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.chunk_file import ChunkWriter, create_chunk_file
from migrated.transport.thread import to_the_end
from migrated.wire.manifest import (
    FORMAT,
    Chunk,
    Manifest,
    SavedBlock,
    SavedMachine,
    SavedSection,
    chunks_of,
    hash_of,
)
from migrated.wire.ram import PAGE
from migrated.wire.section import SectionHeader

#: A page of data has a record's head and perhaps a name in front of it, a hole is a record of nine bytes.
PAGE_RECORD_BYTES, HOLE_RECORD_BYTES = 8, 9
#: For headers, devices and names; what is more than that is appended, without room kept for it.
SPARE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a section lies in the stream."""

    header: SectionHeader
    offset: int
    length: int


class RecordedStream(OutgoingStream):
    """The ``f`` of a snapshot: it knows where its sections lie, and begins a new chunk with each."""

    def __init__(self, writer: ChunkWriter, on_sent: Callable[[int], None]) -> None:
        super().__init__(writer, BandwidthMeter(), on_sent=on_sent)
        self.extents: list[Extent] = []
        self.where = "stream header"
        """The section that is being written, for errors."""
        self._writer = writer
        self._begun = 0

    def begin_section(self, header: SectionHeader) -> None:
        # The registry drains after each section, so the chunk ends where the section begins.
        self._writer.cut()
        self._begun = self.position
        self.where = f"{header.idstr}/{header.instance_id} ({header.kind.name})"
        super().begin_section(header)

    def end_section(self, section_id: int) -> None:
        header = self._open
        super().end_section(section_id)
        assert header is not None
        self.extents.append(Extent(header, self._begun, self.position - self._begun))

    def put_end_of_stream(self) -> None:
        self._writer.cut()
        self.where = "vmdescription"
        super().put_end_of_stream()


@dataclass(frozen=True, slots=True)
class Taken:
    """What was true while the machine stood still."""

    run_state: RunState
    blocks: tuple[SavedBlock, ...]


async def save_snapshot(snapshots: SnapshotHost, tag: str, job: Job, require_here: Callable[[], None]) -> None:
    """Save the machine as ``tag``; it goes on as before, whatever happens here.

    ``require_here`` raises CommandError where there is no machine to save, or it is on its way.
    """
    store = snapshots.store
    aside = await store.begin(tag)
    writer = None
    try:
        job.total = expected_bytes(snapshots.host.machine.ram_blocks())
        writer = await create_chunk_file(aside / STREAM, job.total)
        f = RecordedStream(writer, job.add)
        taken = await _take(snapshots, f, require_here)
        await writer.finish()
        manifest = describe_snapshot(snapshots, taken, f.extents, writer.chunks)
        await store.write_manifest(aside, manifest)
        job.no_way_back = "it is complete, and appears at this moment"
        await store.commit(aside, tag)
        job.total = manifest.length
    finally:
        if writer is not None:
            await to_the_end(writer.close())
        await store.discard(aside)


def expected_bytes(blocks: Iterable[RamBlockPort]) -> int:
    """Return what a stream of these blocks takes at most, as they are now."""
    total = SPARE_BYTES
    for block in blocks:
        data = min(os.fstat(block.memfd).st_blocks * 512, block.size_bytes)
        holes = block.size_bytes - data
        total += data + data // PAGE * PAGE_RECORD_BYTES + holes // PAGE * HOLE_RECORD_BYTES
    return total


async def _take(snapshots: SnapshotHost, f: RecordedStream, require_here: Callable[[], None]) -> Taken:
    """Write the stream of the stopped machine, and let it go on."""
    host = snapshots.host
    async with host.lock:
        require_here()
        previous = host.machine.run_state
        host.global_state.store(previous)
        try:
            await host.machine.stop(RunState.SAVE_VM)
            with snapshots.outgoing.kept():
                blocks = await _write_stream(host, f, snapshots.hash_content)
        except ChannelClosed as error:
            error.phase = f"saving section {f.where}, stream offset {f.position:#x}"
            raise
        finally:
            await insist(lambda: _wind_up(host, previous))
    return Taken(previous, blocks)


async def _write_stream(host: Host, f: RecordedStream, hash_content: HashContent) -> tuple[SavedBlock, ...]:
    registry = host.registry
    async with watched(host.machine) as group:
        f.put_preamble(own_configuration(host))
        await f.drain()
        async with host.lock.released():  # the contract wants it so; `cont` and `migrate` are refused meanwhile
            await registry.save_setup(f)
        hashing = group.create_task(_hash_blocks(host.machine.ram_blocks(), hash_content))
        while not await registry.save_live_iterate(f, snapshot=True):
            pass
        await registry.save_live_complete_precopy(f)
        await registry.save_state(f)
        f.put_end_of_stream()
        await f.drain()
        return await hashing


async def _hash_blocks(blocks: Iterable[RamBlockPort], hash_content: HashContent) -> tuple[SavedBlock, ...]:
    saved = [SavedBlock(block.name, block.size_bytes, block.page_size, await hash_content(block)) for block in blocks]
    return tuple(saved)


async def _wind_up(host: Host, previous: RunState) -> None:
    for failure in await host.registry.save_cleanup():
        host.log.error("cleanup_failed", error=str(failure))
    await resume_machine(host, previous)


def describe_snapshot(
    snapshots: SnapshotHost, taken: Taken, extents: Iterable[Extent], chunks: list[Chunk]
) -> Manifest:
    """Return the manifest of what was written."""
    machine = snapshots.host.machine
    sections = tuple(
        SavedSection(
            kind=extent.header.kind.name,
            idstr=extent.header.idstr,
            instance_id=extent.header.instance_id,
            version_id=extent.header.version_id,
            offset=extent.offset,
            length=extent.length,
            hash=hash_of(chunk.hash for chunk in chunks_of(chunks, extent.offset, extent.length)),
        )
        for extent in extents
    )
    return Manifest(
        format=FORMAT,
        tool=snapshots.tool,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        machine=SavedMachine(machine.name, machine.uuid or "", machine.machine_type, taken.run_state.value),
        length=chunks[-1].offset + chunks[-1].length,
        blocks=taken.blocks,
        sections=sections,
        chunks=tuple(chunks),
    )

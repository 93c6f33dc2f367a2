"""Loading a snapshot: the machine of this host is replaced by an earlier one.

The rule of the file: a machine that is here is not touched before every byte of the file was found right and everything
in it has its place here. From then on the record says `partial`, so that half a machine never runs: not after an error,
and not after a crash of this daemon. The normal load path of the handlers does the rest.

    manifest -> fits this host? -> [a machine is here: every chunk's hash] -> lock, stop -> record "partial"
        -> sections, out of chunks whose hashes are right -> everything here? -> every block's hash
        -> record "owner" -> run, or rest, as when it was saved

Where no machine is, there is none to lose, and a file is read once, not twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from migrated.errors import MigratedError, RemoteProtocolError
from migrated.migration.handshake import check_configuration, read_preamble
from migrated.migration.host import OPTIONAL_SECTIONS, Host, insist, resume_machine
from migrated.migration.jobs import Job
from migrated.migration.snapshot_host import HashContent, SnapshotHost, watched
from migrated.migration.snapshot_store import STREAM, read_manifest
from migrated.model.handover import Hold
from migrated.model.ramblock import RamBlock, check_block_list
from migrated.model.runstate import RESTING, RunState
from migrated.stream.incoming import IncomingStream
from migrated.transport.channel import Channel
from migrated.transport.chunk_reader import open_chunk_file, verify_chunks
from migrated.transport.thread import in_thread, to_the_end
from migrated.wire.manifest import Manifest, SavedSection
from migrated.wire.ram import RAM_VERSION
from migrated.wire.section import (
    Configuration,
    EndOfFile,
    SectionHeader,
    SectionType,
    parse_element,
    parse_footer,
    parse_vmdescription_length,
)

OVERWRITING = "it overwrites the machine of this host"
#: The scheme of the peer in the record: where the machine came from.
PEER_SCHEME = "snapshot"


async def load_snapshot(snapshots: SnapshotHost, tag: str, job: Job, require_may_load: Callable[[], None]) -> None:
    """Replace this host's machine by the snapshot ``tag``.

    ``require_may_load`` raises CommandError where this host may not have that machine. A failure before the first byte
    is overwritten leaves the old machine as it was; a later one leaves none, and the record says so.
    """
    host, path = snapshots.host, snapshots.store.require(tag)
    manifest = await in_thread(read_manifest, path)
    await check_fits(host, manifest)
    job.total = manifest.length
    if host.ownership.may_run:  # nor does one come meanwhile: `cont` and migrations wait for the end of a job
        job.total += manifest.length
        await verify_chunks(path / STREAM, manifest, job.add)
    channel = await open_chunk_file(path / STREAM, manifest)
    try:
        async with host.lock:
            require_may_load()
            await Load(snapshots, manifest, tag, job).run(channel)
    finally:
        await to_the_end(channel.close())


async def check_fits(host: Host, manifest: Manifest) -> None:
    """Raise RemoteProtocolError, or WorkloadError, unless everything in a snapshot has its place here."""
    uuid = manifest.machine.uuid
    check_configuration(Configuration(manifest.machine.type, uuid=bytes.fromhex(uuid.replace("-", "")) or None), host)
    unknown = [section.idstr for section in manifest.sections if not _has_place(host, section)]
    names = [block.name for block in manifest.blocks]
    await host.machine.wait_declared(names, unknown, host.attach_timeout_s)
    _check_blocks(host, manifest)
    _check_sections(host, manifest)
    loaded = {(section.idstr, section.instance_id) for section in manifest.sections}
    if missing := await host.registry.not_loaded(besides=OPTIONAL_SECTIONS, loaded=loaded):
        raise RemoteProtocolError(
            "the snapshot lacks the state of " + ", ".join(missing),
            expected="a section for every device declared here",
        )


def _check_blocks(host: Host, manifest: Manifest) -> None:
    local = [RamBlock(block.name, block.size_bytes, block.page_size) for block in host.machine.ram_blocks()]
    saved = [(block.name, block.size) for block in manifest.blocks]
    check_block_list(saved, local)
    if more := ", ".join(sorted({block.name for block in local} - {name for name, _ in saved})):
        raise RemoteProtocolError(
            "the machine here has memory that the snapshot lacks",
            section="ram", expected=", ".join(name for name, _ in saved) or "none", found=more,
        )  # fmt: skip


def _has_place(host: Host, section: SavedSection) -> bool:
    return host.registry.takes(section.idstr, section.instance_id) or (
        section.kind == SectionType.FULL.name and _keeps(host)
    )


def _keeps(host: Host) -> bool:
    return bool(host.settings.parameters.get("x-migrated-keep-unknown-sections"))


def _check_sections(host: Host, manifest: Manifest) -> None:
    for section in manifest.sections:
        entry = host.registry.find(section.idstr, section.instance_id)
        if not _has_place(host, section):
            raise RemoteProtocolError(
                f"Unknown savevm section or instance '{section.idstr}' {section.instance_id}",
                section=section.title, offset=section.offset,
            )  # fmt: skip
        # QEMU's "ram" takes exactly its own version; what a device makes of an older one is for the device to say.
        too_new = entry is not None and section.version_id > entry.version_id
        if too_new or (section.idstr == "ram" and section.version_id != RAM_VERSION):
            raise RemoteProtocolError(
                f"savevm: unsupported version {section.version_id} for '{section.idstr}'"
                f" v{entry.version_id if entry is not None else RAM_VERSION}",
                section=section.title, offset=section.offset,
            )  # fmt: skip


class Load:
    """One load of a verified snapshot. The lock is held from the beginning to the end."""

    def __init__(self, snapshots: SnapshotHost, manifest: Manifest, tag: str, job: Job) -> None:
        self._host: Host = snapshots.host
        self._hash_content: HashContent = snapshots.hash_content
        self._progress = snapshots.incoming
        self._manifest = manifest
        self._peer = f"{PEER_SCHEME}:{tag}"
        self._job = job
        self._goes_on_as = RunState.PAUSED

    async def run(self, channel: Channel) -> None:
        """Stop the machine, overwrite it, and let the other one go on."""
        host = self._host
        self._goes_on_as = host.machine.run_state
        stream = IncomingStream(channel, silence_timeout_s=host.settings.silence_timeout_s)
        try:
            await host.machine.stop(RunState.RESTORE_VM)
            async with watched(host.machine):
                # Once more, with everybody standing still and nobody declaring anything.
                _check_blocks(host, self._manifest)
                _check_sections(host, self._manifest)
                self._job.no_way_back = OVERWRITING
                await host.ownership.become(Hold.PARTIAL, peer=self._peer)
                await self._overwrite(stream)
            await self._start()
        except BaseException as error:
            await insist(self._give_up)
            if isinstance(error, MigratedError | OSError) and host.ownership.record.hold is Hold.PARTIAL:
                ownership = host.ownership
                why = stream.located(error)
                raise MigratedError(f"{why}; {ownership.text()}. Next: {ownership.next_step()}") from error
            raise
        finally:
            stream.close()
            await insist(self._clean_up)

    async def _overwrite(self, stream: IncomingStream) -> None:
        host = self._host
        host.kept.forget()
        with self._progress.kept():
            await host.registry.load_setup(stream)
            await self._read(stream)
        for check in host.completeness:
            check()
        saved = {block.name: block.hash for block in self._manifest.blocks}
        blocks = host.machine.ram_blocks()
        for block, found in zip(blocks, await asyncio.gather(*map(self._hash_content, blocks)), strict=True):
            if found != saved[block.name]:
                raise RemoteProtocolError(
                    f"block {block.name} is not what was saved",
                    section="ram", expected=f"hash {saved[block.name]}", found=f"hash {found}",
                )  # fmt: skip

    async def _read(self, stream: IncomingStream) -> None:
        """Feed all sections to their handlers. There is nothing else in a snapshot."""
        first: int | None = await read_preamble(stream, self._host)
        while True:
            stream.section = "between sections"
            element = await stream.run(parse_element(first))
            first = None
            match element:
                case EndOfFile():
                    break
                case SectionHeader():
                    stream.section = f"{element.idstr or f'id {element.section_id}'} ({element.kind.name})"
                    keep = self._keep if _keeps(self._host) else None
                    idstr = await self._host.registry.load_state(stream, element, keep=keep)
                    await stream.run(parse_footer(element.section_id, idstr))
                case _:
                    raise RemoteProtocolError("a command in a snapshot", expected="sections", found=f"{element}")
            self._job.current = self._job.total - self._manifest.length + stream.offset
        stream.section = "vmdescription"
        await stream.run(parse_vmdescription_length())

    async def _keep(self, f: IncomingStream, header: SectionHeader) -> None:
        size = await self._host.kept.keep(f, header, from_qemu=False)
        self._host.log.warning("section_kept", idstr=header.idstr, instance_id=header.instance_id, bytes=size)

    async def _start(self) -> None:
        host = self._host
        stored = host.global_state.received or RunState.RUNNING
        state = self._goes_on_as = stored if stored in RESTING | {RunState.RUNNING} else RunState.PAUSED
        await host.ownership.become(Hold.OWNER, peer=self._peer, run_state=state)
        await resume_machine(host, state)

    async def _give_up(self) -> None:
        """What was not touched goes on; half a machine waits for another one."""
        host = self._host
        if host.ownership.record.hold is Hold.PARTIAL:
            host.machine.set_run_state(RunState.INMIGRATE)
        elif host.machine.run_state is RunState.RESTORE_VM:
            await resume_machine(host, self._goes_on_as)

    async def _clean_up(self) -> None:
        for failure in await self._host.registry.load_cleanup():
            self._host.log.error("cleanup_failed", error=str(failure))

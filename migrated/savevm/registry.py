"""The registry of live handlers, and the only caller of their hooks.

The rule of the file: before a hook runs, the lock regime of the contract is asserted, so a caller in the wrong regime
fails at once. Walks go in list order (priority, highest first; then registration), skip inactive handlers, and every
handler gets its turn in each walk. One registry per machine: two machines in one process do not share a list.

Source of the contract: `savevm.handlers`; of the walks: QEMU's savevm (sections START, PART, END, FULL).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from migrated.errors import (
    ChannelError,
    LocalProtocolError,
    MigrationCancelled,
    RemoteProtocolError,
    SectionError,
    WorkloadError,
)
from migrated.savevm.handlers import Hook, Pending, SaveVMHandlers, VMStateIf
from migrated.savevm.iothread_lock import IothreadLock
from migrated.stream.blocking import BlockingIncoming
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.preflight import SectionNeed
from migrated.wire.section import SectionHeader, SectionType

ANY_INSTANCE = -1
#: A QEMU looks a PART up by its number, and what it has not loaded yet has the number 0 there.
FIRST_SECTION_ID = 1
#: A cleanup is not cancelled with its migration, and it holds the lock: a hook that hangs must not keep both for good.
CLEANUP_TIMEOUT_S = 10.0
#: An idstr travels behind one length byte.
IDSTR_MAX_BYTES = 255
#: What keeps its own type when a hook raises it; everything else becomes a SectionError that names the section.
_TELLING = (ChannelError, RemoteProtocolError, WorkloadError, MigrationCancelled, SectionError)


@dataclass(slots=True, eq=False)
class SaveStateEntry:
    """One registration. ``section_id`` is this process's own numbering and means nothing to the peer."""

    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    ops: SaveVMHandlers
    opaque: Any
    priority: int


class MissingSections(Protocol):
    """Asked when a stream names a section that nobody registered (yet); returns once it may be looked up again."""

    async def __call__(self, idstr: str, instance_id: int) -> None: ...


class KeepSection(Protocol):
    """Offered a FULL section that nobody registered, before its body; takes it whole, up to its footer."""

    async def __call__(self, f: IncomingStream, header: SectionHeader) -> None: ...


class SaveVMRegistry:
    """Handlers of one machine: ``register_savevm_live``, ``unregister_savevm``, and every walk over them."""

    def __init__(self, lock: IothreadLock, *, cleanup_timeout_s: float = CLEANUP_TIMEOUT_S) -> None:
        self.lock = self._lock = lock
        self._cleanup_timeout_s = cleanup_timeout_s
        self._entries: list[SaveStateEntry] = []
        self._next_section_id = FIRST_SECTION_ID
        self._loading: dict[int, tuple[SaveStateEntry, int]] = {}
        self._loaded: set[tuple[str, int]] = set()

    # -- registration ------------------------------------------------------------------------------------------

    def register_savevm_live(
        self, idstr: str, instance_id: int, version_id: int, ops: SaveVMHandlers, opaque: Any, *, priority: int = 0
    ) -> int:
        """Register a handler and return its instance id.

        ``instance_id`` -1 picks the next free one for ``idstr``. Raises LocalProtocolError for a name the wire cannot
        carry, and for an (idstr, instance id) that exists.
        """
        if not 1 <= len(idstr.encode()) <= IDSTR_MAX_BYTES:
            raise LocalProtocolError(f"idstr {idstr!r} must have 1 to {IDSTR_MAX_BYTES} bytes")
        taken = [entry.instance_id for entry in self._entries if entry.idstr == idstr]
        if instance_id == ANY_INSTANCE:
            instance_id = max(taken, default=-1) + 1
        elif instance_id in taken:
            raise LocalProtocolError(f"a handler {idstr!r} with instance id {instance_id} is registered already")
        entry = SaveStateEntry(self._next_section_id, idstr, instance_id, version_id, ops, opaque, priority)
        self._next_section_id += 1
        after = [i for i, other in enumerate(self._entries) if other.priority >= priority]
        self._entries.insert(after[-1] + 1 if after else 0, entry)
        return instance_id

    def unregister_savevm(self, obj: VMStateIf | None, idstr: str, opaque: Any) -> None:
        """Remove every entry with this very ``opaque`` whose idstr is ``idstr``, or ``id/idstr`` with ``obj``'s id."""
        name = f"{obj.get_id()}/{idstr}" if obj is not None else idstr
        self._entries = [e for e in self._entries if not (e.opaque is opaque and e.idstr == name)]

    def find(self, idstr: str, instance_id: int) -> SaveStateEntry | None:
        """Return the entry with this idstr and instance id, if any."""
        for entry in self._entries:
            if entry.idstr == idstr and entry.instance_id == instance_id:
                return entry
        return None

    def takes(self, idstr: str, instance_id: int) -> bool:
        """Say whether a section of this name would be loaded here."""
        entry = self.find(idstr, instance_id)
        return entry is not None and entry.ops.load_state is not None

    def section_ids(self) -> list[tuple[str, int]]:
        """Return (idstr, instance id) of every entry, in list order."""
        return [(entry.idstr, entry.instance_id) for entry in self._entries]

    # -- saving ------------------------------------------------------------------------------------------------

    async def save_setup(self, f: OutgoingStream) -> None:
        """Write one START section per live handler. Lock not held."""
        self._lock.assert_not_held("save_setup")
        for entry in await self._active("save_setup"):
            async with self._section(f, SectionType.START, entry):
                await self._call(entry, "save_setup", f, entry.opaque)

    async def save_live_pending(self, f: OutgoingStream, threshold_size: int) -> Pending:
        """Add up what every handler still has to send, in bytes. Lock not held."""
        self._lock.assert_not_held("save_live_pending")
        sums = Pending()
        for entry in await self._active("save_live_pending"):
            part = await self._call(entry, "save_live_pending", f, entry.opaque, threshold_size)
            sums = Pending(*(a + b for a, b in zip(sums, Pending(*part), strict=True)))
        return sums

    async def save_live_iterate(self, f: OutgoingStream, *, postcopy: bool = False, snapshot: bool = False) -> bool:
        """Give every live handler one PART section; True when none had anything left.

        Lock not held in a migration, held in a snapshot. In postcopy only handlers with ``has_postcopy`` take part.
        """
        if snapshot:
            self._lock.assert_held("save_live_iterate in a snapshot")
        else:
            self._lock.assert_not_held("save_live_iterate")
        all_done = True
        for entry in await self._active("save_live_iterate"):
            if not await self._test(entry, "is_active_iterate", default=True):
                continue
            if postcopy and not await self._test(entry, "has_postcopy", default=False):
                continue
            async with self._section(f, SectionType.PART, entry):
                all_done &= bool(await self._call(entry, "save_live_iterate", f, entry.opaque))
        return all_done

    async def save_live_complete_precopy(self, f: OutgoingStream, *, postcopy: bool = False) -> None:
        """Write the END sections, machine stopped. Lock held. Entering postcopy skips handlers that go on there."""
        self._lock.assert_held("save_live_complete_precopy")
        for entry in await self._active("save_live_complete_precopy"):
            if postcopy and await self._test(entry, "has_postcopy", default=False):
                continue
            async with self._section(f, SectionType.END, entry):
                await self._call(entry, "save_live_complete_precopy", f, entry.opaque)

    async def save_live_complete_postcopy(self, f: OutgoingStream) -> None:
        """Write the END sections at the end of postcopy. Lock held."""
        self._lock.assert_held("save_live_complete_postcopy")
        for entry in await self._active("save_live_complete_postcopy"):
            async with self._section(f, SectionType.END, entry):
                await self._call(entry, "save_live_complete_postcopy", f, entry.opaque)

    async def save_state(self, f: OutgoingStream) -> None:
        """Write one FULL section per device. Lock held."""
        self._lock.assert_held("save_state")
        for entry in await self._active("save_state"):
            async with self._section(f, SectionType.FULL, entry):
                await self._call(entry, "save_state", f, entry.opaque)

    async def save_cleanup(self) -> list[SectionError]:
        """Call every save_cleanup, whatever happened before; return what failed instead of stopping. Lock held."""
        self._lock.assert_held("save_cleanup")
        return await self._cleanup("save_cleanup")

    async def resume_prepare(self, s: Any) -> None:
        """Prepare every handler for postcopy recovery; ``s`` is the migration's state. Lock not held."""
        self._lock.assert_not_held("resume_prepare")
        for entry in await self._active("resume_prepare"):
            await self._call(entry, "resume_prepare", s, entry.opaque)

    async def device_names(self, *, besides: Iterable[str]) -> list[str]:
        """Name the handlers that would write a section, without those in ``besides`` (for a peer without devices)."""
        known = set(besides)
        hooks = ("save_state", "save_setup", "save_live_complete_precopy")
        active = {entry.section_id: entry for hook in hooks for entry in await self._active(hook)}
        return [f"{e.idstr}/{e.instance_id}" for e in active.values() if e.idstr not in known]

    async def section_needs(self) -> list[SectionNeed]:
        """List the handlers that send, or would if they were active, in list order."""
        needs = []
        for entry in list(self._entries):
            live = entry.ops.save_setup is not None or entry.ops.save_live_complete_precopy is not None
            if live or entry.ops.save_state:
                active = await self._test(entry, "is_active", default=True)
                needs.append(SectionNeed(entry.idstr, entry.instance_id, entry.version_id, live, active))
        return needs

    # -- loading -----------------------------------------------------------------------------------------------

    async def load_setup(self, f: IncomingStream) -> None:
        """Start a load: forget the section ids of the last one, call every load_setup. Lock held."""
        self._lock.assert_held("load_setup")
        self._loading.clear()
        self._loaded.clear()
        for entry in await self._active("load_setup"):
            await self._call(entry, "load_setup", f, entry.opaque)

    async def load_state(
        self,
        f: IncomingStream,
        header: SectionHeader,
        *,
        missing: MissingSections | None = None,
        keep: KeepSection | None = None,
        listening: bool = False,
    ) -> str:
        """Feed one section's body to its handler and return its idstr; the caller reads the footer.

        Lock held, except for sections read after postcopy LISTEN. ``missing`` may wait for a late registration;
        ``keep`` takes FULL sections that nobody registered.
        """
        if listening:
            self._lock.assert_not_held("load_state after LISTEN")
        else:
            self._lock.assert_held("load_state")
        if keep is not None and header.kind is SectionType.FULL and not self.takes(header.idstr, header.instance_id):
            await keep(f, header)
            return header.idstr
        if header.kind in (SectionType.START, SectionType.FULL):
            entry = await self._find_for_load(header, missing)
            self._loading[header.section_id] = (entry, header.version_id)
        known = self._loading.get(header.section_id)
        if known is None:
            raise RemoteProtocolError(
                f"Unknown savevm section {header.section_id}", found=f"a {header.kind.name} section"
            )
        entry, version_id = known
        await self._call(entry, "load_state", f, entry.opaque, version_id)
        self._loaded.add((entry.idstr, entry.instance_id))
        return entry.idstr

    async def load_cleanup(self) -> list[SectionError]:
        """Call every load_cleanup, whatever happened before; return what failed instead of stopping. Lock held."""
        self._lock.assert_held("load_cleanup")
        return await self._cleanup("load_cleanup")

    async def not_loaded(
        self, *, besides: Iterable[str] = (), loaded: Collection[tuple[str, int]] | None = None
    ) -> list[str]:
        """Name the handlers that would have sent a section here and got none from this stream.

        ``loaded``: (idstr, instance id) of those that will get one, instead of those that did.
        """
        names = []
        got = self._loaded if loaded is None else loaded
        optional = set(besides)
        for entry in self._entries:
            saves = entry.ops.save_state or entry.ops.save_live_complete_precopy
            if saves is None or entry.ops.load_state is None or entry.idstr in optional:
                continue
            if (entry.idstr, entry.instance_id) in got:
                continue
            if await self._test(entry, "is_active", default=True):
                names.append(f"{entry.idstr}/{entry.instance_id}")
        return names

    async def _find_for_load(self, header: SectionHeader, missing: MissingSections | None) -> SaveStateEntry:
        if missing is not None and not self.takes(header.idstr, header.instance_id):
            await missing(header.idstr, header.instance_id)
        entry = self.find(header.idstr, header.instance_id)
        if entry is None or entry.ops.load_state is None:
            raise RemoteProtocolError(
                f"Unknown savevm section or instance '{header.idstr}' {header.instance_id}. Make sure that your current"
                " setup matches the one that sent this machine",
                expected="one of " + (", ".join(f"{e.idstr}/{e.instance_id}" for e in self._entries) or "none"),
            )
        if header.version_id > entry.version_id:
            raise RemoteProtocolError(
                f"savevm: unsupported version {header.version_id} for '{header.idstr}' v{entry.version_id}",
                section=header.idstr,
            )
        if header.section_id in self._loading and self._loading[header.section_id][0] is not entry:
            raise RemoteProtocolError(
                f"section id {header.section_id} was announced twice",
                section=header.idstr,
                expected=self._loading[header.section_id][0].idstr,
                found=header.idstr,
            )
        return entry

    # -- the only place that calls hooks -----------------------------------------------------------------------

    async def _active(self, hook: str) -> list[SaveStateEntry]:
        return [
            e for e in list(self._entries) if getattr(e.ops, hook) and await self._test(e, "is_active", default=True)
        ]

    async def _test(self, entry: SaveStateEntry, hook: str, *, default: bool) -> bool:
        if getattr(entry.ops, hook) is None:
            return default
        return bool(await self._call(entry, hook, entry.opaque))

    async def _call(self, entry: SaveStateEntry, name: str, *args: Any) -> Any:
        hook: Hook | None = getattr(entry.ops, name)
        if hook is None:
            raise SectionError(entry.idstr, entry.instance_id, name, "the handler has no such hook")
        try:
            if name == "load_state" and not _is_async(hook):
                return await _call_blocking(hook, *args)
            result = hook(*args)
            return await result if inspect.isawaitable(result) else result
        except _TELLING as error:
            if isinstance(error, RemoteProtocolError) and not error.section:
                error.section = f"{entry.idstr}/{entry.instance_id}"
            raise
        except Exception as error:  # a handler is foreign code: whatever it raises names its section
            raise SectionError(entry.idstr, entry.instance_id, name, str(error) or type(error).__name__) from error

    async def _cleanup(self, hook: str) -> list[SectionError]:
        failed = []
        for entry in list(self._entries):
            if getattr(entry.ops, hook) is None:
                continue
            try:
                async with asyncio.timeout(self._cleanup_timeout_s):
                    await self._call(entry, hook, entry.opaque)
            except TimeoutError:
                why = f"no end within {self._cleanup_timeout_s:g} s"
                failed.append(SectionError(entry.idstr, entry.instance_id, hook, why))
            except Exception as error:  # noqa: BLE001 - every handler gets its cleanup, whatever the others do
                failed.append(SectionError(entry.idstr, entry.instance_id, hook, str(error)))
        return failed

    @asynccontextmanager
    async def _section(self, f: OutgoingStream, kind: SectionType, entry: SaveStateEntry) -> AsyncIterator[None]:
        f.begin_section(SectionHeader(kind, entry.section_id, entry.idstr, entry.instance_id, entry.version_id))
        yield
        f.end_section(entry.section_id)
        await f.drain()


def _is_async(hook: Hook) -> bool:
    return inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(type(hook).__call__)


async def _call_blocking(hook: Hook, f: IncomingStream, *args: Any) -> Any:
    """Run a plain load_state in a thread, where its ``f.get_*`` may wait for the network."""
    blocking = BlockingIncoming(f, asyncio.get_running_loop())
    try:
        result = await asyncio.to_thread(hook, blocking, *args)
    finally:
        blocking.close()
    return await result if inspect.isawaitable(result) else result

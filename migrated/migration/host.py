"""What one migration needs of the daemon it runs in, in one value.

The rule of the file: only contracts (savevm) and callbacks; the composition root fills it in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from structlog.typing import FilteringBoundLogger

from migrated.errors import CommandError, MigratedError
from migrated.migration.faultpoint import FaultPoint, no_fault
from migrated.migration.ownership import Ownership
from migrated.model.handover import Hold
from migrated.model.parameters import Capabilities, Parameters
from migrated.model.runstate import RunState
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.ports import (
    MachinePort,
    MultifdLoadPort,
    MultifdSavePort,
    PostcopyLoadPort,
    PostcopySavePort,
    RamBlockPort,
)
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.incoming import IncomingStream
from migrated.wire.section import SectionHeader

Emit = Callable[[str, dict[str, object]], None]
#: Makes a task of the daemon, which ends with it.
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

#: Sections every stream may or may not have; everything else that is registered must arrive.
OPTIONAL_SECTIONS = ("ram", "globalstate", "timer")


class GlobalStatePort(Protocol):
    """The run state that travels with the machine."""

    received: RunState | None

    def store(self, run_state: RunState) -> None: ...


class KeptSectionsPort(Protocol):
    """Sections that nothing here takes, and that travel on with the machine."""

    async def keep(self, f: IncomingStream, header: SectionHeader, *, from_qemu: bool) -> int: ...

    def forget(self) -> None: ...

    def known_to_qemu(self) -> list[str]: ...

    def describe(self) -> list[dict[str, object]]: ...


class SitePort(Protocol):
    """The host that a daemon runs on, as far as a migration must know it beforehand."""

    tool: str
    """Name and version of this program."""

    def clock_ms(self) -> int:
        """Return the wall clock, in ms since the epoch: to be compared, never to measure time."""
        ...

    def processors(self) -> int:
        """Return how many processors this program may use."""
        ...

    def used_bytes(self, block: RamBlockPort) -> int:
        """Return how much of a block is not a hole."""
        ...

    def free_bytes(self) -> int:
        """Return how much memory an arriving machine can have, without what others have reserved."""
        ...

    def reserve(self, size_bytes: int) -> None:
        """Have others on this host keep away from that much memory, for a limited time; 0 ends it."""
        ...

    def huge_page_obstacles(self) -> list[MigratedError]:
        """Return what stands against memory in huge pages for the blocks here that consist of them."""
        ...

    def record_obstacles(self) -> list[MigratedError]:
        """Return what stands against writing the ownership record."""
        ...


@dataclass(slots=True)
class Settings:
    """Capabilities and parameters as they are now; values are replaced, never changed in place."""

    capabilities: Capabilities
    parameters: Parameters

    def seconds(self, name: str) -> float:
        """Return a parameter that is kept in milliseconds, in seconds."""
        return self.parameters.integer(name) / 1000

    def enabled(self, capability: str) -> bool:
        """Return whether a capability is on."""
        return bool(self.capabilities.get(capability))

    def copy(self) -> Settings:
        """Return settings of one migration, which begin as these."""
        return Settings(self.capabilities, self.parameters)

    def adopt(self, capabilities: Mapping[str, bool], parameters: Mapping[str, object]) -> None:
        """Do as the source does. Raises CommandError for what is unknown here."""
        self.capabilities = self.capabilities.replace(capabilities)
        self.parameters = self.parameters.replace(parameters)

    def delta_cache_bytes(self) -> int:
        """Return how much of what was sent is remembered, for deltas; 0 for nothing."""
        return self.parameters.integer("xbzrle-cache-size") if self.enabled("xbzrle") else 0

    def silence_timeout_s(self) -> float:
        """Return how long a peer may be silent inside an element."""
        return self.seconds("x-migrated-silence-timeout")


@dataclass(frozen=True, slots=True)
class Host:
    """One daemon, as its migrations see it."""

    machine: MachinePort
    registry: SaveVMRegistry
    lock: IothreadLock
    ownership: Ownership
    global_state: GlobalStatePort
    kept: KeptSectionsPort
    settings: Settings
    site: SitePort
    completeness: Sequence[Callable[[], None]]
    """Each raises RemoteProtocolError when a stream has ended and something is missing."""
    postcopy_save: PostcopySavePort
    postcopy_load: PostcopyLoadPort
    multifd_save: MultifdSavePort
    multifd_load: MultifdLoadPort
    emit: Emit
    clock: Callable[[], float]
    log: FilteringBoundLogger
    attach_timeout_s: float
    fault_point: FaultPoint = no_fault
    """Awaited at the points that `faultpoint` names."""


def require_machine_here(host: Host) -> None:
    """Raise CommandError unless this host has the machine, whole, and may send or save it."""
    ownership, run_state = host.ownership, host.machine.run_state
    if ownership.outcome_unknown or ownership.record.hold is Hold.INCOMPLETE:
        raise CommandError(f"{ownership.text()}. Next: {ownership.next_step()}", error_id="not-owner")
    if run_state is RunState.INMIGRATE:
        raise CommandError("Guest is waiting for an incoming migration")
    if run_state is RunState.POSTMIGRATE:
        raise CommandError("Can't migrate the vm that was paused due to previous migration")


def require_something(host: Host, handlers: Sequence[str]) -> None:
    """Raise CommandError where there is nothing that could be sent."""
    if not handlers and not host.machine.ram_blocks():
        raise CommandError(
            f"there is nothing to migrate: machine '{host.machine.name}' has no RAM block and no device here."
            " Next: start its workload, which attaches to this daemon, or load a handler ([handlers] load)",
            error_id="nothing-to-migrate",
        )


async def let_go_of_memory(host: Host) -> None:
    """Let go of the memory of a machine that moved away, or came only in part. Raises CommandError."""
    ownership = host.ownership
    if ownership.record.hold not in (Hold.MOVED, Hold.PARTIAL, Hold.INCOMPLETE):
        raise CommandError("only the memory of a machine that moved away, or came only in part, can be released")
    if ownership.record.hold is not Hold.MOVED:
        mappings = [mapping for block in host.machine.ram_blocks() for mapping in block.mappings]
        if names := ", ".join(sorted({mapping.workload for mapping in mappings})):
            raise CommandError(f"the memory is still mapped by {names}. Next: end it, then release again")
        await ownership.become(Hold.NONE)
        host.machine.set_run_state(RunState.INMIGRATE)
    await host.machine.release()
    host.kept.forget()


async def write_moved(host: Host, *, peer: str, migration_id: str, epoch: int | None = None) -> None:
    """Write that the machine is at the other end. It is, also where that cannot be written."""
    try:
        await host.ownership.become(Hold.MOVED, peer=peer, migration_id=migration_id, epoch=epoch)
    except OSError as error:
        # On the disk "released" stays, which never runs it here; a restart asks.
        host.log.error("record_not_written", error=str(error), migration_id=migration_id)


async def leave_machine(host: Host, peer: str) -> None:
    """Have everybody here know that the machine is at ``peer``. Lock held."""
    host.machine.set_run_state(RunState.POSTMIGRATE)
    await host.machine.moved(peer)


async def resume_machine(host: Host, previous: RunState) -> None:
    """Bring a machine that was stopped for switchover back to what it was. Lock held; twice does no harm."""
    host.lock.assert_held("resuming the machine")
    if previous is RunState.RUNNING:
        await host.machine.cont()
    else:
        host.machine.set_run_state(previous)


async def insist(step: Callable[[], Awaitable[None]]) -> None:
    """Repeat an idempotent cleanup until it ran to its end; deliver a cancellation only afterwards."""
    cancelled = None
    while True:
        try:
            await step()
            break
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that a task group is about."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


def error_of(error: MigratedError | OSError) -> MigratedError:
    """Return what operators are told."""
    return error if isinstance(error, MigratedError) else MigratedError(str(error), error_id="host-io")


E = TypeVar("E", bound=BaseException)


def without_frames(error: E) -> E:
    """Cut the tracebacks off an error that is to be remembered, or was made into another one.

    Their frames hold the buffers of the migration; and, in a cycle with the error, until the collector comes by.
    """
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__
    return error

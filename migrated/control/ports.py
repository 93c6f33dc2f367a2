"""What the control socket needs from the rest of the daemon, as Protocols.

The rule of the file: only shapes. `migration` implements the migrator and the snapshots, `machine` the machine; the
composition root hands them over as `Services`. Everything a port refuses, it refuses with CommandError, whose text
reaches the client as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from migrated.model.parameters import Capabilities, Parameters
from migrated.savevm.ports import MachinePort

EventCallback = Callable[[str, dict[str, object]], None]
"""Called with an event's name and data, on the event loop; must not block or raise."""


class MigratorPort(Protocol):
    """Everything an operator can ask of the migration engine."""

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def parameters(self) -> Parameters: ...

    def set_capabilities(self, changes: dict[str, bool]) -> None:
        """Change all or none. Raises CommandError."""
        ...

    def set_parameters(self, changes: dict[str, object]) -> None:
        """Change all or none. Raises CommandError."""
        ...

    async def migrate(self, uri: str, *, resume: bool = False, request_id: str = "") -> None:
        """Start an outgoing migration; returns once it is accepted. The same request id twice is one migration."""
        ...

    async def preflight(self, uri: str) -> dict[str, object]:
        """What x-migrated-preflight returns: everything at both ends that stands in the way. Nothing is moved."""
        ...

    async def cancel(self) -> None: ...

    async def proceed(self, state: str) -> None:
        """Leave the pause before the switchover, if that is where the migration stands."""
        ...

    async def incoming(self, uri: str) -> None:
        """Start to listen for an incoming migration."""
        ...

    def start_postcopy(self) -> None:
        """Have the outgoing migration switch to postcopy."""
        ...

    def pause(self) -> None:
        """Break the connection of a postcopy."""
        ...

    async def recover(self, uri: str) -> None:
        """Wait at another address for the source of a paused postcopy."""
        ...

    def query(self) -> dict[str, object]:
        """What query-migrate returns."""
        ...

    async def stop(self) -> None: ...
    async def cont(self) -> None: ...

    async def release(self) -> None:
        """Let go of the RAM of a machine that has moved away."""
        ...

    async def resolve(self, peer_is_fenced: bool, peer_is_running: bool) -> None:
        """Settle an unknown outcome by an operator's statement; exactly one of the two is true."""
        ...

    @property
    def descriptors(self) -> DescriptorsPort:
        """Descriptors under names, for ``fd:`` URIs."""
        ...

    def ownership(self) -> dict[str, object]:
        """What the ownership record says, and what may safely be done next."""
        ...

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        """Have ``callback`` called for every event; returns what ends that."""
        ...


class DescriptorsPort(Protocol):
    """Descriptors that clients have passed."""

    def add(self, name: str, fd: int) -> None:
        """Keep ``fd`` (owned from here on, also when this raises) under a name."""
        ...

    def close(self, name: str) -> None: ...


class SnapshotsPort(Protocol):
    """Everything an operator can ask of snapshots and their jobs. Whatever works long is a job."""

    async def save(self, job_id: str, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        """Save the machine; returns once the job has begun."""
        ...

    async def load(self, job_id: str, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        """Replace the machine by a saved one; returns once the job has begun."""
        ...

    async def delete(self, job_id: str, tag: str, devices: Sequence[str]) -> None:
        """Delete a snapshot; returns once the job has begun."""
        ...

    async def query(self) -> list[dict[str, object]]:
        """What x-migrated-query-snapshots returns."""
        ...

    def jobs(self) -> list[dict[str, object]]:
        """What query-jobs returns."""
        ...

    def cancel_job(self, job_id: str) -> None: ...
    def dismiss_job(self, job_id: str) -> None: ...


class HistoryPort(Protocol):
    """What is kept of migrations."""

    async def query(self) -> list[dict[str, object]]:
        """What x-migrated-query-history returns."""
        ...

    async def report(self, wanted: str) -> dict[str, object]:
        """What x-migrated-query-report returns; ``wanted`` is an id, or the beginning of one."""
        ...


class SessionPort(Protocol):
    """The connection a command came in on, for the few commands that are about the connection."""

    negotiated: bool

    def take_fd(self) -> int | None:
        """The oldest descriptor that came with the client's latest message; the caller owns it from here on."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """All that commands act on."""

    migrator: MigratorPort
    snapshots: SnapshotsPort
    history: HistoryPort
    machine: MachinePort
    quit: Callable[[], None]
    """Ask the daemon to end; returns at once, so that the answer still goes out."""


class CommandDescription(Protocol):
    """What introspection needs to know of a command."""

    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> type: ...
    @property
    def result(self) -> object:
        """A type, possibly generic such as ``list[X]``."""
        ...


EventShapes = Mapping[str, type]
"""Name of an event -> the struct of its data."""

"""What the engine and the handlers need from the outside, as Protocols.

The rule of the file: no behaviour, only shapes. `machine` implements the machine side, `migration.ownership` the
record; `migration`, `ram` and `devices` see nothing but these. All sizes are bytes, all file descriptors stay owned by
whoever hands them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from migrated.errors import MigratedError, WorkloadError
from migrated.model.faults import FaultFigures
from migrated.model.runstate import RunState
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import SocketChannel
from migrated.wire.multifd import PacketFlag


@dataclass(frozen=True, slots=True)
class TrackedMapping:
    """One process's mapping of a whole RAM block, with the descriptors through which the daemon tracks its writes."""

    workload: str
    """Name of the attached process, for error messages."""
    address: int
    """Start of the mapping in that process."""
    length: int
    """Length of the mapping; equals the block's size."""
    pagemap: int
    """The process's own ``/proc/self/pagemap``: pins its memory map, ESRCH once it is gone."""
    userfault: int
    """A userfaultfd with WP_ASYNC, or -1 where the workload cannot have one (the block is then hashed)."""


class RamBlockPort(Protocol):
    """One RAM block of the machine, backed by a sealed memfd that the daemon has mapped."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def page_size(self) -> int:
        """What it consists of at this host: 4096, or huge pages. All else is counted in target pages of 4096 bytes."""
        ...

    @property
    def memfd(self) -> int: ...
    @property
    def pages(self) -> NDArray[np.uint8]:
        """The daemon's own mapping, shape (size_bytes // 4096, 4096). Reading a hole allocates it."""
        ...

    @property
    def mappings(self) -> Sequence[TrackedMapping]: ...


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What a device gave: its bytes, and what they are (JSON in the shape of the VMDESCRIPTION), empty if not said."""

    state: bytes
    described: str = ""


class DevicePort(Protocol):
    """The state of one device that lives in an attached workload."""

    @property
    def idstr(self) -> str: ...
    @property
    def instance_id(self) -> int: ...
    @property
    def version_id(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def workload(self) -> str: ...

    async def save(self) -> DeviceState:
        """Ask the workload for the device's state. Raises WorkloadError (named, with a deadline)."""
        ...

    async def load(self, state: bytes, version_id: int) -> None:
        """Hand state to the workload and wait until it took it. Raises WorkloadError."""
        ...


class MachinePort(Protocol):
    """The machine as the engine sees it. Hold the iothread lock around `stop`, `cont` and `set_run_state`."""

    @property
    def name(self) -> str: ...
    @property
    def uuid(self) -> str | None: ...
    @property
    def machine_type(self) -> str: ...
    @property
    def run_state(self) -> RunState: ...

    def ram_blocks(self) -> Sequence[RamBlockPort]:
        """All RAM blocks, largest first, then by name (the order in which they are sent)."""
        ...

    def devices(self) -> Sequence[DevicePort]: ...

    async def stop(self, run_state: RunState) -> None:
        """Quiesce every workload and wait for all acknowledgements; then enter ``run_state`` (STOP event).

        Idempotent when already stopped (only the run state changes). Raises WorkloadError naming the workload that
        did not stop within the deadline or died; the machine is running again, as before, when it raises.
        """
        ...

    async def cont(self, *, confirm: bool = True) -> None:
        """Let every workload go on and enter ``running`` (RESUME event). Idempotent.

        Without ``confirm`` nobody waits for their answers: one that waits for a page gives none.
        """
        ...

    def set_run_state(self, run_state: RunState) -> None:
        """Move between two stopped run states."""
        ...

    async def throttle(self, percent: int) -> bool:
        """Slow cooperative workloads down to (100 - percent) %; 0 ends it. False when no workload can be slowed."""
        ...

    def check_alive(self) -> None:
        """Raise WorkloadError if a workload with a part in the machine left since `watch` or `begin_incoming`."""
        ...

    def watch(self) -> None:
        """Remember the workloads attached now; `check_alive` and `lost` speak of these from here on."""
        ...

    async def lost(self) -> None:
        """Wait until a watched workload, or one that came since and had memory, is gone; then raise WorkloadError."""
        ...

    def bar(self, why: str) -> None:
        """Let no workload attach or map anything from here on, and say why; "" ends that."""
        ...

    async def arrival_lost(self) -> None:
        """Wait until a workload that had a part of the arriving machine is gone, then raise WorkloadError naming it."""
        ...

    async def wait_declared(self, blocks: Iterable[str], devices: Iterable[str], timeout_s: float) -> None:
        """Wait until all named blocks and devices are declared and their workloads said ready.

        Raises WorkloadError listing what is missing when ``timeout_s`` passes.
        """
        ...

    async def moved(self, peer: str) -> None:
        """Tell the workloads that the machine runs at ``peer`` now (they may stand by for its return)."""
        ...

    async def release(self) -> None:
        """Let go of the memory of a machine that moved away."""
        ...

    async def begin_incoming(self) -> None:
        """A machine is about to arrive: refuse if one runs here. Raises WorkloadError when it cannot."""
        ...


class PostcopyLoadPort(Protocol):
    """The destination's RAM in postcopy. Everything is called from the event loop."""

    def advise(self, page_sizes: int) -> None:
        """Postcopy may follow: catch touches of missing pages from now on. After load_setup, before the blocks.

        ``page_sizes``: all those of the source's blocks, or-ed together.

        Raises WorkloadError or KernelError where this host cannot do it.
        """
        ...

    def obstacles(self) -> list[MigratedError]:
        """Return everything that would make postcopy fail on this host as it is."""
        ...

    async def discard(self, block: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Drop what arrived of (start, length) byte ranges. Raises RemoteProtocolError for a wrong one."""
        ...

    def listen(self, request: Callable[[str, int, int], None]) -> None:
        """Serve faults from here on; ``request(block, start, length)`` asks the source."""
        ...

    async def load_urgent(self, f: IncomingStream) -> None:
        """Place the pages of a connection that carries nothing else, until its end."""
        ...

    def started(self) -> None:
        """The machine runs: from here on no cleanup may let go of a page that is missing."""
        ...

    def reconnected(self) -> None:
        """The link is a new one: what was half received on the old one is forgotten."""
        ...

    def request_again(self) -> None:
        """Ask again for what somebody waits for."""
        ...

    def received(self, block: str) -> bytes:
        """Return a block's received bitmap as RECV_BITMAP carries it. Raises RemoteProtocolError for an unknown one."""
        ...

    async def finish(self) -> None:
        """Everything has arrived: stop serving. Raises RemoteProtocolError, and goes on serving, if it has not."""
        ...

    @property
    def faults(self) -> FaultFigures | None:
        """Figures of the present or the last postcopy."""
        ...


class BitmapSource(Protocol):
    """The migration's state, as a handler sees it in ``resume_prepare``."""

    async def received_bitmaps(self, pages: Mapping[str, int]) -> Mapping[str, bytes]:
        """Ask the destination what it has of each block (name -> number of pages); bitmaps as RECV_BITMAP has them."""
        ...


class PostcopySavePort(Protocol):
    """The source's RAM in postcopy."""

    async def discard_early(self, f: OutgoingStream) -> bool:
        """Have the destination drop what is not sent yet, while the machine still runs. False: nothing is there."""
        ...

    async def begin_postcopy(self, f: OutgoingStream, *, preempt: bool) -> None:
        """Machine stopped, lock held: look at the log for the last time, discard at the destination what is not sent.

        ``preempt``: what is requested goes over a connection of its own (`serve_urgent`).

        From here on only what is requested is sent, until `begin_background`.
        """
        ...

    async def require_stopped(self) -> None:
        """Prove that nobody has written since. Raises WorkloadError for a stray writer."""
        ...

    def stopped_so_far(self, late: Callable[[WorkloadError], None]) -> None:
        """The same without waiting: a look that goes on is nothing to stand still for, and tells ``late``.

        Raises WorkloadError for what is known now.
        """
        ...

    def begin_background(self) -> None:
        """Send everything else, too."""
        ...

    async def serve_urgent(self, f: OutgoingStream) -> None:
        """Send what is requested over ``f``, which carries nothing else, until this is cancelled."""
        ...

    async def end_urgent(self, f: OutgoingStream) -> None:
        """Say over ``f`` that nothing more comes."""
        ...

    async def wait_work(self, wait_s: float) -> None:
        """Wait until something is requested; where everything is to be sent, for ``wait_s`` at most."""
        ...

    def request(self, block: str | None, start: int, length: int) -> None:
        """Send these bytes of a block next (None: the block of the last request); what was sent is not sent again.

        Raises RemoteProtocolError for a range that makes no sense.
        """
        ...


class MultifdSavePort(Protocol):
    """The source's channels for pages."""

    def begin(
        self, channels: Sequence[SocketChannel], methods: Sequence[PacketFlag], level: int, *, to_qemu: bool
    ) -> None:
        """Send pages over these from the next setup on, packed by one of ``methods``."""
        ...

    async def run(self) -> None:
        """Send what is given to them, until this is cancelled."""
        ...

    def end(self) -> None:
        """Forget them. Twice does no harm."""
        ...


class MultifdLoadPort(Protocol):
    """The destination's channels for pages."""

    def begin(
        self,
        channels: Sequence[SocketChannel],
        methods: Sequence[PacketFlag],
        silence_timeout_s: Callable[[], float],
        *,
        checked: bool,
        from_qemu: bool,
    ) -> None:
        """Take pages from these, packed by one of ``methods``. ``checked``: every page has a sum."""
        ...

    async def receive(self) -> None:
        """Receive until all have ended. Raises RemoteProtocolError, ChannelError."""
        ...

    def received_bytes(self) -> int:
        """Return how much has come over them."""
        ...

    def end(self) -> None:
        """Forget them. Twice does no harm."""
        ...


class RecordStore(Protocol):
    """Durable storage of the hand-over record.

    `write` returns only when the record would survive a crash; cancelled, it makes an end of it first and is then
    cancelled, so that what is on disk is always known.
    """

    def read(self) -> dict[str, Any] | None: ...
    async def write(self, record: dict[str, Any]) -> None: ...

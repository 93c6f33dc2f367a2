"""The two device sections every QEMU machine has: ``globalstate`` (run state) and ``timer`` (clock offsets).

The rule of the file: byte for byte as QEMU 7.2 has them. ``globalstate`` v1: be32 strlen + 1, then 100 bytes of run
state name, NUL padded. ``timer`` v2: be64 cpu_ticks_offset, 8 unused bytes, be64 cpu_clock_offset. This daemon has no
virtual CPU clock; a ``timer`` section that came in is kept and sent on as it was.
"""

from __future__ import annotations

from typing import Any

from migrated.errors import RemoteProtocolError
from migrated.model.runstate import RunState
from migrated.savevm.handlers import SaveVMHandlers
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.primitives import printable

GLOBALSTATE_VERSION = 1
GLOBALSTATE_NAME_BYTES = 100
TIMER_VERSION = 2
TIMER_BYTES = 24


class GlobalState:
    """The run state that travels with the machine."""

    def __init__(self) -> None:
        self._stored = RunState.RUNNING
        self.received: RunState | None = None
        """What the last stream said; None when it said nothing (then the machine is to run)."""

    def store(self, run_state: RunState) -> None:
        """Remember the run state before the machine is stopped for switchover."""
        self._stored = run_state

    async def save_state(self, f: OutgoingStream, opaque: Any) -> None:
        """Write the stored run state."""
        name = self._stored.value.encode()
        f.put_be32(len(name) + 1)
        f.put_buffer(name.ljust(GLOBALSTATE_NAME_BYTES, b"\0"))

    async def load_setup(self, f: IncomingStream, opaque: Any) -> None:
        """Forget the last stream's run state."""
        self.received = None

    async def load_state(self, f: IncomingStream, opaque: Any, version_id: int) -> None:
        """Read a run state and check that there is such a one."""
        size = await f.get_be32()
        raw = await f.get_buffer(GLOBALSTATE_NAME_BYTES)
        name = raw.split(b"\0", 1)[0]
        if size > GLOBALSTATE_NAME_BYTES or size != len(name) + 1:
            raise RemoteProtocolError("globalstate has a wrong length", expected=str(len(name) + 1), found=str(size))
        try:
            self.received = RunState(name.decode()) if name else None
        except ValueError as error:
            raise RemoteProtocolError(f"invalid parameter value: {printable(name)}") from error


class TimerState:
    """Clock offsets of a QEMU source, kept as they came."""

    def __init__(self) -> None:
        self._kept = b""

    async def is_active(self, opaque: Any) -> bool:
        """Say whether there is something to send on (loading does not ask)."""
        return bool(self._kept)

    async def save_state(self, f: OutgoingStream, opaque: Any) -> None:
        """Send on what came in."""
        f.put_buffer(self._kept)

    async def load_state(self, f: IncomingStream, opaque: Any, version_id: int) -> None:
        """Keep the section."""
        self._kept = await f.get_buffer(TIMER_BYTES)


def register_global_state(registry: SaveVMRegistry) -> GlobalState:
    """Register both sections and return the run state's."""
    state = GlobalState()
    timer = TimerState()
    ops = SaveVMHandlers.of(timer)
    registry.register_savevm_live("timer", 0, TIMER_VERSION, ops, timer)
    registry.register_savevm_live("globalstate", 0, GLOBALSTATE_VERSION, SaveVMHandlers.of(state), state)
    return state

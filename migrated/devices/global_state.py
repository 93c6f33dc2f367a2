"""The two device sections every QEMU machine has: ``globalstate`` (run state) and ``timer`` (clock offsets).

The rule of the file: byte for byte as QEMU 7.2 has them. This daemon has no virtual CPU clock; a ``timer`` section that
came in is kept and sent on.
"""

from __future__ import annotations

from migrated.errors import RemoteProtocolError
from migrated.model.runstate import RunState
from migrated.savevm.handlers import SaveVMHandlers
from migrated.savevm.registry import SaveVMRegistry
from migrated.savevm.vmstate import DescribedState, vmstate_register
from migrated.stream.incoming import IncomingStream
from migrated.wire.primitives import printable
from migrated.wire.vmstate import VMState, buffer, int64, uint32, unused

GLOBALSTATE_NAME_BYTES = 100


class GlobalState:
    """The run state that travels with the machine."""

    def __init__(self) -> None:
        self._stored = RunState.RUNNING
        self.received: RunState | None = None
        """What the last stream said; None when it said nothing (then the machine is to run)."""
        self.size = 0
        self.runstate = b""

    def store(self, run_state: RunState) -> None:
        """Remember the run state before the machine is stopped for switchover."""
        self._stored = run_state

    def encode(self) -> None:
        """Put the stored run state where the description looks for it."""
        name = self._stored.value.encode()
        self.size = len(name) + 1
        self.runstate = name.ljust(GLOBALSTATE_NAME_BYTES, b"\0")

    def decode(self) -> None:
        """Take what arrived, if there is such a run state. Raises RemoteProtocolError."""
        name = self.runstate.split(b"\0", 1)[0]
        if self.size > GLOBALSTATE_NAME_BYTES or self.size != len(name) + 1:
            raise RemoteProtocolError(
                "globalstate has a wrong length", expected=str(len(name) + 1), found=str(self.size)
            )
        try:
            self.received = RunState(name.decode()) if name else None
        except ValueError as error:
            raise RemoteProtocolError(f"invalid parameter value: {printable(name)}") from error


class GlobalStateDescription(VMState):
    """Length of the name with its NUL, and the name in a buffer."""

    name = "globalstate"
    fields = (uint32("size"), buffer("runstate", GLOBALSTATE_NAME_BYTES))

    @staticmethod
    def pre_save(state: GlobalState) -> None:
        """Encode."""
        state.encode()

    @staticmethod
    def post_load(state: GlobalState, version_id: int) -> None:
        """Decode."""
        state.decode()


class Timer:
    """Clock offsets of a QEMU source, kept as they came."""

    def __init__(self) -> None:
        self.cpu_ticks_offset: int | None = None
        self.cpu_clock_offset = 0


class TimerDescription(VMState):
    """Offsets in ticks and in ns."""

    name = "timer"
    version_id = 2
    minimum_version_id = 1
    fields = (int64("cpu_ticks_offset"), unused(8), int64("cpu_clock_offset", since=2))

    @staticmethod
    def needed(timer: Timer) -> bool:
        """Only what came in is sent on."""
        return timer.cpu_ticks_offset is not None


class _GlobalStateHooks(DescribedState):
    """What a stream does not say must not be what the last one said."""

    def load_setup(self, f: IncomingStream, state: GlobalState) -> None:
        """Forget the last stream's run state."""
        state.received = None


def register_global_state(registry: SaveVMRegistry) -> GlobalState:
    """Register both sections and return the run state's."""
    state = GlobalState()
    vmstate_register(registry, None, 0, TimerDescription, Timer())
    hooks = SaveVMHandlers.of(_GlobalStateHooks(GlobalStateDescription))
    registry.register_savevm_live(GlobalStateDescription.name, 0, GlobalStateDescription.version_id, hooks, state)
    return state

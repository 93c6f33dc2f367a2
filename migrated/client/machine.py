"""`attach` and the machine object: what a workload sees.

The rule of the file: nothing here costs a running workload anything: `checkpoint` is two attribute tests, all else
happens once, or on the service thread. Standard library only (and numpy never): a workload chooses its own libraries.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from migrated.client.connection import Connection, ConnectionLost, Exchange
from migrated.client.described import described_device
from migrated.client.errors import AttachError, AttachRefused
from migrated.client.gate import Gate, State
from migrated.client.orders import Device, OrderBook
from migrated.errors import KernelError
from migrated.kernel import memory, userfault
from migrated.kernel.huge_pages import HUGE_PAGE_SIZE, page_size_of
from migrated.wire import attach as wire
from migrated.wire.attach_fields import MAX_NAME_BYTES
from migrated.wire.vmstate import Description

#: Where `attach()` looks for the socket when it is not told.
PATH_VARIABLE = "MIGRATED_ATTACH"
#: How soon to ask again after "not now" (another process is creating the block, a migration is under way).
AGAIN_S = 0.05
_STATES = {"running": State.RUNNING, "stopped": State.STOPPED, "incoming": State.INCOMING, "moved": State.MOVED}

_Callback = TypeVar("_Callback", bound=Callable[[], Any])


@dataclass(frozen=True, slots=True)
class _Block:
    name: str
    memfd: int
    mapping: memory.Mapping

    @property
    def page_size(self) -> int:
        return page_size_of(self.memfd)


def attach(
    path: str | os.PathLike[str] | None = None,
    *,
    pause: str = "cooperative",
    name: str | None = None,
    timeout_s: float = 5.0,
) -> Machine:
    """Attach this process to the machine whose daemon listens on ``path`` (default: $MIGRATED_ATTACH).

    ``pause``: "cooperative" (threads park in `checkpoint`, callbacks are called) or "signal" (SIGSTOP, RAM only).
    ``name`` names this process in messages; it must be unique within the machine. A daemon that does not listen yet
    is waited for up to ``timeout_s``. Raises AttachError, or AttachRefused with the daemon's reason.
    """
    found = os.fspath(path) if path is not None else os.environ.get(PATH_VARIABLE, "")
    if not found:
        raise AttachError(f"no path of an attach socket given, and ${PATH_VARIABLE} is not set")
    if pause not in wire.PAUSES:
        raise ValueError(f"pause must be one of {', '.join(wire.PAUSES)}, not {pause!r}")
    return Machine(found, pause, wire.cut_name(name or _default_name()), timeout_s)


class Machine:
    """The machine this process is a part of. Made by `attach`; a context manager."""

    def __init__(self, path: str, pause: str, name: str, timeout_s: float) -> None:
        self.name = name
        """The name of this process within the machine."""
        self.machine_name = ""
        """The name of the machine."""
        self._pause = pause
        self._ready = False
        self._blocks: dict[str, _Block] = {}
        self._declaring = threading.Lock()
        self._connection = Connection(path, self)
        self._gate = Gate(State.STOPPED, self._connection.wake)
        self._orders = OrderBook(self._gate, self._connection.send)
        self._orders.insistent = pause == "signal"
        self._descriptors = _own_descriptors()
        try:
            self._connection.open(timeout_s)
        except BaseException:
            self._close_descriptors()
            raise
        self._connection.serve()

    @property
    def tracked(self) -> bool:
        """True when the kernel logs this process's writes; False where the host refuses userfaultfd.

        Without it the daemon compares all pages at every look, which sees everything and costs time.
        """
        return "tracking" in self._descriptors

    # -- declare -----------------------------------------------------------------------------------------------

    def ram(self, name: str, size: int = 0, *, huge_pages: bool = False) -> memoryview:
        """Return the machine's RAM block ``name`` as a writable view, creating it if the machine has none.

        ``size`` in bytes, a multiple of 4096; it may be left out for a block that another process has declared.
        ``huge_pages``: it consists of pages of 2 MiB, of which ``size`` is a multiple then; the host must have enough
        of them (vm.nr_hugepages). Raises AttachRefused, KernelError.
        """
        page_size = HUGE_PAGE_SIZE if huge_pages else memory.PAGE_SIZE
        if size < 0 or size % page_size:
            raise ValueError(f"the size of a RAM block must be a multiple of {page_size}, not {size}")
        _check_name(name)
        with self._declaring:
            if name not in self._blocks:
                self._insist(lambda: self._declare_block(name, size, page_size))
        block = self._blocks[name]
        if size not in (0, block.mapping.size):
            raise ValueError(f"RAM block {name!r} has {block.mapping.size} bytes, not {size}")
        return block.mapping.view

    def _declare_block(self, name: str, size: int, page_size: int) -> None:
        answer, fds = self._connection.ask(_block_request(name, size, page_size))
        assert isinstance(answer, wire.BlockAnswer)
        if answer.exists:
            size, memfd = answer.size, fds[0]
        else:
            memfd = memory.create_memfd(name, size, page_size)
        try:
            memory.seal_size(memfd, size)
            mapping = memory.Mapping(memfd, size, dont_fork=True)
        except BaseException:
            os.close(memfd)
            raise
        block = _Block(name, memfd, mapping)
        try:
            self._connection.ask(
                _map_request(name, mapping),
                [memfd],
                on_ok=lambda: self._blocks.__setitem__(name, block),
            )
        finally:
            if self._blocks.get(name) is not block:
                mapping.close()
                os.close(memfd)

    @overload
    def device(
        self,
        name: str,
        *,
        save: Callable[[], bytes],
        load: Callable[[bytes, int], object],
        version_id: int = 1,
        instance_id: int = 0,
        priority: int = 0,
    ) -> None: ...

    @overload
    def device(self, name: str, *, vmstate: Description, state: object, instance_id: int = 0) -> None: ...

    def device(
        self,
        name: str,
        *,
        save: Callable[[], bytes] | None = None,
        load: Callable[[bytes, int], object] | None = None,
        vmstate: Description | None = None,
        state: object = None,
        version_id: int = 1,
        instance_id: int = 0,
        priority: int = 0,
    ) -> None:
        """Declare a device: ``save() -> bytes`` gives its state, ``load(state, version_id)`` takes one.

        Or: the object ``state`` is the device, and travels as the description ``vmstate`` says. Everything is called on
        this library's own thread while the machine is stopped. Raises AttachRefused.
        """
        self._cooperative_only("device()")
        _check_name(name)
        if vmstate is not None and save is None and load is None:
            device = described_device(name, instance_id, vmstate, state)
        elif save is not None and load is not None and vmstate is None:
            give = save
            device = Device(name, instance_id, version_id, priority, lambda: (give(), ""), load)
        else:
            raise ValueError(f"device {name!r} needs either save= and load=, or vmstate= and state=")
        key = name, instance_id
        if key in self._orders.devices:
            raise ValueError(f"device {name}/{instance_id} is declared already")
        self._insist(
            lambda: self._connection.ask(
                _device_request(device),
                on_ok=lambda: self._orders.devices.__setitem__(key, device),
            )
        )

    def on_stop(self, callback: _Callback) -> _Callback:
        """Call ``callback()`` on this library's own thread whenever the machine stops, before that is acknowledged."""
        self._cooperative_only("on_stop()")
        self._orders.on_stop.append(callback)
        return callback

    def on_cont(self, callback: _Callback) -> _Callback:
        """Call ``callback()`` when the machine goes on after a stop, before any thread leaves `checkpoint`."""
        self._cooperative_only("on_cont()")
        self._orders.on_cont.append(callback)
        return callback

    def ready(self) -> None:
        """Say that everything is declared. Raises AttachRefused."""
        self._insist(lambda: self._connection.ask(wire.Ready, on_ok=self._set_ready))

    # -- run ---------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Return at once while the machine runs; wait while it is stopped.

        A thread that calls this once is waited for at each stop from then on, until it ends: call it at least as
        often as the machine may have to stop. Raises MachineMoved when the machine runs elsewhere.
        """
        gate = self._gate
        if gate.smooth and gate.mine.joined:
            return
        self._not_on_service_thread("checkpoint()")
        gate.checkpoint()

    def wait_running(self) -> None:
        """Wait until the machine runs here. Raises MachineMoved when it moved away, unless `standby` was called."""
        self._not_on_service_thread("wait_running()")
        if not self._ready:
            raise AttachError("call ready() before wait_running()")
        self._gate.wait_running()

    def standby(self) -> None:
        """After MachineMoved: offer the blocks for overwriting, so that a machine can arrive here again."""
        if self._gate.state in (State.STANDBY, State.INCOMING):
            return
        if self._gate.state is not State.MOVED:
            raise AttachError(f"standby() is for a machine that moved away; this one is {self._gate.state.value}")
        self._insist(lambda: self._connection.ask(wire.Standby, on_ok=lambda: self._gate.enter(State.STANDBY)))

    def close(self) -> None:
        """Leave the machine. Its views stay usable, but nobody else sees them any more. Twice does no harm."""
        self._gate.close("this machine object is closed")
        self._connection.close()
        self._close_descriptors()
        while self._blocks:
            _, block = self._blocks.popitem()
            block.mapping.close()
            os.close(block.memfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- for the connection, on its thread ---------------------------------------------------------------------

    def hello(self) -> tuple[wire.Hello, Sequence[int]]:
        """Say who and in which state we are."""
        state = self._gate.state.value
        if not self._gate.ever_ran and state in ("stopped", "incoming"):
            state = "fresh"
        hello = wire.Hello(wire.VERSION, self.name, self._pause, state, tuple(self._descriptors))
        return hello, list(self._descriptors.values())

    def welcomed(self, welcome: wire.Welcome) -> None:
        """Take over the daemon's view where it may change ours; whatever else differs, it will order."""
        self.machine_name = welcome.machine
        state = _STATES[welcome.state]
        if state is State.MOVED:
            self._orders.moved(welcome.peer)
        elif not self._gate.ever_ran and self._gate.state in (State.STOPPED, State.INCOMING):
            self._gate.enter(state)

    def declare(self, exchange: Exchange) -> None:
        """Declare again what was declared before the connection broke."""
        for block in list(self._blocks.values()):
            _, fds = exchange(_block_request(block.name, block.mapping.size, block.page_size))
            for fd in fds:
                os.close(fd)  # the daemon compares the memfds
            exchange(_map_request(block.name, block.mapping), [block.memfd])
        for device in list(self._orders.devices.values()):
            exchange(_device_request(device))
        if self._ready:
            exchange(wire.Ready)

    def obey(self, message: wire.FromDaemon, fds: Sequence[int]) -> None:
        """Do what the daemon wants."""
        self._orders.obey(message, fds)

    def pending(self) -> bool:
        """True while a stop waits for threads to park."""
        return self._orders.pending()

    def look(self) -> None:
        """Look whether they have."""
        self._orders.look()

    def lost(self) -> None:
        """The connection ended."""
        self._orders.connection_lost()

    # -- inside ------------------------------------------------------------------------------------------------

    def _insist(self, ask: Callable[[], object]) -> None:
        """Ask until the daemon, this one or the next, has an answer that stays."""
        while True:
            try:
                ask()
            except ConnectionLost:
                pass
            except AttachRefused as error:
                if not error.again:
                    raise
            else:
                return
            time.sleep(AGAIN_S)

    def _set_ready(self) -> None:
        self._ready = True

    def _cooperative_only(self, what: str) -> None:
        if self._pause != "cooperative":
            raise AttachError(f'{what} needs pause="cooperative": a signal workload\'s threads are all stopped')

    def _not_on_service_thread(self, what: str) -> None:
        if self._connection.on_service_thread:
            raise AttachError(f"{what} must not be called from on_stop, on_cont, save or load")

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _own_descriptors() -> dict[str, int]:
    """Open what the daemon needs to see this process's writes, as far as the host lets us."""
    descriptors = {"pagemap": os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)}
    for name, features in (("tracking", userfault.FEATURES_TRACKING), ("sync", userfault.FEATURES_SYNC)):
        try:
            descriptors[name] = userfault.open_userfaultfd(features)
        except KernelError:
            break  # the daemon compares pages instead
    return descriptors


def _block_request(name: str, size: int, page_size: int) -> Callable[[int], wire.FromWorkload]:
    return lambda number: wire.BlockRequest(number, name, size, page_size)


def _map_request(name: str, mapping: memory.Mapping) -> Callable[[int], wire.FromWorkload]:
    return lambda number: wire.MapRequest(number, name, mapping.address, mapping.size)


def _device_request(device: Device) -> Callable[[int], wire.FromWorkload]:
    return lambda number: wire.DeviceRequest(
        number, device.name, device.instance_id, device.version_id, device.priority
    )


def _default_name() -> str:
    program = os.path.basename(sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-c") else sys.executable)
    return f"{program or 'python'}-{os.getpid()}"


def _check_name(name: str) -> None:
    if not name or len(name.encode()) > MAX_NAME_BYTES or not name.isprintable():
        raise ValueError(f"a name must be 1 to {MAX_NAME_BYTES} printable UTF-8 bytes, not {name!r}")

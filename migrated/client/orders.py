"""What the daemon orders, and the workload's callbacks that carry it out. Everything here runs on the service thread.

The rule of the file: every order that has an id is answered exactly once, also when a callback of the workload raises:
then with `error` and its text. `on_cont` callbacks run only after `on_stop` callbacks did, so that pairs stay pairs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from migrated.client.gate import Gate, State
from migrated.kernel import memory
from migrated.wire import attach

_log = logging.getLogger("migrated.client")

Answer = Callable[[attach.FromWorkload, Sequence[int]], None]


@dataclass(frozen=True, slots=True)
class Device:
    """One declared device."""

    name: str
    instance_id: int
    version_id: int
    priority: int
    save: Callable[[], tuple[bytes, str]]
    """Gives the state, and what it consists of (JSON) where that is known."""
    restore: Callable[[bytes, int], object]


class OrderBook:
    """The workload's callbacks, and the stop that is under way."""

    def __init__(self, gate: Gate, answer: Answer) -> None:
        self.devices: dict[tuple[str, int], Device] = {}
        self.on_stop: list[Callable[[], object]] = []
        self.on_cont: list[Callable[[], object]] = []
        self.insistent = False
        """True for pause "signal": it goes on whatever it was told before."""
        self._gate = gate
        self._answer = answer
        self._stop: attach.Stop | None = None
        self._quiesced = False
        self._unacknowledged = False

    def obey(self, message: attach.FromDaemon, fds: Sequence[int]) -> None:
        """Do what the daemon wants; owns ``fds``."""
        try:
            match message:
                case attach.Stop():
                    self._try(message.id, lambda: self._begin_stop(message))
                case attach.Cont():
                    self._try(message.id, lambda: self._cont(message))
                case attach.Save():
                    self._try(message.id, lambda: self._save(message))
                case attach.Load():
                    self._try(message.id, lambda: self._load(message, fds))
                case attach.Throttle():
                    self._gate.throttle(message.percent)
                case attach.Moved():
                    self.moved(message.peer)
                case _:
                    _log.warning("unexpected message %s", type(message).__name__)
        finally:
            for fd in fds:
                os.close(fd)

    def pending(self) -> bool:
        """True while a stop waits for threads to park."""
        return self._stop is not None

    def look(self) -> None:
        """Answer the stop if every thread is parked."""
        if self._stop is not None and self._gate.quiet():
            stop, self._stop = self._stop, None
            self._unacknowledged = False
            self._answer(attach.Stopped(stop.id), ())

    def connection_lost(self) -> None:
        """The daemon is gone. A stop it never heard the end of did not happen: the workload goes on."""
        self._stop = None
        if self._unacknowledged:
            self._try(0, self._go_on)

    def moved(self, peer: str) -> None:
        """The machine runs at ``peer``. Whoever waits for one that never ran here goes on waiting."""
        if self._gate.state not in (State.STANDBY, State.INCOMING):
            self._gate.peer = peer
            self._gate.enter(State.MOVED)

    def _begin_stop(self, order: attach.Stop) -> None:
        if self._gate.state is State.RUNNING:
            # Threads first: the callbacks then find them at a place where nothing is half done, or on their way there.
            self._gate.enter(State.STOPPED)
            self._quiesced = self._unacknowledged = True
            for callback in self.on_stop:
                callback()
        self._stop = order

    def _cont(self, order: attach.Cont) -> None:
        self._stop = None
        if self._gate.state is State.MOVED and not self.insistent:
            raise RuntimeError("the machine moved away from here; its threads were told and have let go of it")
        self._go_on()
        self._answer(attach.Running(order.id), ())

    def _go_on(self) -> None:
        self._unacknowledged = False
        try:
            if self._quiesced:
                self._quiesced = False
                for callback in self.on_cont:
                    callback()
        finally:
            # The daemon counts it as running, whatever the callbacks say.
            self._gate.enter(State.RUNNING)

    def _save(self, order: attach.Save) -> None:
        state, description = self._find(order.device, order.instance_id).save()
        if not isinstance(state, bytes | bytearray | memoryview):
            raise TypeError(f"save() returned {type(state).__name__}, expected bytes")
        content = memoryview(state).cast("B")
        if len(content) > attach.MAX_STATE_BYTES:
            raise ValueError(f"save() returned {len(content)} bytes, expected at most {attach.MAX_STATE_BYTES}")
        memfd = memory.create_memfd(order.device, len(content))
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(memfd, content[written:], written)
            self._answer(attach.Saved(order.id, description), [memfd])
        finally:
            os.close(memfd)

    def _load(self, order: attach.Load, fds: Sequence[int]) -> None:
        if len(fds) != 1:
            raise ValueError(f"'load' came with {len(fds)} descriptors, expected 1")
        state = os.pread(fds[0], order.size, 0)
        if len(state) != order.size:
            raise ValueError(f"'load' came with {len(state)} bytes, expected {order.size}")
        self._find(order.device, order.instance_id).restore(state, order.version_id)
        self._answer(attach.Loaded(order.id), ())

    def _find(self, name: str, instance_id: int) -> Device:
        try:
            return self.devices[name, instance_id]
        except KeyError:
            raise LookupError(f"there is no device {name}/{instance_id}") from None

    def _try(self, order_id: int, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the workload's own code: whatever it raises is an answer
            _log.exception("an order of the daemon failed")
            text = attach.cut_text(f"{type(error).__name__}: {error}")
            self._answer(attach.Failed(order_id, text), ())

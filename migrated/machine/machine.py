"""The machine: its run state, its attached workloads, and what they declared.

The rule of the file: `run_state` says what the daemon wants, a workload's ``running`` says what it does; the two are
brought together by `stop` and `cont` (under the iothread lock, with one deadline for all workloads), and by `settle`
for a workload that attaches meanwhile (which needs no lock). Nothing but a `cont` ever sets a stopped workload going.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import structlog

from migrated.errors import WorkloadError
from migrated.machine.declarations import Declarations, DeviceCallback
from migrated.machine.retired import RetiredDescriptors
from migrated.machine.workload import Workload
from migrated.model.runstate import RunState, check_transition
from migrated.savevm.ports import DevicePort, RamBlockPort

#: The machine is at the other end, or may be: its memory here is kept when the workload leaves.
_KEEPS_MEMORY = frozenset({RunState.POSTMIGRATE, RunState.FINISH_MIGRATE})

#: A machine arrives, from another host or from a snapshot: who goes on would write over it.
_IS_OVERWRITTEN = frozenset({RunState.INMIGRATE, RunState.RESTORE_VM})


class Machine:
    """A MachinePort. ``close`` it when the attach server is closed."""

    def __init__(
        self,
        name: str,
        *,
        uuid: str | None,
        machine_type: str,
        initial_run_state: RunState,
        stop_timeout_s: Callable[[], float],
        on_event: Callable[[str, dict[str, Any]], None],
        on_device_declared: DeviceCallback,
        on_device_withdrawn: DeviceCallback,
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.machine_type = machine_type
        self.peer = ""
        """Where the machine moved to, as far as known."""
        self.barred = ""
        """Why no workload may attach or map anything; empty: they may."""
        self.workloads: dict[str, Workload] = {}
        self.retired = RetiredDescriptors()
        self.declared = Declarations(self.retired, on_device_declared, on_device_withdrawn)
        self.declared.hold = self._why_hold
        self.declared.bar = lambda: self.barred
        self._run_state = initial_run_state
        self._stopping = False
        self._stop_timeout_s = stop_timeout_s
        self._on_event = on_event
        self._throttle = 0
        self._watched: set[Workload] = set()
        self._lost: WorkloadError | None = None
        self._lost_waiters = 0
        self._arriving = False
        self._arrival_lost: WorkloadError | None = None
        self._changed = asyncio.Event()
        self._log = structlog.get_logger().bind(machine=name)

    # -- what it has -------------------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        """What the machine is doing."""
        return self._run_state

    def ram_blocks(self) -> Sequence[RamBlockPort]:
        """All RAM blocks, largest first, then by name."""
        return sorted(self.declared.blocks.values(), key=lambda block: (-block.size_bytes, block.name))

    def devices(self) -> Sequence[DevicePort]:
        """All devices of attached workloads, in the order of declaration."""
        return list(self.declared.devices.values())

    async def wait_declared(self, blocks: Iterable[str], devices: Iterable[str], timeout_s: float) -> None:
        """Wait until blocks and devices are declared and their workloads said ready. Raises WorkloadError."""
        blocks, devices = list(blocks), list(devices)
        try:
            async with asyncio.timeout(timeout_s):
                while self._missing(blocks, devices):
                    if self._arrival_lost is not None:
                        raise self._arrival_lost
                    changed = self._changed
                    await changed.wait()
        except TimeoutError as error:
            missing = "; ".join(self._missing(blocks, devices))
            raise WorkloadError(
                ", ".join(self.workloads) or "(none attached)", f"not declared within {timeout_s:g} s: {missing}"
            ) from error

    def _missing(self, blocks: Iterable[str], devices: Iterable[str]) -> list[str]:
        ready = {name for name, workload in self.workloads.items() if workload.ready}
        missing = []
        for name in blocks:
            block = self.declared.blocks.get(name)
            if block is None or not block.mappings:
                missing.append(f"RAM block {name}")
            elif not ready.issuperset(block.workloads):
                missing.append(f"RAM block {name} ({', '.join(block.workloads)} is not ready)")
            elif self._run_state in _IS_OVERWRITTEN and (going := self._going(block.workloads)):
                # A signal workload runs until it is frozen: it would write over what arrives.
                missing.append(f"RAM block {name} ({', '.join(going)} is not stopped yet)")
        there = [device for device in self.declared.devices.values() if device.workload in ready]
        missing.extend(f"device {idstr}" for idstr in devices if all(device.idstr != idstr for device in there))
        return missing

    def _going(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.workloads and self.workloads[name].running]

    # -- run state ---------------------------------------------------------------------------------------------

    async def stop(self, run_state: RunState) -> None:
        """Stop all workloads, or raise WorkloadError with all of them running again."""
        if self._run_state is not RunState.RUNNING:
            self.set_run_state(run_state)
            return
        check_transition(self._run_state, run_state)
        self._stopping = True
        try:
            await self._stop_all(self._stop_timeout_s())
        except BaseException:  # a cancelled stop leaves the machine running, too
            self._stopping = False
            await self._cont_all()
            raise
        self._run_state = run_state
        self._stopping = False
        self._on_event("STOP", {})

    async def _stop_all(self, timeout_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        # Again for who attached while the others stopped.
        while going := [workload for workload in self.workloads.values() if workload.running]:
            left_s = max(deadline - asyncio.get_running_loop().time(), 0)
            results = await asyncio.gather(*(workload.stop(left_s) for workload in going), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

    async def cont(self, *, confirm: bool = True) -> None:
        """Let all workloads go on; without ``confirm``, do not wait until they say so.

        Raises WorkloadError, with none running, only if a part of what arrived is lost.
        """
        if self._run_state is RunState.RUNNING:
            await self._cont_all()  # those that a stop which was cancelled twice may have left behind
            return
        if self._run_state is RunState.INMIGRATE and self._arrival_lost is not None:
            raise self._arrival_lost
        check_transition(self._run_state, RunState.RUNNING)
        self._run_state = RunState.RUNNING
        self._drop_unmapped("the machine runs without the workload that had them")
        await self._cont_all(confirm=confirm)
        self._on_event("RESUME", {})

    async def _cont_all(self, *, confirm: bool = True) -> None:
        waiting = [w for w in self.workloads.values() if w.unsettled or (w.ready and not w.running)]
        results = await asyncio.gather(
            *(workload.cont(self._stop_timeout_s(), confirm=confirm) for workload in waiting), return_exceptions=True
        )
        for workload, result in zip(waiting, results, strict=True):
            if isinstance(result, WorkloadError):
                # It was told and may run: the machine runs. Saying otherwise could start a second copy.
                self._log.warning("workload_did_not_confirm_cont", workload=workload.name, error=result.what)
            elif isinstance(result, BaseException):
                raise result

    def set_run_state(self, run_state: RunState) -> None:
        """Move between two stopped run states."""
        check_transition(self._run_state, run_state)
        self._run_state = run_state
        self._notify()

    async def settle(self, workload: Workload) -> None:
        """Bring a workload that attached to what the machine does. Raises WorkloadError."""
        while workload.attached:
            wanted = self._run_state is RunState.RUNNING and not self._stopping
            if wanted == workload.running or (not workload.ready and (wanted or workload.signalled)):
                break  # a signal workload is not frozen while it still declares
            if wanted:
                await workload.cont(self._stop_timeout_s())
            elif self._stopping:
                return  # `stop` asks it
            else:
                await workload.stop(self._stop_timeout_s())
                self._notify()
        if workload.attached and workload.ready and self._throttle and not workload.signalled:
            await workload.throttle(self._throttle)

    async def throttle(self, percent: int) -> bool:
        """Slow cooperative workloads down; False when there is none."""
        self._throttle = percent
        able = [workload for workload in self.workloads.values() if not workload.signalled]
        await self._tell(able, lambda workload: workload.throttle(percent))
        return bool(able)

    # -- who is there ------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Remember the workloads attached now. A migration begins: nobody uses descriptors of the last one."""
        self.retired.give_back()
        self._watched = set(self.workloads.values())
        self._lost = None

    def check_alive(self) -> None:
        """Raise WorkloadError if a watched workload is gone, or one with a part of the machine that arrives."""
        if self._lost is not None:
            raise self._lost
        if self._run_state is RunState.INMIGRATE and self._arrival_lost is not None:
            raise self._arrival_lost

    async def lost(self) -> None:
        """Wait until a watched workload is gone, then raise. While somebody waits here, declarations are on hold."""
        self._lost_waiters += 1
        try:
            while True:
                self.check_alive()
                changed = self._changed
                await changed.wait()
        finally:
            self._lost_waiters -= 1

    async def arrival_lost(self) -> None:
        """Wait until a workload that had a part of the arriving machine is gone, then raise."""
        while self._arrival_lost is None:
            changed = self._changed
            await changed.wait()
        raise self._arrival_lost

    def _why_hold(self) -> str:
        return "a migration is under way" if self._lost_waiters else ""

    def bar(self, why: str) -> None:
        """Let nobody attach or map anything from here on, and say why; "" ends that."""
        self.barred = why

    def attach(self, workload: Workload) -> None:
        """Add a workload that was let in (`machine.attach` checks)."""
        workload.attached = True
        self.workloads[workload.name] = workload
        self._notify()

    def set_ready(self, workload: Workload) -> None:
        """A workload has declared everything."""
        if not workload.ready:
            workload.ready = True
            self._log.info("workload_attached", workload=workload.name, pid=workload.pid)
            self._on_event("X_MIGRATED_WORKLOAD_ATTACHED", {"workload": workload.name, "pid": workload.pid})
        self._notify()

    def detach(self, workload: Workload, why: str) -> None:
        """Remove a workload that left, with what it declared. Twice does no harm."""
        if self.workloads.get(workload.name) is not workload:
            return
        del self.workloads[workload.name]
        error = WorkloadError(workload.name, why)
        workload.gone(error)
        had = self.declared.withdraw(workload, keep_blocks=self._run_state in _KEEPS_MEMORY)
        self.retired.retire_open(workload.pagemap)
        self.retired.retire(workload.tracking)
        self.retired.retire(workload.sync)
        if had and self._arriving and self._run_state is RunState.INMIGRATE:
            self._arrival_lost = self._arrival_lost or error
        # Who came during a migration and had memory ends it too: what it wrote since the last look cannot be seen.
        if (workload in self._watched or (had and self._lost_waiters)) and self._lost is None:
            self._lost = error
        self._log.warning("workload_left", workload=workload.name, pid=workload.pid, reason=why)
        if self._run_state is RunState.RUNNING and not self.workloads:
            self._log.warning("machine_empty")
        self._on_event("X_MIGRATED_WORKLOAD_LEFT", {"workload": workload.name, "reason": why})
        self._notify()

    # -- moving ------------------------------------------------------------------------------------------------

    async def moved(self, peer: str) -> None:
        """Tell the workloads that the machine runs at ``peer`` now."""
        self.peer = peer
        await self._tell(self.workloads.values(), lambda workload: workload.moved(peer))

    async def release(self) -> None:
        """Let go of the memory that no workload maps, and of what was lost with those that left."""
        self.barred = ""
        self._drop_unmapped("released")
        self._arriving = False
        self._arrival_lost = None

    async def begin_incoming(self) -> None:
        """Make room for a machine that arrives: run state ``inmigrate``. Raises WorkloadError when one is here."""
        empty = self._run_state in (RunState.INMIGRATE, RunState.POSTMIGRATE)
        for workload in self.workloads.values():
            if not (empty and workload.replaceable) and self.declared.mappings_of(workload):
                raise WorkloadError(
                    workload.name,
                    "its memory still holds a machine; a machine can arrive here when it calls standby() or leaves"
                    if self._run_state is not RunState.RUNNING
                    else "it runs here; a machine can arrive only where none runs",
                )
        self.retired.give_back()
        self._drop_unmapped("another machine arrives")
        if self._run_state is RunState.RUNNING:  # nobody has any memory: an empty machine
            await self.stop(RunState.PAUSED)
        self.set_run_state(RunState.INMIGRATE)
        self._arriving = True
        self._arrival_lost = self._lost = None
        self._watched = set()

    def close(self) -> None:
        """Let go of all memory and descriptors. Twice does no harm."""
        for workload in list(self.workloads.values()):
            self.detach(workload, "the daemon ends")
        self.declared.close()
        self.retired.close()

    # -- inside ------------------------------------------------------------------------------------------------

    def _drop_unmapped(self, why: str) -> None:
        if names := self.declared.drop_unmapped():
            self._log.info("memory_released", blocks=names, reason=why)

    async def _tell(self, workloads: Iterable[Workload], tell: Callable[[Workload], Any]) -> None:
        workloads = list(workloads)
        results = await asyncio.gather(*(tell(workload) for workload in workloads), return_exceptions=True)
        for workload, result in zip(workloads, results, strict=True):
            if isinstance(result, WorkloadError):
                # A frozen process need not read.
                if not workload.signalled:
                    workload.disconnect(result.what)
            elif isinstance(result, BaseException):
                raise result

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

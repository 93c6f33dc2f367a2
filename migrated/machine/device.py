"""One device whose state lives in an attached workload, as the engine sees it.

The rule of the file: nothing but the link between a declared name and the workload that has it.
"""

from __future__ import annotations

from migrated.machine.workload import Workload
from migrated.savevm.ports import DeviceState
from migrated.wire.attach import DeviceRequest


class WorkloadDevice:
    """A DevicePort."""

    def __init__(self, owner: Workload, request: DeviceRequest) -> None:
        self._owner = owner
        self.idstr = request.name
        self.instance_id = request.instance_id
        self.version_id = request.version_id
        self.priority = request.priority

    @property
    def workload(self) -> str:
        """The name of the workload that has the device."""
        return self._owner.name

    @property
    def ready(self) -> bool:
        """True when its workload said that everything is declared."""
        return self._owner.ready

    async def save(self) -> DeviceState:
        """Ask the workload for the state. Raises WorkloadError."""
        return await self._owner.save_device(self.idstr, self.instance_id)

    async def load(self, state: bytes, version_id: int) -> None:
        """Give the workload the state and wait until it took it. Raises WorkloadError."""
        await self._owner.load_device(self.idstr, self.instance_id, version_id, state)

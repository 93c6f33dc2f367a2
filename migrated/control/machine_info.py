"""What x-migrated-query-machine returns: the machine as an operator sees it.

The rule of the file: a pure function of what the machine port shows.
"""

from __future__ import annotations

from migrated.savevm.ports import MachinePort


def describe_machine(machine: MachinePort) -> dict[str, object]:
    """List blocks, devices and the workloads that brought them, as `shapes.MachineInfo`."""
    blocks = [(block, sorted({mapping.workload for mapping in block.mappings})) for block in machine.ram_blocks()]
    devices = list(machine.devices())
    names = {name for _, workloads in blocks for name in workloads} | {device.workload for device in devices}
    return {
        "name": machine.name,
        "uuid": machine.uuid or "",
        "type": machine.machine_type,
        "status": machine.run_state.value,
        "blocks": [
            {"name": block.name, "size": block.size_bytes, "page-size": block.page_size, "workloads": workloads}
            for block, workloads in blocks
        ],
        "devices": [
            {
                "id": device.idstr,
                "instance-id": device.instance_id,
                "version-id": device.version_id,
                "workload": device.workload,
            }
            for device in devices
        ],
        "workloads": [
            {
                "name": name,
                "blocks": [block.name for block, workloads in blocks if name in workloads],
                "devices": [device.idstr for device in devices if device.workload == name],
            }
            for name in sorted(names)
        ],
    }

"""Device state that lives in an attached workload, as a handler of the registry.

The rule of the file: the state is opaque here. On the wire it is one FULL section: be32 length, then the bytes the
workload gave. A length is believed only as far as bytes arrive. What the workload says its bytes are is passed on to
the VMDESCRIPTION, if it is that long.
"""

from __future__ import annotations

from migrated.errors import RemoteProtocolError
from migrated.savevm.handlers import SaveVMHandlers
from migrated.savevm.ports import DevicePort
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.vmdescription import framed, parse_described

#: The attach protocol's limit for one device's state.
STATE_MAX_BYTES = 1 << 30


class AttachedDevice:
    """Hooks of one attached device; ``opaque`` is its DevicePort."""

    async def save_state(self, f: OutgoingStream, device: DevicePort) -> None:
        """Ask the workload and write what it gives."""
        saved = await device.save()
        size = len(saved.state)
        f.put_be32(size)
        await f.send(saved.state)
        f.describe(framed(device.idstr, device.version_id, size, parse_described(saved.described, size)))

    async def load_state(self, f: IncomingStream, device: DevicePort, version_id: int) -> None:
        """Read the state and wait until the workload has taken it."""
        length = await f.get_be32()
        if length > STATE_MAX_BYTES:
            raise RemoteProtocolError(
                "device state too long", expected=f"at most {STATE_MAX_BYTES} bytes", found=f"{length} bytes"
            )
        await device.load(await f.get_buffer(length), version_id)


def register_device(registry: SaveVMRegistry, device: DevicePort) -> None:
    """Register a device that a workload declared."""
    ops = SaveVMHandlers.of(AttachedDevice())
    registry.register_savevm_live(
        device.idstr, device.instance_id, device.version_id, ops, device, priority=device.priority
    )


def unregister_device(registry: SaveVMRegistry, device: DevicePort) -> None:
    """Remove a device whose workload left."""
    registry.unregister_savevm(None, device.idstr, device)

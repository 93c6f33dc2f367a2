"""Registering an object that a VMState description describes: what QEMU calls vmstate_register.

The rule of the file: the body of the section is the description's bytes and nothing else; what arrives is parsed as it
comes, so that a long state costs no more than the object it becomes. Source: QEMU's vmstate_register,
vmstate_unregister.
"""

from __future__ import annotations

from typing import Any

from migrated.savevm.handlers import SaveVMHandlers, VMStateIf
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.vmstate import Description, parse_body, save_state


class DescribedState:
    """The hooks of a described object; ``opaque`` is the object."""

    def __init__(self, description: Description) -> None:
        self._description = description

    def is_active(self, opaque: Any) -> bool:
        """Say whether there is something to send (loading does not ask)."""
        return self._description.needed(opaque)

    async def save_state(self, f: OutgoingStream, opaque: Any) -> None:
        """Write the object, and say what its bytes are."""
        saved = save_state(self._description, opaque)
        await f.send(saved.state)
        f.describe(saved.described)

    async def load_state(self, f: IncomingStream, opaque: Any, version_id: int) -> None:
        """Fill the object."""
        await f.run(parse_body(self._description, opaque, version_id, f.offset))


def vmstate_register(
    registry: SaveVMRegistry, obj: VMStateIf | None, instance_id: int, description: Description, opaque: Any
) -> int:
    """Let ``opaque`` travel as ``description`` says, and return its instance id (-1 asks for the next free one).

    The section is called as the description is; with ``obj``, ``ID/NAME``. Raises LocalProtocolError.
    """
    idstr = description.name if obj is None else f"{obj.get_id()}/{description.name}"
    ops = SaveVMHandlers.of(DescribedState(description))
    return registry.register_savevm_live(
        idstr, instance_id, description.version_id, ops, opaque, priority=description.priority
    )


def vmstate_unregister(registry: SaveVMRegistry, obj: VMStateIf | None, description: Description, opaque: Any) -> None:
    """Let ``opaque`` travel no more."""
    registry.unregister_savevm(obj, description.name, opaque)

"""A device of a workload that travels as a VMState description says.

The rule of the file: the state is the description's bytes and nothing else, so that a twin with another version of the
same description can take it, or says why it cannot.
"""

from __future__ import annotations

import json

from migrated.client.orders import Device
from migrated.wire import attach
from migrated.wire.vmstate import Description, restore, save_state


def described_device(name: str, instance_id: int, description: Description, state: object) -> Device:
    """Return the device that ``state`` is."""

    def save() -> tuple[bytes, str]:
        saved = save_state(description, state)
        text = json.dumps(saved.described)
        # Only for tools that look into a stream: where it is too long they see bytes.
        return saved.state, text if len(text) <= attach.MAX_DESCRIPTION_BYTES else ""

    def load(content: bytes, version_id: int) -> None:
        restore(description, state, content, version_id)

    return Device(name, instance_id, description.version_id, description.priority, save, load)

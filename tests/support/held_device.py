"""An in-daemon device whose save or load waits until a test lets it: for acting at an exact moment of a migration.

Loaded by ``[handlers] load = ["tests.support.held_device:register"]``. Files in the directory named by the environment
variable HELD_DEVICE rule it: ``hold-save`` and ``hold-load`` make it wait until they are gone, ``saving`` and
``loading`` appear when it waits.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from migrated.savevm.handlers import SaveVMHandlers
from migrated.savevm.registry import SaveVMRegistry

POLL_S = 0.01


class HeldDevice:
    """One byte of state."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def save_state(self, f: Any, opaque: Any) -> None:
        await self._hold("save", "saving")
        f.put_be8(0x42)

    async def load_state(self, f: Any, opaque: Any, version_id: int) -> None:
        await self._hold("load", "loading")
        if await f.get_be8() != 0x42:
            raise ValueError("not the byte that was saved")

    async def _hold(self, what: str, waiting: str) -> None:
        while (self._directory / f"hold-{what}").exists():
            (self._directory / waiting).touch()
            await asyncio.sleep(POLL_S)


def register(registry: SaveVMRegistry, machine: Any) -> None:
    """Entry point of ``[handlers] load``."""
    device = HeldDevice(Path(os.environ["HELD_DEVICE"]))
    registry.register_savevm_live("held", 0, 1, SaveVMHandlers.of(device), device)

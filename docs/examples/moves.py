"""An in-daemon device: how often this machine has moved. Loaded by ``[handlers] load = ["moves:register"]``."""

from typing import Any

from migrated.savevm.registry import SaveVMRegistry
from migrated.savevm.vmstate import vmstate_register
from migrated.wire.vmstate import VMState, uint32


class Moves:
    count = 0


class MovesState(VMState):
    name = "moves"
    fields = (uint32("count"),)

    @staticmethod
    def post_load(moves: Moves, version_id: int) -> None:
        moves.count += 1


def register(registry: SaveVMRegistry, machine: Any) -> None:
    """Entry point of ``[handlers] load``."""
    vmstate_register(registry, None, 0, MovesState, Moves())

"""A live handler with all hooks, loaded into both daemons, that writes every call to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from migrated.savevm.handlers import Pending, SaveVMHandlers
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.registry import SaveVMRegistry
from tests.support.recorder import Recorder

STEPS = 3
#: More than fits into any downtime: no step is left for the switchover, however fast the connection is.
BYTES_PER_STEP = 1 << 40


class WritingRecorder(Recorder):
    """Appends each call as a JSON line: [hook, lock held, run state]."""

    path: Path
    machine: Any

    def _note(self, hook: str) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps([hook, self.lock.held, self.machine.run_state.value]) + "\n")

    async def save_live_pending(self, f: Any, opaque: Any, threshold_size: int) -> Pending:
        self._note("save_live_pending")
        return Pending(precopy_only=max(self.steps, 0) * BYTES_PER_STEP)


def register(registry: SaveVMRegistry, machine: Any) -> None:
    """Entry point of ``[handlers] load``; CONTRACT_DIR says where the calls go."""
    lock: IothreadLock = registry.lock
    recorder = WritingRecorder("contract", lock, [], steps=STEPS)
    recorder.path = Path(os.environ["CONTRACT_DIR"]) / f"{os.getpid()}.jsonl"
    recorder.machine = machine
    registry.register_savevm_live("contract", 0, 7, SaveVMHandlers.of(recorder), recorder)

"""A handler with all fourteen hooks that records every call together with the lock regime it was made under."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migrated.savevm.handlers import Pending
from migrated.savevm.iothread_lock import IothreadLock


@dataclass
class Recorder:
    """Calls are (name, hook, lock held)."""

    name: str
    lock: IothreadLock
    calls: list[tuple[str, str, bool]]
    steps: int = 1
    postcopy: bool = False
    active: bool = True
    pending: Pending = field(default_factory=Pending)
    loaded: list[tuple[bytes, int]] = field(default_factory=list)

    def _note(self, hook: str) -> None:
        self.calls.append((self.name, hook, self.lock.held))

    async def save_setup(self, f: Any, opaque: Any) -> None:
        self._note("save_setup")
        f.put_be32(0x5E7)

    async def save_live_pending(self, f: Any, opaque: Any, threshold_size: int) -> Pending:
        self._note("save_live_pending")
        return self.pending if self.steps else Pending()

    async def save_live_iterate(self, f: Any, opaque: Any) -> bool:
        self._note("save_live_iterate")
        f.put_be32(0x17E)
        self.steps -= 1
        return self.steps <= 0

    def is_active_iterate(self, opaque: Any) -> bool:
        self._note("is_active_iterate")
        return self.active

    def is_active(self, opaque: Any) -> bool:
        self._note("is_active")
        return self.active

    def has_postcopy(self, opaque: Any) -> bool:
        self._note("has_postcopy")
        return self.postcopy

    async def save_live_complete_precopy(self, f: Any, opaque: Any) -> None:
        self._note("save_live_complete_precopy")
        f.put_be32(0xE4D)

    async def save_live_complete_postcopy(self, f: Any, opaque: Any) -> None:
        self._note("save_live_complete_postcopy")
        f.put_be32(0xE4D)

    def save_state(self, f: Any, opaque: Any) -> None:
        self._note("save_state")
        f.put_be32(0xF01)

    def save_cleanup(self, opaque: Any) -> None:
        self._note("save_cleanup")

    async def load_setup(self, f: Any, opaque: Any) -> None:
        self._note("load_setup")

    async def load_state(self, f: Any, opaque: Any, version_id: int) -> None:
        self._note("load_state")
        self.loaded.append((await f.get_buffer(4), version_id))

    async def load_cleanup(self, opaque: Any) -> None:
        self._note("load_cleanup")

    async def resume_prepare(self, s: Any, opaque: Any) -> None:
        self._note("resume_prepare")


#: Hooks that only ask; tests of order leave them out.
QUESTIONS = frozenset({"is_active", "is_active_iterate", "has_postcopy"})


def told(calls: list[tuple[str, str, bool]]) -> list[tuple[str, str, bool]]:
    """Return the calls that do something."""
    return [call for call in calls if call[1] not in QUESTIONS]

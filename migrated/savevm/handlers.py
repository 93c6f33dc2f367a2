"""The handler contract: what one migratable thing offers, in the shape of QEMU's ``SaveVMHandlers``.

The rule of the file: no policy. `registry` decides when a hook is called and with which lock regime; this file only
says which hooks exist. Every hook is optional (``None`` is QEMU's NULL), an ``async def`` or a plain function; errors
are exceptions. Arguments stand in the order of the C interface.

Grouped by the lock regime under which the registry calls them (the iothread lock, `savevm.iothread_lock`):

* lock NOT held: save_setup, save_live_pending, save_live_iterate (but held in a snapshot), resume_prepare
* lock held:     save_live_complete_precopy, save_live_complete_postcopy, save_state, save_cleanup,
                 load_setup, load_state (not held once postcopy listens), load_cleanup
* either:        is_active, is_active_iterate, has_postcopy

A plain (not ``async``) ``load_state`` runs in a worker thread, because its ``f.get_*`` must be able to wait for the
network; there they return values instead of awaitables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

Hook = Callable[..., Any]


class Pending(NamedTuple):
    """What a handler still has to send, in bytes; the three parts are disjoint and their sum is everything."""

    precopy_only: int = 0
    """Must reach the target before it starts."""
    compatible: int = 0
    """May be sent in any phase."""
    postcopy_only: int = 0
    """Can only be sent after the source stopped."""

    @property
    def total(self) -> int:
        return self.precopy_only + self.compatible + self.postcopy_only


@runtime_checkable
class VMStateIf(Protocol):
    """Something with an id of its own; the id becomes the first part of ``id/idstr``."""

    def get_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class SaveVMHandlers:
    """The fourteen hooks of a live handler. See the module docstring for lock regimes."""

    save_setup: Hook | None = None
    """(f, opaque): once, into the START section."""
    save_live_pending: Hook | None = None
    """(f, opaque, threshold_size) -> Pending: every step. Below ``threshold_size`` the count must be exact."""
    save_live_iterate: Hook | None = None
    """(f, opaque) -> bool: every step, into a PART section; True = nothing was left when it stopped."""
    is_active_iterate: Hook | None = None
    """(opaque) -> bool: absent or True = takes part in iteration."""
    is_active: Hook | None = None
    """(opaque) -> bool: absent or True = has sections at all."""
    has_postcopy: Hook | None = None
    """(opaque) -> bool: absent = False."""
    save_live_complete_precopy: Hook | None = None
    """(f, opaque): END section, machine stopped; skipped in postcopy when `has_postcopy`."""
    save_live_complete_postcopy: Hook | None = None
    """(f, opaque): END section at the end of postcopy."""
    save_state: Hook | None = None
    """(f, opaque): the whole state, into a FULL section."""
    save_cleanup: Hook | None = None
    """(opaque): after every outcome, also when setup never ran, possibly twice."""
    load_setup: Hook | None = None
    """(f, opaque): before the first section; must not read from the stream."""
    load_state: Hook | None = None
    """(f, opaque, version_id): every section of this idstr."""
    load_cleanup: Hook | None = None
    """(opaque): after every outcome, also when setup never ran, possibly twice."""
    resume_prepare: Hook | None = None
    """(s, opaque): postcopy recovery; ``s`` is the migration's state."""

    @classmethod
    def of(cls, obj: object) -> SaveVMHandlers:
        """Collect the hooks that ``obj`` defines as methods; whatever it does not define is absent."""
        return cls(**{f.name: getattr(obj, f.name) for f in fields(cls) if callable(getattr(obj, f.name, None))})

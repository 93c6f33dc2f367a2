"""What is said of errors, and of what stands in the way of a migration, as structs.

The rule of the file: that of `shapes`, which uses them.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import UNSET, UnsetType

from migrated.control.shape import Shape
from migrated.error_ids import Fault


class PeerKind(StrEnum):
    UNKNOWN = "unknown"
    MIGRATED = "migrated"
    QEMU = "qemu"
    FILE = "file"


class PeerInfo(Shape, frozen=True):
    address: str
    kind: PeerKind


class ErrorInfo(Shape, frozen=True):
    """What is known of an error besides its text; also in the error of a command that was refused."""

    id: str
    fault: Fault
    phase: str
    known: str
    next_step: str


class BlockerInfo(Shape, frozen=True):
    """One thing that stands in the way of a migration, or, with ``warning``, only should be looked at."""

    id: str
    side: str
    text: str
    next_step: str
    warning: bool


class DestinationInfo(Shape, frozen=True):
    name: str
    tool: str


class PreflightInfo(Shape, frozen=True):
    """What both sides say before anything moves."""

    ready: bool
    checked: list[str]
    blockers: list[BlockerInfo]
    peer: PeerInfo
    destination: DestinationInfo | UnsetType = UNSET

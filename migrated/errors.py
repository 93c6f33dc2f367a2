"""Every error of this package, as one tree.

    MigratedError
    +-- ConfigError                     a configuration file says something impossible
    +-- CommandError                    an operator asked for something impossible (carries a QMP class)
    |   +-- ArgumentError               with a word that makes no sense
    +-- ProtocolError
    |   +-- LocalProtocolError          our bug: we tried to put something illegal on the wire
    |   +-- RemoteProtocolError         their fault: section, offset, expected, found
    +-- ChannelError                    the bytes stopped: role, peer, phase
    |   +-- ChannelClosed               the peer closed or reset
    |   +-- ChannelTimeout              the peer is silent
    |   +-- TlsError                    who is there is not known, or not allowed: the problem's id comes first
    +-- SectionError                    a handler failed; its own error is the cause
    +-- WorkloadError                   an attached process died, hung or lied
    +-- KernelError                     a system call said no: operation and errno
    +-- MigrationCancelled              somebody asked for it
    +-- PeerRefused                     the destination says it did not start, and why
    +-- PreflightBlocked                nothing was moved: what stands in the way, at either end
    +-- OutcomeUnknown                  the link died between the last byte and its answer

The rule of the file: an error answers *whose fault, which phase, is the outcome known, what to do next*; what callers
need is in attributes, the sentence is made from them. Convert at one boundary, chain with ``from``. Each has the id of
a row in `migrated.error_ids`; an error that knows a better next step than that row ends its text with ". Next: ...".
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from migrated.error_ids import ERROR_IDS, ErrorId

#: Stands between what happened and what to do.
NEXT = ". Next: "
#: What is said of bytes that have another checksum here than at the source.
CHANGED = "what arrived is not what was sent: it changed on the way"


class MigratedError(Exception):
    """Base of all errors this package raises on purpose. ``error_id`` overrules the class's."""

    default_id: ClassVar[str] = "internal"

    def __init__(self, text: str = "", *, error_id: str = "") -> None:
        super().__init__(text)
        self.error_id = error_id or self.default_id

    @property
    def row(self) -> ErrorId:
        """What is known of all errors with this id."""
        return ERROR_IDS[self.error_id]

    @property
    def statement(self) -> str:
        """What happened, without the next step."""
        return str(self).partition(NEXT)[0]

    @property
    def next_step(self) -> str:
        """What to do: the text's own advice, or the id's."""
        return str(self).partition(NEXT)[2] or self.row.next_step

    def explain(self, phase: str, known: str) -> dict[str, str]:
        """Return what programs are told besides the text: QMP's ``x-migrated-error``."""
        fault = self.row.fault.value
        return {"id": self.error_id, "fault": fault, "phase": phase, "known": known, "next-step": self.next_step}


class ConfigError(MigratedError):
    """A configuration file cannot be used as it stands."""

    default_id = "config-invalid"

    def __init__(self, file: str, key: str, expected: str) -> None:
        super().__init__(f"{file}: {key}: {expected}" if key else f"{file}: {expected}")
        self.file = file
        self.key = key
        self.expected = expected


class CommandError(MigratedError):
    """An operator asked for something that cannot be done; ``qmp_class`` is the QMP error class."""

    default_id = "command-refused"

    def __init__(self, desc: str, qmp_class: str = "GenericError", *, error_id: str = "") -> None:
        super().__init__(desc, error_id=error_id)
        self.qmp_class = qmp_class


class ArgumentError(CommandError):
    """An argument of a command has a wrong name, type or value."""

    default_id = "argument-invalid"


class ProtocolError(MigratedError):
    """The stream is not what the protocol says. Raise one of the two subclasses."""

    default_id = "stream-invalid"


class LocalProtocolError(ProtocolError):
    """We tried to send something illegal: a bug on this side."""

    default_id = "stream-bug"


class RemoteProtocolError(ProtocolError):
    """The peer sent something illegal.

    ``section`` names the part of the stream, ``offset`` is the stream offset in bytes where the offending element
    starts (``None`` where the codec cannot know it; the stream layer fills it in).
    """

    default_id = "stream-invalid"

    def __init__(
        self, what: str, *, section: str = "", offset: int | None = None, expected: str = "", found: str = ""
    ) -> None:
        super().__init__(what)
        self.what = what
        self.section = section
        self.offset = offset
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        parts = [self.what]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.found:
            parts.append(f"found {self.found}")
        text = ", ".join(parts)
        where = [f"section {self.section}"] if self.section else []
        if self.offset is not None:
            where.append(f"stream offset {self.offset:#x}")
        return f"{text} ({', '.join(where)})" if where else text


class ChannelError(MigratedError):
    """The bytes to or from a peer stopped. ``role`` is the channel's role, ``phase`` what we were doing."""

    default_id = "link-failed"

    def __init__(self, what: str, *, role: str = "main", peer: str = "", phase: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.role = role
        self.peer = peer
        self.phase = phase

    def __str__(self) -> str:
        where = [part for part in (self.peer and f"peer {self.peer}", self.phase and f"while {self.phase}") if part]
        return f"{self.what} ({', '.join(where)})" if where else self.what


class ChannelClosed(ChannelError):
    """The peer closed or reset the connection, or never accepted it."""

    default_id = "link-closed"


class ChannelTimeout(ChannelError):
    """A deadline passed without a byte from, or room for a byte to, the peer."""

    default_id = "link-timeout"


class TlsError(ChannelError):
    """A peer, or this host, could not prove who it is. ``problem`` is the id under which the documents explain it."""

    def __init__(self, problem: str, what: str, *, peer: str = "") -> None:
        super().__init__(what, peer=peer, phase="authenticating" if peer else "")
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}: {super().__str__()}"


class SectionError(MigratedError):
    """A handler failed while saving or loading its section; the handler's own error is ``__cause__``."""

    default_id = "section-failed"

    def __init__(self, idstr: str, instance_id: int, phase: str, why: str) -> None:
        super().__init__(f"section {idstr}/{instance_id} failed in {phase}: {why}")
        self.idstr = idstr
        self.instance_id = instance_id
        self.phase = phase
        self.why = why


class WorkloadError(MigratedError):
    """An attached process died, hung, lied about its memory, or did not stop writing."""

    default_id = "workload-failed"

    def __init__(self, workload: str, what: str, *, error_id: str = "") -> None:
        super().__init__(f"workload {workload}: {what}", error_id=error_id)
        self.workload = workload
        self.what = what


class KernelError(MigratedError):
    """A system call failed. ``op`` is its name as the manual page has it."""

    default_id = "kernel-refused"

    def __init__(self, op: str, errno: int, hint: str = "", *, error_id: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{op}: {name}" + (f" ({hint})" if hint else ""), error_id=error_id)
        self.op = op
        self.errno = errno


class MigrationCancelled(MigratedError):
    """The migration was cancelled on request."""

    default_id = "cancelled"


class PeerRefused(MigratedError):
    """The destination says that it did not start the machine; the text is its reason."""

    default_id = "peer-refused"


class OutcomeUnknown(MigratedError):
    """The link died after the last byte the destination needs and before its answer: nobody may guess."""

    default_id = "outcome-unknown"


@dataclass(frozen=True, slots=True)
class Blocker:
    """One thing that stands in the way of a migration; ``side`` is "source" or "destination"."""

    id: str
    side: str
    text: str
    next_step: str
    warning: bool = False
    """It does not stand in the way, but should be looked at."""

    @classmethod
    def of(cls, error: MigratedError, side: str) -> Self:
        """Make one of an error that would be raised later."""
        return cls(error.error_id, side, error.statement, error.next_step, error.row.warning)

    def __str__(self) -> str:
        return f"{self.side}: {self.text} [{self.id}]"


class PreflightBlocked(MigratedError):
    """Both sides were asked before anything moved; ``blockers`` is all they said."""

    default_id = "preflight-blocked"

    def __init__(self, blockers: Sequence[Blocker]) -> None:
        what = "; ".join(str(blocker) for blocker in blockers if not blocker.warning)
        super().__init__(f"nothing was moved: {what}")
        self.blockers = tuple(blockers)

"""Every error of this package, as one tree.

    MigratedError
    +-- ConfigError                     a configuration file says something impossible
    +-- CommandError                    an operator asked for something impossible (carries a QMP class)
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
    +-- OutcomeUnknown                  the link died between the last byte and its answer

The rule of the file: an error answers *whose fault, which phase, is the outcome known, what to do next*; what callers
need is in attributes, the sentence is made from them. Convert at one boundary, chain with ``from``.
"""

from __future__ import annotations

import errno as _errno


class MigratedError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(MigratedError):
    """A configuration file cannot be used as it stands."""

    def __init__(self, file: str, key: str, expected: str) -> None:
        super().__init__(f"{file}: {key}: {expected}" if key else f"{file}: {expected}")
        self.file = file
        self.key = key
        self.expected = expected


class CommandError(MigratedError):
    """An operator asked for something that cannot be done; ``qmp_class`` is the QMP error class."""

    def __init__(self, desc: str, qmp_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.qmp_class = qmp_class


class ProtocolError(MigratedError):
    """The stream is not what the protocol says. Raise one of the two subclasses."""


class LocalProtocolError(ProtocolError):
    """We tried to send something illegal: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something illegal.

    ``section`` names the part of the stream, ``offset`` is the stream offset in bytes where the offending element
    starts (``None`` where the codec cannot know it; the stream layer fills it in).
    """

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


class ChannelTimeout(ChannelError):
    """A deadline passed without a byte from, or room for a byte to, the peer."""


class TlsError(ChannelError):
    """A peer, or this host, could not prove who it is. ``problem`` is the id under which the documents explain it."""

    def __init__(self, problem: str, what: str, *, peer: str = "") -> None:
        super().__init__(what, peer=peer, phase="authenticating" if peer else "")
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}: {super().__str__()}"


class SectionError(MigratedError):
    """A handler failed while saving or loading its section; the handler's own error is ``__cause__``."""

    def __init__(self, idstr: str, instance_id: int, phase: str, why: str) -> None:
        super().__init__(f"section {idstr}/{instance_id} failed in {phase}: {why}")
        self.idstr = idstr
        self.instance_id = instance_id
        self.phase = phase
        self.why = why


class WorkloadError(MigratedError):
    """An attached process died, hung, lied about its memory, or did not stop writing."""

    def __init__(self, workload: str, what: str) -> None:
        super().__init__(f"workload {workload}: {what}")
        self.workload = workload
        self.what = what


class KernelError(MigratedError):
    """A system call failed. ``op`` is its name as the manual page has it."""

    def __init__(self, op: str, errno: int, hint: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{op}: {name}" + (f" ({hint})" if hint else ""))
        self.op = op
        self.errno = errno


class MigrationCancelled(MigratedError):
    """The migration was cancelled on request."""


class PeerRefused(MigratedError):
    """The destination says that it did not start the machine; the text is its reason."""


class OutcomeUnknown(MigratedError):
    """The link died after the last byte the destination needs and before its answer: nobody may guess."""

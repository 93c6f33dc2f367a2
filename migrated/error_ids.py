"""Every error id there is: whose fault it is, what it means, and what to do next.

The rule of the file: an id, once released, keeps its meaning for ever; a wrong text is corrected, an id is never used
for something else. The same id stands in QMP answers, in ``query-migrate``, in the log and in ``docs/errors.md`` (which
repeats this table; a test compares the two). An error whose own text names a next step ("... Next: ...") overrules the
one here, which is for whoever knows nothing but the id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """Where to look."""

    OPERATOR = "operator"
    """What was asked for cannot be done now, or not here."""
    SETUP = "setup"
    """The two hosts do not fit together: configuration, versions, what is attached."""
    PEER = "peer"
    """The other end, as this one sees it."""
    NETWORK = "network"
    WORKLOAD = "workload"
    HANDLER = "handler"
    HOST = "host"
    """The kernel, the memory or the disk of one host."""
    MIGRATED = "migrated"
    """A bug of ours."""


@dataclass(frozen=True, slots=True)
class ErrorId:
    """One row of the table."""

    id: str
    fault: Fault
    meaning: str
    next_step: str
    warning: bool = False
    """It is told, and stops nothing."""


_O, _S, _P, _N, _W, _H, _M = (
    Fault.OPERATOR, Fault.SETUP, Fault.PEER, Fault.NETWORK, Fault.WORKLOAD, Fault.HOST, Fault.MIGRATED,
)  # fmt: skip

_STATUS = "ask `migratectl status`"
_RETRY = "remove the cause and migrate again; the machine goes on where it was"
_REPORT = "report it, with the daemon's log at level debug"

_ROWS = (
    # What an operator asked for.
    ErrorId("command-refused", _O, "the command makes no sense in the present state", "read the text; " + _STATUS),
    ErrorId(
        "command-unknown", _O, "there is no such command, or not yet in this session", "`query-commands` lists them"
    ),
    ErrorId("argument-invalid", _O, "an argument has a wrong name, type or value", "correct it; nothing was changed"),
    ErrorId(
        "access-denied",
        _O,
        "this user may not do that on this machine",
        "become a member of the socket's group (`[control] group`), or do it as root",
    ),
    ErrorId("busy", _O, "a migration or a snapshot is under way", "wait for its end, or cancel it"),
    ErrorId(
        "not-owner", _O, "the ownership record forbids it on this host", "`migratectl whoowns` says what may be done"
    ),
    ErrorId("nothing-to-migrate", _O, "the machine has no memory and no device here", "start its workload"),
    ErrorId("request-id-reused", _O, "the request id belongs to another migration", "choose a new id for a new one"),
    ErrorId("listener-unprotected", _O, "strangers could connect, and peers are not authenticated", "set `allow`"),
    ErrorId(
        "cancelled", _O, "somebody asked for the end of the migration", "nothing; the machine goes on where it was"
    ),
    ErrorId(
        "config-invalid",
        _S,
        "a configuration file, or the record, cannot be used",
        "correct the file and the key named",
    ),
    # Preflight: found before anything moves. All of them are reported at once.
    ErrorId(
        "preflight-blocked", _S, "one side or both cannot do this migration", "remove every blocker that is listed"
    ),
    ErrorId(
        "protocol-version", _S, "the daemons speak different versions of their protocol", "bring both to one version"
    ),
    ErrorId(
        "machine-name",
        _S,
        "the machine has another name at the destination",
        "check that it is the right one",
        warning=True,
    ),
    ErrorId("machine-type", _S, "`[machine] type` differs", "make it equal in both configurations"),
    ErrorId("machine-uuid", _S, "`[machine] uuid` differs", "make it equal, or find the right destination"),
    ErrorId(
        "machine-here",
        _S,
        "the destination has a machine, or does not know whether it has",
        "migrate to another daemon",
    ),
    ErrorId(
        "block-missing", _S, "no workload at the destination declares the RAM block", "attach the twin of the workload"
    ),
    ErrorId("block-size", _S, "a RAM block has another size at the destination", "start the twin with the same size"),
    ErrorId(
        "block-page-size", _S, "a RAM block has pages of another size at the destination", "use the same page size"
    ),
    ErrorId(
        "block-unexpected",
        _S,
        "the destination declares a RAM block that does not come",
        "attach the same program there",
    ),
    ErrorId(
        "section-missing",
        _S,
        "nothing at the destination takes the device's state",
        "attach the twin; load the handler",
    ),
    ErrorId(
        "section-version", _S, "the device's state is newer than the destination understands", "update the destination"
    ),
    ErrorId(
        "section-not-sent",
        _S,
        "the destination declares a device whose state does not come",
        "attach the same program there",
    ),
    ErrorId(
        "section-unknown-to-qemu",
        _S,
        "the peer is a QEMU, and it exits on sections it does not know",
        "migrate to a `migrated`",
    ),
    ErrorId(
        "capability-unknown",
        _S,
        "the destination lacks a capability that is on",
        "switch it off, or update the destination",
    ),
    ErrorId(
        "parameter-refused",
        _S,
        "the destination does not accept a parameter of the source",
        "change it, or update the destination",
    ),
    ErrorId("memory-short", _H, "the destination has not enough free memory", "free some, or choose another host"),
    ErrorId(
        "huge-pages", _H, "huge pages of shared memory come unasked: no postcopy", "set `shmem_enabled` to `advise`"
    ),
    ErrorId(
        "huge-pages-short",
        _H,
        "not enough huge pages for a RAM block that consists of them",
        "raise `vm.nr_hugepages`, or use 4 KiB pages",
    ),
    ErrorId(
        "userfaultfd-missing",
        _H,
        "a workload cannot wait for missing pages: no postcopy",
        "give it the right to userfaultfd",
    ),
    ErrorId("state-disk-full", _H, "no room for the ownership record", "free space below `[paths] state`"),
    ErrorId("state-read-only", _H, "the ownership record cannot be written", "make `[paths] state` writable"),
    ErrorId(
        "clock-skew", _H, "the wall clocks of the two hosts differ", "let both hosts follow a time server", warning=True
    ),
    # The way there.
    ErrorId("link-failed", _N, "the connection could not be made or used", _RETRY),
    ErrorId("link-closed", _N, "the peer closed or reset the connection, or does not listen", _RETRY),
    ErrorId("link-timeout", _N, "the peer was silent for too long", _RETRY),
    ErrorId("peer-refused", _P, "the destination said that it did not start the machine, and why", _RETRY),
    ErrorId(
        "stream-invalid", _P, "what the peer sent is not what the protocol says", "compare versions and configurations"
    ),
    ErrorId(
        "outcome-unknown",
        _N,
        "the link died between the last byte and its answer",
        "`migratectl whoowns` at both hosts",
    ),
    ErrorId(
        "migration-interrupted",
        _H,
        "the daemon ended in the middle of a migration",
        "`migratectl whoowns` says who has the machine; migrate again",
    ),
    # What moves, and what it moves on.
    ErrorId(
        "section-failed", Fault.HANDLER, "a handler failed while it saved or loaded", "look at the handler's own error"
    ),
    ErrorId("workload-failed", _W, "a workload died, hung, did not stop, or went on writing", "look at the workload"),
    ErrorId("kernel-refused", _H, "a system call failed", "the operation and errno in the text say which"),
    ErrorId("host-io", _H, "reading or writing a file or socket of this host failed", "the errno in the text says why"),
    # Ours.
    ErrorId("stream-bug", _M, "this daemon was about to send something illegal", _REPORT),
    ErrorId("internal", _M, "something nobody thought of", _REPORT),
)

ERROR_IDS: Mapping[str, ErrorId] = {row.id: row for row in _ROWS}

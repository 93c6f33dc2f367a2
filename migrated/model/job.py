"""Jobs: long operations that an operator starts, follows and dismisses; the only place that says what they may do next.

The rule of the file: two tables, QEMU's: which status follows which, and which verb a status accepts. Only statuses
that jobs of this daemon can have are here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from migrated.errors import CommandError, LocalProtocolError


class JobType(StrEnum):
    """What a job does, spelt as QEMU spells it."""

    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_DELETE = "snapshot-delete"


class JobStatus(StrEnum):
    """How far a job is, spelt as QEMU spells it. ``null``: dismissed, and gone."""

    CREATED = "created"
    RUNNING = "running"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(StrEnum):
    """What an operator may want of a job."""

    CANCEL = "cancel"
    DISMISS = "dismiss"


_S = JobStatus

TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING}),
    _S.RUNNING: frozenset({_S.WAITING, _S.ABORTING}),
    # A job alone waits for nobody and has nothing left to finalize; QEMU passes through both, and so do we.
    _S.WAITING: frozenset({_S.PENDING}),
    _S.PENDING: frozenset({_S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}

VERBS: Mapping[JobVerb, frozenset[JobStatus]] = {
    JobVerb.CANCEL: frozenset({_S.CREATED, _S.RUNNING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
}

#: As QEMU's identifiers: a letter, then letters, digits and three signs.
_JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


def check_transition(current: JobStatus, to: JobStatus) -> None:
    """Raise LocalProtocolError unless ``to`` may follow ``current``."""
    if to not in TRANSITIONS[current]:
        raise LocalProtocolError(f"invalid job status transition: '{current}' -> '{to}'")


def check_verb(job_id: str, status: JobStatus, verb: JobVerb) -> None:
    """Raise CommandError, with QEMU's words, unless a job in this status accepts ``verb``."""
    if status not in VERBS[verb]:
        raise CommandError(f"Job '{job_id}' in state '{status}' cannot accept command verb '{verb}'")


def check_job_id(job_id: str) -> None:
    """Raise CommandError unless this may name a job."""
    if _JOB_ID.fullmatch(job_id) is None:
        raise CommandError(f"Invalid job ID '{job_id}'")

"""Request ids: a client that repeats its request gets the migration that it asked for, not another one.

The rule of the file: a request id is its migration's id. So it is where that is: in this daemon while it lives, and in
the ownership record once the machine was, or may have been, handed over.
"""

from __future__ import annotations

from migrated.errors import CommandError
from migrated.migration.host import Host
from migrated.migration.outgoing import OutgoingMigration
from migrated.model.handover import Hold


class Requests:
    """What is known of earlier requests to migrate."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._uri = ""
        self.remembered = False
        """The record tells of the last migration: it was made before this daemon began."""

    def begun(self, uri: str) -> None:
        """Remember where the present migration goes."""
        self._uri = uri
        self.remembered = False

    def knows(self, request_id: str, uri: str, last: OutgoingMigration | None) -> bool:
        """Return whether this id's migration runs, or has ended, and may be asked about. Raises CommandError."""
        if last is not None and last.migration_id == request_id:
            if uri != self._uri:
                text = f"the request id '{request_id}' is that of a migration to {self._uri}, not to {uri}"
                raise CommandError(text, error_id="request-id-reused")
            return True
        record = self._host.ownership.record
        if last is not None or record.migration_id != request_id:
            return False
        self.remembered = record.hold in (Hold.RELEASED, Hold.MOVED)
        return self.remembered

"""What a `migrated` source is going to send, held against what is here: all that does not fit is refused at once.

The rule of the file: it refuses early and by name, and lets nothing pass: each section is still checked when it comes,
because a source without this extension announces nothing, and a QEMU's sections have no length to be skipped by.
"""

from __future__ import annotations

import contextlib

from migrated.errors import RemoteProtocolError, WorkloadError
from migrated.migration.host import OPTIONAL_SECTIONS, Host
from migrated.wire.announcement import SECTIONS_MAX, AnnouncedSection, parse_announcement


class Announcement:
    """The list of one incoming migration, as far as it has come."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sections: list[AnnouncedSection] = []
        self._complete = False

    def take(self, payload: bytes) -> None:
        """Take one command's part of the list. Raises RemoteProtocolError."""
        if self._complete:
            raise RemoteProtocolError("X_SECTIONS behind the last one", section="command")
        sections, more = parse_announcement(payload)
        self._sections += sections
        self._complete = not more
        if len(self._sections) > SECTIONS_MAX:
            raise RemoteProtocolError(
                "too many sections", section="command", expected=f"at most {SECTIONS_MAX}", found="more"
            )

    async def check(self, patience_s: float) -> None:
        """Raise RemoteProtocolError naming every section that nothing here takes.

        Devices of workloads that are still on their way have ``patience_s``.
        """
        if not self._complete:
            return
        if unknown := self._unknown():
            # Whoever did not come, or left: the list below says what is missing.
            with contextlib.suppress(WorkloadError):
                await self._host.machine.wait_declared([], {section.idstr for section in unknown}, patience_s)
        refused = [str(section) for section in self._unknown()] + self._too_new()
        if not refused:
            return
        sent = {(section.idstr, section.instance_id) for section in self._sections}
        text = f"nothing here takes {', '.join(refused)}"
        if missing := await self._host.registry.not_loaded(besides=OPTIONAL_SECTIONS, loaded=sent):
            text += f"; and nothing comes for {', '.join(missing)}"
        raise RemoteProtocolError(text, section="list of sections", expected="the devices and handlers of the source")

    def _unknown(self) -> list[AnnouncedSection]:
        keep = self._host.settings.parameters.get("x-migrated-keep-unknown-sections")
        return [
            section
            for section in self._sections
            if not self._host.registry.takes(section.idstr, section.instance_id) and (section.live or not keep)
        ]

    def _too_new(self) -> list[str]:
        found = ((section, self._host.registry.find(section.idstr, section.instance_id)) for section in self._sections)
        return [
            f"{section} in version {section.version_id} (here up to {entry.version_id})"
            for section, entry in found
            if entry is not None and entry.ops.load_state and section.version_id > entry.version_id
        ]

"""The sections of an arriving machine: each loaded by its handler, and none missing in the end.

The rule of the file: a section is loaded under the iothread lock, but for those that come beside a machine that runs.
"""

from __future__ import annotations

from migrated.errors import RemoteProtocolError
from migrated.migration.host import OPTIONAL_SECTIONS, Host
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.return_path import PeerKind
from migrated.stream.incoming import IncomingStream
from migrated.wire.section import SectionHeader, parse_footer, parse_vmdescription_length


class SectionReader:
    """Loads sections of one incoming migration."""

    def __init__(self, host: Host, link: IncomingLink) -> None:
        self._host = host
        self._link = link

    async def load(self, stream: IncomingStream, header: SectionHeader, *, listening: bool) -> None:
        """Load one section. ``listening``: beside a machine that runs, or whose devices are being loaded.

        Raises RemoteProtocolError, SectionError, and what else a handler raises.
        """
        stream.section = f"{header.idstr or f'id {header.section_id}'} ({header.kind.name})"
        if listening and stream is self._link.stream:
            # Nobody here may hold the lock.
            idstr = await self._host.registry.load_state(stream, header, listening=True)
        else:
            keeps = self._host.settings.parameters.get("x-migrated-keep-unknown-sections")
            async with self._host.lock:
                idstr = await self._host.registry.load_state(
                    stream, header, missing=self._wait_for_device, keep=self._keep if keeps else None
                )
        await stream.run(parse_footer(header.section_id, idstr))
        stream.section = f"{idstr} ({header.kind.name})"
        await stream.expect_checksum()

    async def _wait_for_device(self, idstr: str, instance_id: int) -> None:
        # The machine may stand still at the source by now, and its patience after the last byte is limited: our reason
        # has to be there before it calls the outcome unknown.
        patience_s = min(self._host.attach_timeout_s, self._host.settings.seconds("x-migrated-answer-timeout") / 2)
        await self._host.machine.wait_declared([], [idstr], patience_s)

    async def _keep(self, f: IncomingStream, header: SectionHeader) -> None:
        size = await self._host.kept.keep(f, header, from_qemu=self._link.kind is PeerKind.QEMU)
        self._host.log.warning("section_kept", idstr=header.idstr, instance_id=header.instance_id, bytes=size)

    async def description(self, *, commit_follows: bool) -> None:
        """Read the description behind EOF, which says nothing that is needed. Raises RemoteProtocolError."""
        stream = self._link.stream
        stream.section = "vmdescription"
        left = await stream.run(parse_vmdescription_length())
        while left:
            left -= len(await stream.read_exactly(min(left, 4096)))
        if self._link.return_path.opened and not commit_follows and (behind := len(stream.peek())):
            raise RemoteProtocolError(
                "the source goes on after its description", expected="nothing behind it", found=f"{behind} bytes"
            )
        stream.section = "end"

    async def check_complete(self) -> None:
        """Raise RemoteProtocolError for a page or a device that did not come."""
        self._host.machine.check_alive()  # what went with a workload is not missed below
        for check in self._host.completeness:
            check()
        await self.check_devices()

    async def check_devices(self) -> None:
        """Raise RemoteProtocolError for a device that did not come."""
        if missing := await self._host.registry.not_loaded(besides=OPTIONAL_SECTIONS):
            raise RemoteProtocolError(
                "the stream ended without the state of " + ", ".join(missing),
                expected="a section for every device declared here",
            )

"""Sections that nothing here takes, kept as they came and sent on as they were (x-migrated-keep-unknown-sections).

The rule of the file: the bytes are never looked into, and there are limits to them. A FULL section says nowhere how
long it is: its end is its footer where another element follows, and content that looks like that would be cut short
(one in 2^40 for each byte). What a machine brought leaves with it, or is forgotten when another one comes.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrated.errors import RemoteProtocolError
from migrated.savevm.handlers import SaveVMHandlers
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.section import SectionHeader, footer_pattern

#: All sections of a full QEMU guest are some kilobytes, a framebuffer some megabytes; this is held in memory.
KEPT_MAX_BYTES = 64 << 20
#: A QEMU guest has some thirty to a hundred.
KEPT_MAX_SECTIONS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class KeptSection:
    """One section; ``from_qemu``: a QEMU knows it."""

    header: SectionHeader
    body: bytes
    from_qemu: bool

    async def save_state(self, f: OutgoingStream, opaque: object) -> None:
        """Write what came."""
        await f.send(self.body)


class KeptSections:
    """All that is kept for the machine that is here."""

    def __init__(self, registry: SaveVMRegistry) -> None:
        self._registry = registry
        self._kept: list[KeptSection] = []

    async def keep(self, f: IncomingStream, header: SectionHeader, *, from_qemu: bool) -> int:
        """Take a FULL section up to its footer; return how many bytes it has. Raises RemoteProtocolError."""
        name = f"{header.idstr}/{header.instance_id}"
        if self._registry.find(header.idstr, header.instance_id) is not None:
            raise RemoteProtocolError(f"section {name} comes twice, and is kept already", section=name)
        if len(self._kept) == KEPT_MAX_SECTIONS:
            raise RemoteProtocolError(
                "too many sections to keep", expected=f"at most {KEPT_MAX_SECTIONS}", section=name
            )
        room = KEPT_MAX_BYTES - sum(len(kept.body) for kept in self._kept)
        body = await f.read_until(footer_pattern(header.section_id), room)
        kept = KeptSection(header, body, from_qemu)
        self._registry.register_savevm_live(
            header.idstr, header.instance_id, header.version_id, SaveVMHandlers.of(kept), kept
        )
        self._kept.append(kept)
        return len(body)

    def forget(self) -> None:
        """Let go of what an earlier machine brought. Twice does no harm."""
        while self._kept:
            kept = self._kept.pop()
            self._registry.unregister_savevm(None, kept.header.idstr, kept)

    def known_to_qemu(self) -> list[str]:
        """Return the idstrs of what a QEMU sent."""
        return [kept.header.idstr for kept in self._kept if kept.from_qemu]

    def describe(self) -> list[dict[str, object]]:
        """Say what is kept, as ``query-migrate`` shows it."""
        return [
            {
                "id": kept.header.idstr,
                "instance-id": kept.header.instance_id,
                "version-id": kept.header.version_id,
                "size": len(kept.body),
            }
            for kept in self._kept
        ]

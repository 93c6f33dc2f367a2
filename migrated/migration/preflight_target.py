"""The destination's half of preflight: say what stands in the way, and be ready for what is to come.

The rule of the file: nothing of the machine is touched. What an answer promises is kept until the migration has ended:
the memory is reserved, and the settings are the source's.
"""

from __future__ import annotations

import asyncio
import contextlib

from migrated.errors import Blocker, CommandError, WorkloadError
from migrated.migration.host import OPTIONAL_SECTIONS, Host
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.preflight import (
    WAITS,
    Facts,
    LocalBlock,
    adopted_settings,
    blocking,
    find_blockers,
    plain_bytes,
)
from migrated.model.ramblock import TARGET_PAGE_BYTES
from migrated.wire.preflight import REQUIREMENTS_MAX_BYTES, Answer, Pieces, Requirements, parse_requirements

#: A third of what a reservation lasts.
RENEW_S = 20.0


class PreflightTarget:
    """The preflight of one incoming migration, if its source asks."""

    def __init__(self, host: Host, link: IncomingLink) -> None:
        self._host = host
        self._link = link
        self._pieces = Pieces(REQUIREMENTS_MAX_BYTES)
        self.blockers: list[Blocker] = []
        self.dry_run = False
        self._reserved_bytes = 0

    @property
    def nothing_follows(self) -> bool:
        """True when the source has no reason to go on."""
        return self.dry_run or bool(blocking(self.blockers))

    async def take(self, payload: bytes, *, preempt: bool) -> None:
        """Take a piece of what the source says; answer the last one. Raises RemoteProtocolError.

        ``preempt``: the connection for requested pages is here.
        """
        if (raw := self._pieces.take(payload)) is None:
            return
        needs = parse_requirements(raw)
        self.dry_run = needs.dry_run
        self.blockers = await self._check(needs)
        if not self.nothing_follows:
            self._host.settings.adopt(*adopted_settings(needs))
        host = self._host
        host.log.info(
            "preflight",
            peer=self._link.peer,
            dry_run=needs.dry_run,
            blockers=[blocker.id for blocker in self.blockers],
            **({"migration_id": needs.migration_id} if needs.migration_id else {}),
        )
        await self._link.return_path.preflight(Answer(host.site.tool, host.machine.name, self.blockers, preempt))

    async def keep_reservation(self) -> None:
        """Renew what is reserved while memory arrives, until this is cancelled: what is here is no longer free."""
        while self._reserved_bytes:
            await asyncio.sleep(RENEW_S)
            plain = [block for block in self._host.machine.ram_blocks() if block.page_size == TARGET_PAGE_BYTES]
            here = sum(map(self._host.site.used_bytes, plain))
            self._host.site.reserve(max(self._reserved_bytes - here, 0))

    def release(self) -> None:
        """Give up what was reserved. Twice does no harm."""
        if self._reserved_bytes:
            self._reserved_bytes = 0
            self._host.site.reserve(0)

    def _patience_s(self, needs: Requirements) -> float:
        """Return how long workloads that are still on their way are waited for: the source does not wait for ever."""
        answer_ms = needs.parameters.get("x-migrated-answer-timeout")
        if not isinstance(answer_ms, int):
            answer_ms = self._host.settings.parameters.integer("x-migrated-answer-timeout")
        return min(self._host.attach_timeout_s, answer_ms / 2000)

    async def _check(self, needs: Requirements) -> list[Blocker]:
        if not needs.dry_run:
            # Said before it is looked for: of two that want the same memory at once, at most one gets it.
            self._reserved_bytes = plain_bytes(needs)
            self._host.site.reserve(self._reserved_bytes)
        facts = await self._facts(needs)
        blockers = find_blockers(needs, facts)
        if not needs.dry_run and (found := blocking(blockers)) and all(blocker.id in WAITS for blocker in found):
            missing = {one.idstr for one in needs.sections if one.active and str(one) not in facts.versions}
            blocks = [block.name for block in needs.blocks]
            # Whoever does not come, or leaves again: the next look says what is missing.
            with contextlib.suppress(WorkloadError):
                await self._host.machine.wait_declared(blocks, missing, self._patience_s(needs))
            blockers = find_blockers(needs, await self._facts(needs))
        if blocking(blockers) and not needs.dry_run:
            self.release()
        return blockers

    async def _facts(self, needs: Requirements) -> Facts:
        host, machine, settings = self._host, self._host.machine, self._host.settings
        postcopy = bool(needs.capabilities.get("postcopy-ram"))
        entries = [(idstr, at, host.registry.find(idstr, at)) for idstr, at in host.registry.section_ids()]
        return Facts(
            tool=host.site.tool,
            name=machine.name,
            machine_type=machine.machine_type,
            uuid=machine.uuid,
            validates_uuid=settings.enabled("validate-uuid"),
            clock_ms=host.site.clock_ms(),
            cannot_receive=self._cannot_receive(),
            blocks={block.name: LocalBlock(block.size_bytes, block.page_size) for block in machine.ram_blocks()},
            versions={f"{idstr}/{at}": one.version_id for idstr, at, one in entries if one and one.ops.load_state},
            expected=await host.registry.not_loaded(besides=OPTIONAL_SECTIONS, loaded=()),
            keeps_unknown=bool(settings.parameters.get("x-migrated-keep-unknown-sections")),
            free_bytes=host.site.free_bytes(),
            huge_pages=host.site.huge_page_obstacles(),
            record=host.site.record_obstacles(),
            postcopy=host.postcopy_load.obstacles() if postcopy else (),
        )

    def _cannot_receive(self) -> CommandError | None:
        try:
            self._host.ownership.require_may_receive()
        except CommandError as error:
            return error
        return None

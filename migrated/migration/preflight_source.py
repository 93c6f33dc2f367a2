"""The source's half of preflight: say what is going to be sent, and collect what stands in the way at both ends.

The rule of the file: nothing is changed, at either end. A peer that does not know the question (a QEMU, a file) is not
asked; then only this side was checked, and the verdict says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrated.errors import Blocker, CommandError, MigratedError
from migrated.migration.host import OPTIONAL_SECTIONS, Host
from migrated.migration.preflight import SOURCE, blocking
from migrated.migration.question import ask_over
from migrated.migration.recovery import Dial
from migrated.migration.return_path import PeerKind, ReturnPathReader
from migrated.model.parameters import ADOPTED_CAPABILITIES, ADOPTED_PARAMETERS
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel
from migrated.wire.command import FEATURE_PREFLIGHT
from migrated.wire.preflight import PROTOCOL, Answer, BlockNeed, Requirements, encode_requirements


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known before anything moves."""

    blockers: tuple[Blocker, ...]
    peer: str = ""
    kind: PeerKind = PeerKind.UNKNOWN
    answer: Answer | None = None
    """What the destination said; None where it was not asked, or did not say anything."""

    @property
    def ready(self) -> bool:
        """True when nothing that was looked at stands in the way."""
        return not blocking(self.blockers)

    def as_dict(self) -> dict[str, object]:
        """Return the answer to ``x-migrated-preflight``."""
        described: dict[str, object] = {
            "ready": self.ready,
            "checked": ["source", *(["destination"] if self.answer else [])],
            "blockers": describe_blockers(self.blockers),
            "peer": {"address": self.peer, "kind": self.kind.value},
        }
        if self.answer is not None:
            described["destination"] = {"name": self.answer.name, "tool": self.answer.tool}
        return described


def describe_blockers(blockers: tuple[Blocker, ...]) -> list[dict[str, object]]:
    """Return blockers as QMP has them, those that stand in the way first."""
    return [
        {"id": one.id, "side": one.side, "text": one.text, "next-step": one.next_step, "warning": one.warning}
        for one in sorted(blockers, key=lambda blocker: blocker.warning)
    ]


async def preflight(
    host: Host,
    f: OutgoingStream,
    return_path: ReturnPathReader | None,
    verdict: Verdict,
    migration_id: str = "",
    *,
    channels: int = 0,
) -> Verdict:
    """Ask the peer that was greeted; ``verdict`` says who it is. Without a migration id it is a dry run.

    ``channels``: pages will come over so many channels of their own. Raises ChannelError, PeerRefused.
    """
    blockers = [*source_blockers(host), *await _qemu_blockers(host, verdict)]
    answer = None
    if return_path is not None and return_path.features & FEATURE_PREFLIGHT:
        f.put_buffer(encode_requirements(await _requirements(host, migration_id, channels=channels)))
        await f.drain()
        settings = host.settings
        patience_s = settings.silence_timeout_s()
        if migration_id:
            # The destination waits for workloads that are on their way; what it says then tells more than our silence.
            patience_s += settings.seconds("x-migrated-answer-timeout")
        answer = await return_path.wait_preflight(patience_s)
        blockers += answer.blockers
    return Verdict(tuple(blockers), verdict.peer, verdict.kind, answer)


def source_blockers(host: Host) -> list[Blocker]:
    """Return what stands in the way here."""
    return [Blocker.of(error, SOURCE) for error in host.site.record_obstacles()]


async def dry_run(host: Host, dial: Dial) -> Verdict:
    """Connect, ask, and hang up. A peer that cannot be reached, or refuses to be asked, is a blocker as well."""
    verdict = Verdict(tuple(source_blockers(host)))
    channel: Channel | None = None
    try:
        channel = await dial()
        if not channel.has_return_path:
            raise CommandError(f"{channel.peer} cannot answer. Next: ask a destination at tcp: or unix:")
        verdict = Verdict(verdict.blockers, channel.peer)
        peer = channel.peer
        return await ask_over(
            host, channel, lambda f, reader, kind: preflight(host, f, reader, Verdict((), peer, kind))
        )
    except MigratedError as error:
        unreachable = Blocker.of(error, "destination")
        return Verdict((*verdict.blockers, unreachable), verdict.peer)
    finally:
        if channel is not None:
            channel.abort()


async def _qemu_blockers(host: Host, verdict: Verdict) -> list[Blocker]:
    if verdict.kind is not PeerKind.QEMU:
        return []
    known = [*OPTIONAL_SECTIONS, *host.kept.known_to_qemu()]
    if not (names := await host.registry.device_names(besides=known)):
        return []
    text = f"the peer at {verdict.peer} is a QEMU, and a QEMU exits on sections it does not know: {', '.join(names)}"
    return [Blocker.of(CommandError(text, error_id="section-unknown-to-qemu"), SOURCE)]


async def _requirements(host: Host, migration_id: str, *, channels: int) -> Requirements:
    machine, settings = host.machine, host.settings
    return Requirements(
        protocol=PROTOCOL,
        tool=host.site.tool,
        dry_run=not migration_id,
        migration_id=migration_id,
        name=machine.name,
        machine_type=machine.machine_type,
        uuid=machine.uuid,
        clock_ms=host.site.clock_ms(),
        blocks=[
            BlockNeed(block.name, block.size_bytes, block.page_size, host.site.used_bytes(block))
            for block in machine.ram_blocks()
        ],
        sections=await host.registry.section_needs(),
        capabilities={
            **{name: settings.enabled(name) for name in sorted(ADOPTED_CAPABILITIES)},
            **({"multifd": True} if channels else {}),
        },
        parameters={
            **{name: v for name in sorted(ADOPTED_PARAMETERS) if (v := settings.parameters.get(name)) is not None},
            **({"multifd-channels": channels} if channels else {}),
        },
    )

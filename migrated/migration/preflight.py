"""What stands in the way of a migration: what a source is going to do, held against what is at the destination.

The rule of the file: pure, and complete: every check has its turn, so that an operator mends all in one go. Whatever is
refused here would also be refused later, by whoever loads it: a source that does not ask is not believed either.

`WAITS` are the blockers that a workload which is still on its way would take away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from migrated.error_ids import ERROR_IDS
from migrated.errors import Blocker, CommandError, MigratedError
from migrated.migration.host import OPTIONAL_SECTIONS
from migrated.model.parameters import ADOPTED_CAPABILITIES, ADOPTED_PARAMETERS, CAPABILITIES, Parameters
from migrated.model.ramblock import TARGET_PAGE_BYTES
from migrated.wire.preflight import PROTOCOL, Requirements

WAITS = frozenset({"block-missing", "section-missing"})
#: Far beyond what a time server leaves, and what a busy daemon takes to look at its clock.
CLOCK_SKEW_MAX_MS = 5_000
DESTINATION, SOURCE = "destination", "source"


@dataclass(frozen=True, slots=True)
class LocalBlock:
    """A RAM block that is declared at the destination."""

    size_bytes: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What is so at the destination now."""

    tool: str
    name: str
    machine_type: str
    uuid: str | None
    validates_uuid: bool
    clock_ms: int
    cannot_receive: CommandError | None = None
    """What the ownership record says against it."""
    blocks: Mapping[str, LocalBlock] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    """Highest version of every section that is taken here, by "idstr/instance"."""
    expected: Sequence[str] = ()
    """Sections without which the machine is not whole here."""
    keeps_unknown: bool = False
    free_bytes: int = 1 << 62
    """Memory that an arriving machine can have."""
    huge_pages: Sequence[MigratedError] = ()
    """What stands against blocks in huge pages."""
    record: Sequence[MigratedError] = ()
    """What stands against writing the ownership record."""
    postcopy: Sequence[MigratedError] = ()
    """What stands against taking memory in while the machine runs."""


def find_blockers(needs: Requirements, facts: Facts) -> list[Blocker]:
    """Return everything at the destination that stands in the way, or should be looked at."""
    return [blocker for check in _CHECKS for blocker in check(needs, facts)]


def blocking(blockers: Sequence[Blocker]) -> list[Blocker]:
    """Return those that are more than a warning."""
    return [blocker for blocker in blockers if not blocker.warning]


def _blocker(error_id: str, text: str, next_step: str = "") -> Blocker:
    row = ERROR_IDS[error_id]
    return Blocker(error_id, DESTINATION, text, next_step or row.next_step, row.warning)


def _protocol(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    if needs.protocol != PROTOCOL:
        yield _blocker(
            "protocol-version",
            f"the source ({needs.tool}) speaks version {needs.protocol} of the protocol between daemons, and the"
            f" destination ({facts.tool}) version {PROTOCOL}",
        )


def _ownership(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    if facts.cannot_receive is not None:
        yield Blocker.of(facts.cannot_receive, DESTINATION)


def _identity(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    if needs.machine_type != facts.machine_type:
        text = f"the machine's type is '{needs.machine_type}', and here it is '{facts.machine_type}'"
        yield _blocker("machine-type", text)
    if needs.name != facts.name:
        yield _blocker("machine-name", f"the machine's name is '{needs.name}', and here it is '{facts.name}'")
    asked = any(map(needs.capabilities.get, ("validate-uuid", "multifd")))  # the channels of multifd say it, too
    validates = facts.validates_uuid or asked
    if validates and needs.uuid and facts.uuid and needs.uuid.lower() != facts.uuid.lower():
        yield _blocker("machine-uuid", f"the machine's UUID is {needs.uuid}, and here it is {facts.uuid}")


def _blocks(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    for block in needs.blocks:
        here = facts.blocks.get(block.name)
        if here is None:
            yield _blocker("block-missing", f"nobody here declares RAM block {block.name} ({block.size_bytes} bytes)")
            continue
        if here.size_bytes != block.size_bytes:
            text = f"RAM block {block.name} has {block.size_bytes} bytes, and here {here.size_bytes}"
            yield _blocker("block-size", text)
        if here.page_size != block.page_size:
            text = f"RAM block {block.name} has pages of {block.page_size} bytes, and here of {here.page_size}"
            yield _blocker("block-page-size", text)
    for name in sorted(facts.blocks.keys() - {block.name for block in needs.blocks}):
        yield _blocker("block-unexpected", f"RAM block {name} is declared here, and nothing comes for it")


def _sections(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    for section in needs.sections:
        version_id = facts.versions.get(str(section))
        if version_id is None:
            if section.active and (section.live or not facts.keeps_unknown):
                yield _blocker("section-missing", f"nothing here takes {section}")
        elif section.version_id > version_id:
            text = f"nothing here takes {section} in version {section.version_id} (here up to {version_id})"
            yield _blocker("section-version", text)
    sent = {str(section) for section in needs.sections}  # or may be: it may become active
    for name in facts.expected:
        if name not in sent and name.rpartition("/")[0] not in OPTIONAL_SECTIONS:
            yield _blocker("section-not-sent", f"nothing comes for {name}")


def _capabilities(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    for name, on in needs.capabilities.items():
        known = CAPABILITIES.get(name)
        if on and (known is None or not known.implemented):
            yield _blocker("capability-unknown", f"capability {name} is on, and this version does not know it")
    for name, value in needs.parameters.items():
        try:
            Parameters().replace({name: value} if name in ADOPTED_PARAMETERS else {})
        except CommandError as error:
            yield _blocker("parameter-refused", f"parameter {name}={value}: {error}")


def plain_bytes(needs: Requirements) -> int:
    """Return how much memory the machine uses besides huge pages, which are reserved in their own way."""
    return sum(block.used_bytes for block in needs.blocks if block.page_size == TARGET_PAGE_BYTES)


def _memory(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    used = plain_bytes(needs)
    if used > facts.free_bytes:
        text = f"the machine uses {used} bytes of memory, and {facts.free_bytes} can be had here"
        yield _blocker("memory-short", text)


def _host(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    against = [*facts.huge_pages, *facts.record, *(facts.postcopy if needs.capabilities.get("postcopy-ram") else ())]
    yield from (Blocker.of(error, DESTINATION) for error in against)


def _clock(needs: Requirements, facts: Facts) -> Iterator[Blocker]:
    ahead_ms = facts.clock_ms - needs.clock_ms
    if abs(ahead_ms) > CLOCK_SKEW_MAX_MS:
        relation = "ahead of" if ahead_ms > 0 else "behind"
        yield _blocker("clock-skew", f"the clock here is {abs(ahead_ms) / 1000:.1f} s {relation} the source's")


_CHECKS: tuple[Callable[[Requirements, Facts], Iterator[Blocker]], ...] = (
    _protocol, _ownership, _identity, _blocks, _sections, _capabilities, _memory, _host, _clock,
)  # fmt: skip


def adopted_settings(needs: Requirements) -> tuple[dict[str, bool], dict[str, object]]:
    """Return the capabilities and parameters that a destination takes over from its source."""
    capabilities = {name: on for name, on in needs.capabilities.items() if name in ADOPTED_CAPABILITIES}
    return capabilities, {name: value for name, value in needs.parameters.items() if name in ADOPTED_PARAMETERS}

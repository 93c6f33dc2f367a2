"""Everything that stands in the way of a migration, one by one and all at once."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from migrated.error_ids import ERROR_IDS
from migrated.errors import CommandError, KernelError, WorkloadError
from migrated.migration.preflight import (
    CLOCK_SKEW_MAX_MS,
    Facts,
    LocalBlock,
    adopted_settings,
    blocking,
    find_blockers,
)
from migrated.wire.preflight import PROTOCOL, BlockNeed, Requirements, SectionNeed

UUID, OTHER = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "00000000-7dec-11d0-a765-00a0c91e6bf6"
NOW_MS = 1_800_000_000_000
NEEDS = Requirements(
    protocol=PROTOCOL,
    tool="migrated 0.1.0",
    dry_run=False,
    migration_id="m",
    name="kv",
    machine_type="none",
    uuid=UUID,
    clock_ms=NOW_MS,
    blocks=[BlockNeed("heap", 8192, 4096, 8192)],
    sections=[SectionNeed("ram", 0, 4, live=True), SectionNeed("cpu", 0, 2, live=False)],
    capabilities={"postcopy-ram": False, "validate-uuid": False},
    parameters={"x-migrated-silence-timeout": 1000},
)
FACTS = Facts(
    tool="migrated 0.2.0",
    name="kv",
    machine_type="none",
    uuid=UUID,
    validates_uuid=False,
    clock_ms=NOW_MS,
    blocks={"heap": LocalBlock(8192, 4096)},
    versions={"ram/0": 4, "cpu/0": 2},
    expected=("cpu/0",),
    free_bytes=8192,
)
#: Huge pages are no part of what else is free.
HUGE_FACTS = replace(FACTS, blocks={"heap": LocalBlock(2 << 20, 2 << 20)})
SHORT = KernelError("mmap", errno.ENOMEM, "not enough huge pages", error_id="huge-pages-short")
HUGE = KernelError("postcopy", errno.EINVAL, "shmem_enabled is 'always'", error_id="huge-pages")
BLIND = WorkloadError("w", "it cannot wait. Next: give it the right", error_id="userfaultfd-missing")
FULL = KernelError("statvfs", errno.ENOSPC, "0 bytes are free", error_id="state-disk-full")
OWNER = CommandError("this host cannot take a machine in: this host owns the machine", error_id="machine-here")


def needs(**changes: Any) -> Requirements:
    return msgspec.structs.replace(NEEDS, **changes)


def ids(requirements: Requirements, facts: Facts) -> list[str]:
    return [blocker.id for blocker in find_blockers(requirements, facts)]


def test_what_fits_has_no_blockers() -> None:
    assert find_blockers(NEEDS, FACTS) == []


POSTCOPY = needs(capabilities={"postcopy-ram": True})
INACTIVE = SectionNeed("cpu", 0, 9, live=False, active=False)


@pytest.mark.parametrize(
    ("requirements", "facts", "expected"),
    [
        (needs(protocol=PROTOCOL + 1), FACTS, ["protocol-version"]),
        (NEEDS, replace(FACTS, cannot_receive=OWNER), ["machine-here"]),
        (needs(machine_type="pc"), FACTS, ["machine-type"]),
        (needs(name="db"), FACTS, ["machine-name"]),
        (NEEDS, replace(FACTS, uuid=OTHER), []),
        (NEEDS, replace(FACTS, uuid=OTHER, validates_uuid=True), ["machine-uuid"]),
        (needs(capabilities={"validate-uuid": True}), replace(FACTS, uuid=OTHER), ["machine-uuid"]),
        (needs(capabilities={"multifd": True}), replace(FACTS, uuid=OTHER), ["machine-uuid"]),
        (needs(capabilities={"validate-uuid": True}), replace(FACTS, uuid=UUID.upper()), []),
        (needs(capabilities={"validate-uuid": True}), replace(FACTS, uuid=None), []),
        (NEEDS, replace(FACTS, blocks={}), ["block-missing"]),
        (NEEDS, replace(FACTS, blocks={"heap": LocalBlock(4096, 4096)}), ["block-size"]),
        (NEEDS, replace(FACTS, blocks={"heap": LocalBlock(8192, 8192)}), ["block-page-size"]),
        (NEEDS, replace(FACTS, blocks={**FACTS.blocks, "more": LocalBlock(1, 1)}), ["block-unexpected"]),
        (NEEDS, replace(FACTS, versions={"ram/0": 4}), ["section-missing"]),
        (NEEDS, replace(FACTS, versions={"ram/0": 4}, keeps_unknown=True), []),
        (NEEDS, replace(FACTS, versions={"cpu/0": 2}, keeps_unknown=True), ["section-missing"]),
        (NEEDS, replace(FACTS, versions={"ram/0": 4, "cpu/0": 1}), ["section-version"]),
        (NEEDS, replace(FACTS, expected=("cpu/0", "disk/1")), ["section-not-sent"]),
        (NEEDS, replace(FACTS, expected=("globalstate/0",)), []),
        (needs(sections=[INACTIVE]), replace(FACTS, versions={}), []),
        (
            needs(capabilities={"compress": True, "rdma-pin-all": False, "colour": True}),
            FACTS,
            ["capability-unknown"] * 2,
        ),
        (needs(parameters={"x-migrated-silence-timeout": 0}), FACTS, ["parameter-refused"]),
        (needs(parameters={"colour": "red"}), FACTS, []),
        (NEEDS, replace(FACTS, free_bytes=8191), ["memory-short"]),
        (needs(blocks=[BlockNeed("heap", 2 << 20, 2 << 20, 2 << 20)]), HUGE_FACTS, []),
        (NEEDS, replace(FACTS, huge_pages=[SHORT]), ["huge-pages-short"]),
        (NEEDS, replace(FACTS, record=[FULL]), ["state-disk-full"]),
        (NEEDS, replace(FACTS, postcopy=[HUGE, BLIND]), []),
        (POSTCOPY, replace(FACTS, postcopy=[HUGE, BLIND]), ["huge-pages", "userfaultfd-missing"]),
        (needs(clock_ms=NOW_MS - CLOCK_SKEW_MAX_MS), FACTS, []),
        (needs(clock_ms=NOW_MS - CLOCK_SKEW_MAX_MS - 1), FACTS, ["clock-skew"]),
        (needs(clock_ms=NOW_MS + CLOCK_SKEW_MAX_MS + 1), FACTS, ["clock-skew"]),
    ],
)
def test_each_blocker(requirements: Requirements, facts: Facts, expected: list[str]) -> None:
    assert ids(requirements, facts) == expected


def test_all_at_once_and_in_an_order_that_stays() -> None:
    facts = replace(
        FACTS, cannot_receive=OWNER, machine_type="pc", blocks={}, versions={}, expected=("disk/0",), free_bytes=0,
        record=[FULL], clock_ms=0,
    )  # fmt: skip
    blockers = find_blockers(needs(protocol=9, name="db", capabilities={"compress": True}), facts)
    assert [blocker.id for blocker in blockers] == [
        "protocol-version", "machine-here", "machine-type", "machine-name", "block-missing", "section-missing",
        "section-missing", "section-not-sent", "capability-unknown", "memory-short", "state-disk-full", "clock-skew",
    ]  # fmt: skip
    assert {blocker.side for blocker in blockers} == {"destination"}
    assert all(blocker.text and blocker.next_step for blocker in blockers)
    assert {blocker.id for blocker in blockers} - {blocker.id for blocker in blocking(blockers)} == {
        "machine-name",
        "clock-skew",
    }


def test_a_version_that_differs_names_both() -> None:
    (blocker,) = find_blockers(needs(protocol=9), FACTS)
    assert "migrated 0.1.0" in blocker.text
    assert "migrated 0.2.0" in blocker.text


def test_a_text_that_knows_the_next_step_gives_it() -> None:
    (blocker,) = find_blockers(POSTCOPY, replace(FACTS, postcopy=[BLIND]))
    assert (blocker.text, blocker.next_step) == ("workload w: it cannot wait", "give it the right")
    (blocker,) = find_blockers(POSTCOPY, replace(FACTS, postcopy=[HUGE]))
    assert blocker.next_step == ERROR_IDS["huge-pages"].next_step


def test_what_a_destination_takes_over() -> None:
    capabilities = {"postcopy-preempt": True, "events": True, "validate-uuid": False}
    parameters = {"x-migrated-silence-timeout": 9, "x-migrated-allow-no-return-path": True}
    assert adopted_settings(needs(capabilities=capabilities, parameters=parameters)) == (
        {"postcopy-preempt": True, "validate-uuid": False},
        {"x-migrated-silence-timeout": 9},
    )

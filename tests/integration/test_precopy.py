"""Precopy between two daemons: a process that never stops writing, there and back."""

from __future__ import annotations

import os
from pathlib import Path

from migrated.demo.site import Site
from tests.support.following import migrate, run_state, wait_until

ROUND_TRIPS = 5


def test_a_walker_moves_and_is_whole(pair: tuple[Site, Site]) -> None:
    a, b = pair
    figures = migrate(a, b)
    assert figures["x-migrated-outcome"] == "destination-owns"
    assert figures["x-migrated-peer"]["kind"] == "migrated"
    assert figures["ram"]["total"] == 16 << 20
    assert figures["ram"]["dirty-sync-count"] >= 2
    parts = figures["x-migrated-downtime"]
    assert list(parts) == ["stop", "sync", "ram", "devices", "ready", "record", "answer"]
    assert figures["downtime"] <= figures["total-time"]


def test_ten_migrations_in_a_row_leave_nothing_behind(pair: tuple[Site, Site]) -> None:
    a, b = pair
    migrate(a, b)
    migrate(b, a)
    before = [footprint(site) for site in pair]
    for _ in range(ROUND_TRIPS):
        migrate(a, b)
        migrate(b, a)
    wait_until(lambda: [footprint(site) for site in pair] == before, f"{before} again")


def footprint(site: Site) -> dict[str, object]:
    """Return what a daemon holds, but for its reports: descriptors by kind, mappings of RAM blocks, files."""
    proc = Path(f"/proc/{site.daemon.pid}")
    kinds: dict[str, int] = {}
    for fd in (proc / "fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if "/state/history" in target:
            continue
        kind = target.split(":")[0].split("[")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "fds": kinds,
        "ram mappings": sum("memfd:" in line for line in (proc / "maps").read_text().splitlines()),
        "files": sorted(
            p.name for p in site.directory.rglob("*") if p.name != "daemon.log" and p.parent.name != "history"
        ),
        "state": run_state(site),
    }

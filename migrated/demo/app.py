"""The demo: a process that never stops writing moves from one daemon to another and back, and nothing is lost.

The rule of the file: everything is real (two daemons, two workload processes, TCP on loopback) and everything that is
claimed was checked. What is printed is measured in this very run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from migrated.demo.site import Site
from migrated.errors import MigratedError

MIB = 1 << 20
DEFAULT_RAM_MIB = 128
POLL_S = 0.1
LINE_S = 1.0
LEG_DEADLINE_S = 300.0
RUNNING = {"setup", "active", "pre-switchover", "device", "postcopy-device", "postcopy-active"}

AUTO_CONVERGE = {"capability": "auto-converge", "state": True}
POSTCOPY = {"capability": "postcopy-ram", "state": True}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Leg:
    """One migration of the demo, measured and checked."""

    name: str
    total_ms: int
    downtime_ms: int
    downtime_parts_ms: dict[str, float]
    ram_bytes: int
    transferred_bytes: int
    passes: int
    steps_at_stop: int
    verified: bool
    faults: dict[str, Any] | None = None
    """``x-migrated-faults`` of a leg by postcopy."""

    def as_dict(self) -> dict[str, object]:
        """Return the object that ``migratectl demo --json`` prints for a leg."""
        answer: dict[str, object] = {
            "total_ms": self.total_ms,
            "downtime_ms": self.downtime_ms,
            "downtime_parts_ms": self.downtime_parts_ms,
            "ram_bytes": self.ram_bytes,
            "transferred_bytes": self.transferred_bytes,
            "passes": self.passes,
            "verified": self.verified,
        }
        if self.faults is not None:
            remote = self.faults["remote"]
            answer |= {
                "faults": self.faults["requests"],
                "fault_p50_us": remote["p50-us"],
                "fault_p99_us": remote["p99-us"],
            }
        return answer


def main(*, ram_mib: int = DEFAULT_RAM_MIB, as_json: bool = False) -> int:
    """Run the demo and return an exit status: 0 when every check held."""

    def say(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    try:
        legs = run(ram_mib * MIB, say)
    except MigratedError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({leg.name: leg.as_dict() for leg in legs}))
    else:
        summarise(legs, say)
    return 0 if all(leg.verified for leg in legs) else 1


def run(ram_bytes: int, say: Say) -> list[Leg]:
    """Move a walker from A to B and back to A; return both legs."""
    with tempfile.TemporaryDirectory(prefix="migrated-demo-") as directory:
        say(f"Starting two daemons, A and B, and at each a walker over {ram_bytes // MIB} MiB ...")
        with (
            Site("A", Path(directory), ram_bytes=ram_bytes, seed=7) as a,
            Site("B", Path(directory), ram_bytes=ram_bytes, seed=7) as b,
        ):
            for site in (a, b):
                # The walker can be faster than a busy machine's loopback; then it is slowed down until it fits.
                site.qmp.execute("migrate-set-capabilities", {"capabilities": [AUTO_CONVERGE]})
            if degraded := what_degrades(tracked=a.ready["tracked"]):
                say(degraded)
            a.qmp.execute("cont")
            a.wait_event("running")
            say(f"The walker runs at A (process {a.walker.pid}) and adds one to a byte of every page, for ever.")
            there = move("precopy", a, b, say)
            # A walker with half a userfaultfd, or none, cannot wait for missing pages in all cases.
            if degraded:
                return [there, move("back", b, a, say)]
            try:
                return [there, move_by_postcopy(b, a, say)]
            except Refused as refusal:
                say(f"  no postcopy on this host: {refusal}")
                for site in (a, b):
                    site.qmp.execute("migrate-set-capabilities", {"capabilities": [POSTCOPY | {"state": False}]})
                return [there, move("back", b, a, say)]


class Refused(MigratedError):
    """The destination took nothing in; the machine still runs at the source."""


def move(name: str, source: Site, target: Site, say: Say) -> Leg:
    """Migrate the machine, follow it, and check it at the other side."""
    say(f"\n{source.name} -> {target.name}: migrate {target.address}")
    source.qmp.execute("migrate", {"uri": target.address})
    return finish(name, source, target, say, follow(source, say))


def move_by_postcopy(source: Site, target: Site, say: Say) -> Leg:
    """Hand the machine over at once; the walker checks its memory while that still arrives, and afterwards."""
    say(f"\n{source.name} -> {target.name}: migrate {target.address}, by postcopy: the machine first, then its memory")
    for site in (source, target):
        site.qmp.execute("migrate-set-capabilities", {"capabilities": [POSTCOPY]})
    source.qmp.execute("migrate", {"uri": target.address})
    source.qmp.execute("migrate-start-postcopy")
    figures = follow(source, say, until={"postcopy-active", "completed"})
    if figures["status"] not in ("postcopy-active", "completed"):
        raise failed(source, target, figures)
    target.wait_event("running")
    meanwhile = target.check()
    say(f"  runs at {target.name}; checked while its memory arrives: {'OK' if meanwhile['invariant'] else 'BROKEN'}")
    leg = finish("postcopy", source, target, say, follow(source, say), runs=True)
    return replace(leg, verified=leg.verified and bool(meanwhile["invariant"]))


def failed(source: Site, target: Site, figures: dict[str, Any]) -> MigratedError:
    """Return what to raise for a migration that did not do what it should."""
    kind = Refused if figures.get("x-migrated-outcome") == "source-owns" else MigratedError
    return kind(f"{source.name} -> {target.name}: {figures['status']}: {figures.get('error-desc', '')}")


def finish(name: str, source: Site, target: Site, say: Say, figures: dict[str, Any], *, runs: bool = False) -> Leg:
    """Check a machine that has arrived; ``runs``: that it runs is known already."""
    if figures["status"] != "completed":
        raise failed(source, target, figures)
    left = source.wait_event("moved")
    if not runs:
        target.wait_event("running")
    arrived = target.check()
    verified = bool(left["invariant"] and arrived["invariant"])
    verified = verified and left["steps"] == arrived["at"] and left["hash"] == arrived["hash"]
    walked = arrived["steps"] - arrived["at"]
    say(f"  at the stop: step {left['steps']}, memory hash {left['hash']}")
    say(f"  at {target.name}:      {walked} steps further, the same memory walked back: {arrived['hash']}")
    say(f"  neighbour-page invariant and hash: {'OK' if verified else 'BROKEN'}")
    ram = figures["ram"]
    return Leg(
        name,
        figures["total-time"],
        figures["downtime"],
        figures["x-migrated-downtime"],
        ram["total"],
        ram["transferred"],
        len(figures["x-migrated-passes"]),
        left["steps"],
        verified,
        figures.get("x-migrated-faults"),
    )


def follow(source: Site, say: Say, until: Collection[str] = ()) -> dict[str, Any]:
    """Poll until the migration has ended, or is in one of ``until``; a line per pass or second; return the answer."""
    deadline = time.monotonic() + LEG_DEADLINE_S
    shown, shown_at = -1, 0.0
    while True:
        figures: dict[str, Any] = source.qmp.execute("query-migrate")
        now = time.monotonic()
        if figures["status"] not in RUNNING or figures["status"] in until:
            return figures
        if now > deadline:
            raise MigratedError(f"the migration is still {figures['status']} after {LEG_DEADLINE_S:g} s")
        passes = len(figures.get("x-migrated-passes", []))
        if "ram" in figures and (passes != shown or now - shown_at > LINE_S):
            shown, shown_at = passes, now
            say(describe(figures))
        time.sleep(POLL_S)


def describe(figures: dict[str, Any]) -> str:
    """Return one line about a migration under way."""
    ram = figures["ram"]
    throttle = figures.get("cpu-throttle-percentage")
    return (
        f"  pass {len(figures['x-migrated-passes']) + 1:<3} sent {ram['transferred'] / MIB:7.1f} MiB"
        f"   left {ram['remaining'] / MIB:6.1f} MiB   {figures['x-migrated-bandwidth-bps'] / MIB:5.0f} MiB/s"
        f"   the walker writes {figures['x-migrated-dirty-rate-bps'] / MIB:5.0f} MiB/s"
        + (f", slowed down by {throttle} %" if throttle else "")
    )


def summarise(legs: list[Leg], say: Say) -> None:
    """Print what was measured."""
    say("")
    for leg in legs:
        parts = ", ".join(f"{name} {ms:.1f}" for name, ms in leg.downtime_parts_ms.items())
        say(
            f"{leg.name:<8} total {leg.total_ms} ms, downtime {leg.downtime_ms} ms ({parts}),"
            f" {leg.transferred_bytes / MIB:.0f} MiB sent for {leg.ram_bytes / MIB:.0f} MiB of RAM"
        )
        if leg.faults is not None:
            remote = leg.faults["remote"]
            say(
                f"         {leg.faults['requests']} pages were waited for:"
                f" p50 {remote['p50-us']} us, p99 {remote['p99-us']} us, longest {remote['max-us']} us"
            )
    say("Everything checked: nothing was lost." if all(leg.verified for leg in legs) else "A CHECK FAILED.")


def what_degrades(*, tracked: bool) -> str:
    """Say what this user goes without on this host; empty where nothing is missing.

    ``tracked``: the walker got a userfaultfd of some kind.
    """
    if not tracked:
        return (
            "This host refuses userfaultfd (a container's seccomp profile?): instead of reading the kernel's dirty log,"
            " the daemons compare all pages at every look. Nothing is missed, but each look reads all memory, and there"
            " is no postcopy."
        )
    if os.geteuid() == 0 or os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return ""
    try:
        allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    except OSError:
        allowed = False
    if allowed:
        return ""
    return (
        "Not root, and vm.unprivileged_userfaultfd is 0: the walker uses a user-mode-only userfaultfd. Precopy is as"
        " good as ever; postcopy needs the system setting or root, so the way back is precopy, too."
    )

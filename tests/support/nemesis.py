"""What the nemesis does: a plan drawn from a seed, and how it is played on a stage.

The rule of the file: a plan says everything; the same seed is the same plan. Who has to own the machine afterwards is
in it wherever the fault decides that; where a message and a fault race, either may, and the checker still holds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.support.following import wait_until
from tests.support.stage import POINT_DEADLINE_S, FaultySite, Stage

#: Who owns the machine when a source, or a destination, dies at a point: precopy, postcopy. Without a name it races;
#: without an entry what comes of it is later work (a daemon that is started again in the middle of postcopy).
SOURCE_DIES = {
    "source.setup": ("source", "source"),
    "source.stopped": ("source", "source"),
    "source.sent": ("source", "source"),
    "record.released": ("source", "source"),
    "source.write-released": ("target", "source"),
    "source.send-commit": ("target", None),
    "source.write-moved": ("target", None),
}
TARGET_DIES = {
    "target.load": ("source", "source"),
    "target.listen": (None, "source"),
    "record.prepared": ("source", "source"),
    "target.write-prepared": ("source", "source"),
    "target.send-ready": ("source", "source"),
    "record.owner": ("source", None),
    "record.incomplete": (None, "source"),
    "target.write-owner": ("target", None),
    "target.run": ("target", None),
    "target.send-active": ("target", None),
}
#: The same when the link breaks while one of them waits there.
LINK_BREAKS = {
    "source.setup": ("source", "source"),
    "target.load": ("source", "source"),
    "source.stopped": ("source", "source"),
    "source.sent": ("", ""),
    "target.listen": (None, "source"),
    "target.write-prepared": ("source", "source"),
    "target.send-ready": ("", ""),
    "source.write-released": ("target", "target"),
    "source.send-commit": ("target", "target"),
    "target.write-owner": ("target", "target"),
    "target.run": ("target", "target"),
    "target.send-active": ("target", "target"),
    "source.background": (None, "target"),
    "target.background": (None, "target"),
}
#: The same when only what the source says is lost: what the destination says has it let go.
SOURCE_UNHEARD = {**LINK_BREAKS, "target.listen": (None, "target"), "target.write-prepared": ("target", "target")}
#: The same when a daemon stands still there for longer than the other one waits, or, where the other one does not show
#: that it waits, for a moment.
STANDS_STILL = {**LINK_BREAKS, "source.setup": ("", ""), "record.owner": ("target", None)}
#: The same when a record cannot be written.
DISK_FAILS = {
    "record.prepared": ("source", "source"),
    "record.released": ("source", "source"),
    "record.owner": ("source", None),
    "record.incomplete": (None, "source"),
}
AT_TARGET = frozenset({"record.prepared", "record.owner", "record.incomplete"})
#: (fault, action at the point, ways of the link that go silent, who owns it then)
FAULTS = (
    ("kill the source", "kill", (), SOURCE_DIES),
    ("kill the destination", "kill", (), TARGET_DIES),
    ("stop", "stop", (), STANDS_STILL),
    ("reset", "hold", (), LINK_BREAKS),
    ("silence", "hold", ("forward", "backward"), LINK_BREAKS),
    ("the source is not heard", "hold", ("forward",), SOURCE_UNHEARD),
    ("the destination is not heard", "hold", ("backward",), LINK_BREAKS),
    ("disk full", "fail ENOSPC", (), DISK_FAILS),
    ("disk broken", "fail EIO", (), DISK_FAILS),
    ("none", "", (), {"": ("target", "target")}),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One round."""

    fault: str
    point: str
    postcopy: bool
    action: str
    silent: tuple[str, ...]
    owner: str


def plan(seed: str) -> Plan:
    """Draw a round."""
    generator = random.Random(seed)
    while True:
        fault, action, silent, owners = generator.choice(FAULTS)
        point = generator.choice(sorted(owners))
        postcopy = generator.random() < 0.5
        owner = owners[point][postcopy]
        if owner is not None:
            return Plan(fault, point, postcopy, action, silent, owner)


def play(stage: Stage, what: Plan) -> None:
    """Begin a migration, let it go wrong, and mend everything."""
    site = stage.target if what.point.startswith("target.") or what.point in AT_TARGET else stage.source
    if what.point:
        site.arm(what.point, what.action)
    if what.postcopy and what.point != "source.setup":
        # It is asked for before the first pass, which would do.
        stage.source.arm("source.setup", "hold")
        stage.begin(postcopy=True)
        stage.source.wait_held("source.setup")
        stage.source.let_go("source.setup")
    else:
        stage.begin()
    if what.point:
        site.wait_taken(what.point)
    match what.action:
        case "kill":
            site.wait_killed()
        case "stop":
            site.wait_stopped()
            _until_given_up(stage, stage.target if site is stage.source else stage.source)
        case "hold":
            site.wait_held(what.point)
            if what.silent:
                stage.silence(*what.silent)
            else:
                stage.link.cut()
            site.let_go(what.point)
            if what.silent:
                _until_given_up(stage, stage.source)
    stage.heal()


def _until_given_up(stage: Stage, site: FaultySite) -> None:
    """Wait until a daemon does not count on the other one any more, or has all it needs."""

    def given_up() -> bool:
        status = site.status().get("status", "none")
        return status not in ("setup", "active", "device", "postcopy-device", "postcopy-active") or (
            site is stage.target and site.hold() in ("prepared", "owner")
        )

    wait_until(given_up, f"{site.name} gives up", POINT_DEADLINE_S)

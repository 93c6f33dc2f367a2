"""A daemon that waits for machines, as a test of hostile peers sees it: what it said, and whether it is as it was.

The rule of the file: nothing is asked of the daemon but what an operator can ask; the rest is read from /proc.
"""

from __future__ import annotations

from typing import Any

from tests.support import craft
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite
from tests.support.hostile import BLOCKS, DEVICES, LEAD, MEMORY, RAM, TAIL
from tests.support.visit import PONG, SHUT, visit

#: Python's own ups and downs; a length that was believed would be far beyond it.
GROWTH_MAX_BYTES = 8 << 20
PONG_BYTES = 8
#: A message about a hand-over, and what it begins with where there was none.
HANDOVER, REFUSED = 0x4D03, b"\x03"
TOLD_NO = (SHUT, craft.number(1, 4))
TOLD_YES = (SHUT, craft.number(0, 4))


class Target:
    """A daemon that waits for machines, and what it is like when nobody is there."""

    def __init__(self, site: HoldingSite) -> None:
        self.site = site
        self.port = site.port
        self.descriptors = site.descriptors()
        self.memory_bytes = self.peak_bytes = site.private_bytes()

    def settle(self) -> None:
        """Take a machine in and send it away; from now on the daemon has all that it makes once and keeps."""
        # Pages, one with a delta, which are emptied again: the daemon maps the blocks.
        scattered = b"".join(
            craft.record(craft.WHOLE, name, b"x" * craft.PAGE)
            + craft.record(craft.DELTA, name, b"\1\0\3\5\1y")
            + craft.pages(name, bytes(size))
            for name, size in BLOCKS.items()
        )
        visit(self.port, LEAD + RAM + craft.ram_part(scattered) + TAIL + craft.EOF + craft.description(), end=True)
        self.site.wait_status("completed")
        self.site.migrate("file:/dev/null")
        self._lets_an_arrival_fail()
        self.descriptors = self.site.descriptors()
        self.memory_bytes = self.site.private_bytes()

    def refusal(self) -> str:
        """Wait until the last visitor is refused and gone; return why. The daemon is as it was before."""
        self.alone()
        answer = self.site.query()
        assert answer["status"] == "failed", answer
        assert self.site.run_state() == "inmigrate"
        return str(answer["error-desc"])

    def alone(self) -> None:
        """Wait until the daemon holds nothing of the last visitor any more."""

        def left() -> bool:
            return self.site.descriptors() == self.descriptors

        wait_until(left, "the last visitor's descriptors are closed")
        present_bytes = self.site.private_bytes()
        self.peak_bytes = max(self.peak_bytes, present_bytes)
        assert present_bytes < self.memory_bytes + GROWTH_MAX_BYTES

    def hear_out(self, stream: bytes) -> dict[str, Any]:
        """Send a whole stream; return query-migrate's answer about it once the daemon is alone again."""
        before = self.site.query().get("x-migrated-migration-id")
        # A connection is closed at once, unheard, while the daemon still has the last visitor.
        while self.site.query().get("x-migrated-migration-id") == before:
            if any(kind == HANDOVER and body[:1] == REFUSED for kind, body in visit(self.port, stream, end=True)):
                return {"status": "answered"}  # a commit in place of a machine
        self.alone()
        return self.site.query()

    def holds(self) -> dict[str, bytes]:
        """Return what the workload sees in its memory."""
        return {name: self.site.peek(name) for name in BLOCKS}

    def takes_a_machine(self) -> None:
        """Prove that a good machine arrives whole; then send it away, so that the daemon waits again."""
        stream = craft.join(craft.machine(MEMORY, DEVICES))
        answers = wait_until(lambda: visit(self.port, stream, end=True), "taken in")
        assert answers == [(PONG, craft.number(craft.QEMUS_PING, 4)), TOLD_YES]
        self.site.wait_status("completed")
        assert self.holds() == MEMORY
        assert self.site.device("disk") == DEVICES["disk"]
        assert self.site.run_state() == "paused"
        self.sends_it_away()

    def sends_it_away(self) -> None:
        """Migrate to nowhere, and let an arrival fail: the daemon waits for a machine again."""
        self.site.migrate("file:/dev/null")
        self.waits_again()

    def waits_again(self) -> None:
        """Let an arrival fail, where a machine is gone: the daemon waits for one again, and shows that."""
        self._lets_an_arrival_fail()
        self.refusal()

    def _lets_an_arrival_fail(self) -> None:
        def failed() -> bool:
            visit(self.port, LEAD + craft.ram_part(b"", section_id=77), end=True)
            return self.site.run_state() == "inmigrate"

        # A workload that ran stands by only once it has heard that its machine is gone.
        wait_until(failed, "the workload stands by")

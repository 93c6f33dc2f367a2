"""While the destination takes the machine over: what it has written down, it does not take back by an accident."""

from __future__ import annotations

import signal

import pytest

from tests.integration.conftest import MakeSite
from tests.support.following import record_of, wait_status, wait_until


@pytest.mark.row(45)
def test_a_destination_that_is_told_to_end_does_not_hand_the_machine_back(make_site: MakeSite) -> None:
    a = make_site("A")
    b = make_site("B", module="tests.support.misbehave", walker_arguments=["--mode", "deaf-to-cont"])
    a.qmp.execute("cont")
    a.wait_event("running")
    a.qmp.execute("migrate", {"uri": b.address})
    # Its workload was told to go on and does not confirm it: the daemon waits, and is told to end.
    wait_until(lambda: record_of(b)["hold"] == "owner", "B owns the machine")
    b.daemon.send_signal(signal.SIGTERM)
    figures = wait_status(a, {"completed", "failed"})
    b.daemon.wait()
    assert (record_of(a)["hold"], record_of(b)["hold"]) == ("moved", "owner"), f"{figures}\n{b.log_tail()}"
    assert figures["status"] == "completed"

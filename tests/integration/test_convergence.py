"""A machine that writes faster than the link says so; auto-converge slows it down."""

from __future__ import annotations

from migrated.demo.site import Site
from tests.support.following import ENDED, assert_moved, assert_still_runs, run_state, wait_status, wait_until

#: Far less than the walker dirties, even on a busy machine.
NARROW_BPS = 24 << 20


def start_narrow(a: Site, b: Site, **parameters: object) -> None:
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": NARROW_BPS, "downtime-limit": 20, **parameters})
    a.qmp.execute("migrate", {"uri": b.address})


def test_it_says_that_it_does_not_converge_and_what_would_help(pair: tuple[Site, Site]) -> None:
    a, b = pair
    start_narrow(a, b)

    def verdict() -> dict[str, object] | None:
        answer = a.qmp.execute("query-migrate")
        assert answer["status"] not in ENDED
        found: dict[str, object] = answer.get("x-migrated-convergence", {"converging": True})
        return None if found["converging"] else found

    found = wait_until(verdict, "a verdict")
    assert found["text"]
    assert any("downtime-limit" in text for text in found["suggestions"])
    a.qmp.execute("migrate-set-parameters", {"downtime-limit": 30_000})
    wait_status(a, {"completed"})
    assert_moved(a, b)


def test_auto_converge_slows_the_workload_and_gives_it_its_speed_back(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "auto-converge", "state": True}]})
    start_narrow(a, b, **{"cpu-throttle-initial": 50, "cpu-throttle-increment": 20})
    wait_until(lambda: a.qmp.execute("query-migrate").get("cpu-throttle-percentage", 0) >= 70, "throttled twice")
    found = a.qmp.execute("query-migrate")["x-migrated-convergence"]
    assert not any("turn auto-converge on" in text for text in found["suggestions"])
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    assert "cpu-throttle-percentage" not in a.qmp.execute("query-migrate")
    assert_still_runs(a)


def test_a_rate_limit_is_kept(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.qmp.execute("stop")
    start_narrow(a, b)
    figures = wait_status(a, {"completed"})
    assert run_state(b) == "paused", "the run state travels with the machine"
    # The first pass alone is 16 MiB; nothing says how fast a noisy machine is, but it may not be faster than the limit.
    least_ms = (16 << 20) / NARROW_BPS * 1000 * 0.7
    assert figures["total-time"] - figures["downtime"] >= least_ms
    b.qmp.execute("cont")
    assert_moved(a, b)

"""The units under a booted systemd: readiness, status, watchdog, stop, and what the sandbox lets through.

The container has this host's /usr and this tree, both read-only, and no network. It boots in less than a second.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.container import PYTHON, Container
from tests.support.systemd_probe import UNITS

pytestmark = [
    pytest.mark.skipif(shutil.which("systemd-nspawn") is None, reason="systemd-nspawn is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a container is booted as root"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"there is no {PYTHON} for the container"),
    pytest.mark.skipif(not Path("/usr/lib/systemd/systemd").exists(), reason="systemd itself is not installed"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the probe saw, once for all tests here."""
    container = Container(tmp_path_factory.mktemp("systemd"))
    if reason := container.why_not():
        pytest.skip(reason)
    return container.run()


def of(seen: dict[str, Any], member: str) -> Any:
    assert member in seen, f"the probe did not get that far:\n{seen['errors']}\n{seen['journal']}"
    return seen[member]


def test_both_units_are_ready(seen: dict[str, Any]) -> None:
    for unit in UNITS:
        started = of(seen, "started")[unit]
        assert (started["ActiveState"], started["SubState"], started["NRestarts"]) == ("active", "running", "0"), seen
        assert started["User"] == "migrated"


def test_the_daemon_has_no_rights(seen: dict[str, Any]) -> None:
    for process in of(seen, "process").values():
        assert int(process["CapEff"], 16) == 0
        assert process["NoNewPrivs"] == "1"
        assert process["Seccomp"] == "2"
        assert not process["Uid"].startswith("0\t")


def test_a_machine_moves_between_sandboxed_daemons(seen: dict[str, Any]) -> None:
    """One workload runs as the daemon's user, the other as root, whose /proc the daemon cannot see."""
    assert of(seen, "tracked") == [True, True]
    assert of(seen, "migration")["status"] == "completed", seen["migration"]
    left, arrived = of(seen, "left"), of(seen, "arrived")
    assert left["invariant"]
    assert arrived["invariant"]
    assert (left["steps"], left["hash"]) == (arrived["at"], arrived["hash"])


def test_a_reload_reaches_the_daemon_and_ends_nothing(seen: dict[str, Any]) -> None:
    for unit in UNITS:
        started, reloaded = of(seen, "started")[unit], of(seen, "after-reload")[unit]
        assert (reloaded["MainPID"], reloaded["SubState"]) == (started["MainPID"], "running")
    assert sum(line.startswith("reloaded ") for line in seen["journal"].splitlines()) == len(UNITS)


def test_the_status_line(seen: dict[str, Any]) -> None:
    assert of(seen, "running")["StatusText"] == "resume"


@pytest.mark.row(46)
def test_a_daemon_that_hangs_is_started_again_and_finds_its_workload(seen: dict[str, Any]) -> None:
    restarted = of(seen, "restarted")
    assert (restarted["ActiveState"], restarted["NRestarts"]) == ("active", "1")
    assert "Watchdog timeout" in seen["journal"]
    after = of(seen, "after-hang")
    assert after["run-state"] == "running"
    assert after["check"]["invariant"]
    assert after["check"]["steps"] > of(seen, "arrived")["steps"]


def test_a_workload_of_the_daemons_own_lives_in_the_sandbox_and_outlives_it(seen: dict[str, Any]) -> None:
    (block,) = of(seen, "own")["blocks"]
    assert block["workloads"] == ["walker-own"]
    assert of(seen, "own-lives")


def test_a_stop_is_clean_and_leaves_the_workload(seen: dict[str, Any]) -> None:
    for stopped in of(seen, "stopped").values():
        assert (stopped["ActiveState"], stopped["Result"], stopped["ExecMainStatus"]) == ("inactive", "success", "0")
    assert of(seen, "walker-lives")
    assert of(seen, "left-behind") == []

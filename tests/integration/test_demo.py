"""The demo as a newcomer runs it: as root, as an ordinary user, and where the host refuses userfaultfd."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.app import what_degrades
from tests.house.repository import ROOT

DEADLINE_S = 50
NOBODY = 65534
WITHOUT_USERFAULTFD = ROOT / "tests" / "support" / "without_userfaultfd.py"
#: The one that tests run with may lie in a directory of root's.
INTERPRETERS = (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
DEMO = ("-m", "migrated.cli.app", "demo", "--ram-mib", "16")


def run(
    command: Sequence[str | Path], environment: dict[str, str] | None = None, *, ordinary: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a program with nothing in its environment but what is given, as an ordinary user where this is root."""
    paths = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    user: dict[str, Any] = {}
    if ordinary and os.geteuid() == 0:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return subprocess.run(
        command, cwd="/", env={"PATH": os.defpath, "PYTHONPATH": paths} | (environment or {}),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=DEADLINE_S, **user,
    )  # fmt: skip


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter with which an ordinary user can run this tree."""
    found = []
    for interpreter in INTERPRETERS:
        try:
            done = run([interpreter, "-c", "import migrated.cli.app, migrated.daemon.app, migrated.demo.walker"])
        except OSError as error:
            found.append(f"{interpreter}: {error.strerror}")
            continue
        if done.returncode == 0:
            return interpreter
        found.append(f"{interpreter}: {done.stderr.strip().splitlines()[-1]}")
    pytest.skip(f"an ordinary user cannot run this tree: {'; '.join(found)}")


def test_as_whoever_runs_the_tests() -> None:
    done = run([sys.executable, *DEMO], ordinary=False)
    assert done.returncode == 0, done
    assert "Everything checked: nothing was lost." in done.stdout


def test_for_programs() -> None:
    done = run([sys.executable, *DEMO, "--json"], ordinary=False)
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    if os.geteuid() != 0 and "postcopy" not in found:
        pytest.skip("this user's userfaultfd does not wait for system calls")
    there, back = found["precopy"], found["postcopy"]
    assert there["verified"]
    assert back["verified"]
    assert back["faults"] > 0
    assert 0 < back["fault_p50_us"] <= back["fault_p99_us"]
    assert {"total_ms", "downtime_ms", "ram_bytes", "transferred_bytes", "passes"} <= there.keys() & back.keys()


def test_as_an_ordinary_user_without_a_home(python: str) -> None:
    done = run([python, *DEMO])
    assert done.returncode == 0, done
    assert "Everything checked: nothing was lost." in done.stdout
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    may_open = setting == "1" or run(["/usr/bin/test", "-w", "/dev/userfaultfd"]).returncode == 0
    assert ("vm.unprivileged_userfaultfd is 0" in done.stdout) is not may_open


def test_as_an_ordinary_user_with_a_home_and_a_runtime_directory(python: str) -> None:
    done = run([python, *DEMO, "--json"], {"HOME": "/nonexistent", "XDG_RUNTIME_DIR": "/nonexistent"})
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert found["precopy"]["verified"]
    assert found["back"]["verified"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter knows the call's number on x86-64 only")
def test_where_the_host_refuses_userfaultfd(python: str) -> None:
    done = run([python, WITHOUT_USERFAULTFD, python, *DEMO])
    assert done.returncode == 0, done
    assert "This host refuses userfaultfd" in done.stdout
    assert "Everything checked: nothing was lost." in done.stdout


def test_what_is_missing_is_said() -> None:
    assert "compare all pages" in what_degrades(tracked=False)
    if os.geteuid() == 0:
        assert what_degrades(tracked=True) == ""

"""What the tab key offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migrated.cli.complete import complete_capability, complete_parameter, machine_names


def test_machines_are_those_configured_and_those_that_run(tmp_path: Path) -> None:
    configurations, sockets = tmp_path / "etc", tmp_path / "run"
    for path in (configurations / "kv.toml", configurations / "other.txt", configurations / "pki" / "x.toml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("kv", "adhoc"):
        (sockets / name).mkdir(parents=True)
        (sockets / name / "qmp.sock").touch()
    (sockets / "stopped").mkdir()
    assert machine_names(configurations, sockets) == ["adhoc", "kv"]


def test_nowhere_is_nobody(tmp_path: Path) -> None:
    assert machine_names(tmp_path / "etc", tmp_path / "run") == []


def test_settings_are_those_that_do_something() -> None:
    assert complete_capability("postcopy-r") == ["postcopy-ram=on", "postcopy-ram=off"]
    assert complete_capability("x-colo") == []
    assert complete_parameter("downtime") == ["downtime-limit="]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("snapshot v", ["verify"]),
        ("capabilities validate", ["validate-uuid=on", "validate-uuid=off"]),
        ("migrate tcp:", []),
    ],
)
def test_the_program_answers_a_shell(typed: str, offered: list[str]) -> None:
    words = f"migratectl {typed}"
    environment = {
        **os.environ,
        "_MIGRATECTL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from migrated.cli.app import main; main()"],
        env=environment, capture_output=True, text=True, check=True, timeout=50,
    )  # fmt: skip
    assert done.stdout.split() == offered
    assert done.stderr == ""

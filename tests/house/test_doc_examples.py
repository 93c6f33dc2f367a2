"""What the documents show runs, and what their tables say is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from migrated.cli.exit_code import ExitCode
from migrated.control.commands import COMMANDS, EVENTS, NOT_IMPLEMENTED
from migrated.daemon.journal import MESSAGE_IDS
from migrated.daemon.metrics import ROWS
from migrated.model.handover import Hold
from migrated.model.parameters import CAPABILITIES, PARAMETERS
from migrated.savevm.handlers import SaveVMHandlers
from migrated.wire.command import Command
from migrated.wire.return_path import Message
from tests.house.repository import ROOT, modules
from tests.support.dissect import dissect
from tests.support.documented import EXAMPLES, Host, Lines
from tests.support.following import wait_until

DOCS = ROOT / "docs"
JOURNAL, MOVES = (f'[handlers]\nload = ["{name}:register"]\n' for name in ("journal", "moves"))

GUIDES = {"workload-guide.md": ("counter.py", "journal.py"), "device-guide.md": ("thermostat.py", "moves.py")}

# -- examples ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host]]:
    """Two daemons that wait for machines, with a handler of the documents loaded."""
    with ExitStack() as stack:

        def start(name: str) -> Host:
            environment = {"JOURNAL_FILE": str(tmp_path / f"{name}.journal")}
            return stack.enter_context(Host(tmp_path / name, config=request.param, environment=environment))

        yield start("A"), start("B")


def migrate(source: Host, target: Host) -> dict[str, Any]:
    """Move the machine and return the last answer of query-migrate."""
    source.qmp.execute("migrate", {"uri": target.address})

    def ended() -> dict[str, Any] | None:
        answer: dict[str, Any] = source.qmp.execute("query-migrate")
        return answer if answer["status"] in ("completed", "failed", "cancelled") else None

    answer = dict(wait_until(ended, "the end of the migration"))
    assert answer["status"] == "completed", answer
    return answer


@pytest.mark.parametrize("hosts", [JOURNAL], indirect=True, ids=["journal"])
def test_the_counter_moves_there_and_back(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    a, b = hosts
    here = a.run_example("counter.py", a.attach_socket)
    there = b.run_example("counter.py", b.attach_socket)
    wait_until(lambda: all(host.qmp.execute("x-migrated-query-machine")["devices"] for host in hosts), "attached")
    a.qmp.execute("cont")
    _, counted = here.wait_for("count")
    (tmp_path / "A.journal").write_bytes(b"entry\n" * 50_000)
    (tmp_path / "B.journal").write_bytes(b"what an earlier machine left")
    migrate(a, b)
    arrived = follow(here, there, counted["count"])
    assert arrived["journey"] == [here.pid, there.pid]
    assert (tmp_path / "B.journal").read_bytes() == b"entry\n" * 50_000
    migrate(b, a)
    assert follow(there, here, arrived["count"])["journey"] == [here.pid, there.pid, here.pid]


@pytest.mark.parametrize("hosts", [MOVES], indirect=True, ids=["moves"])
def test_the_thermostat_moves_and_the_daemon_counts_it(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    a, b = hosts
    here = a.run_example("thermostat.py", a.attach_socket)
    there = b.run_example("thermostat.py", b.attach_socket)
    wait_until(lambda: all(host.qmp.execute("x-migrated-query-machine")["devices"] for host in hosts), "attached")
    a.qmp.execute("cont")
    while here.wait_for("reading")[1]["override"] == 0:
        continue
    migrate(a, b)
    before, _ = here.wait_for("moved")
    _, arrived = there.wait_for("reading")
    assert arrived["reading"] > 20_004
    assert not before or arrived["reading"] == before[-1]["reading"] + 1
    assert (arrived["override"], len(arrived["program"])) == (22_000, 2)
    capture = tmp_path / "machine.state"
    b.qmp.execute("migrate", {"uri": f"file:{capture}"})
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "completed", "saved")
    found = dissect(capture.read_bytes())
    assert found.states["moves", 0]["count"] == 1
    assert found.states["thermostat", 0]["state"]["thermostat/override"] == {"override": 22_000}


def test_what_the_device_guide_says_of_tests_is_true() -> None:
    """Run the guide's block of tests."""
    (block,) = re.findall(
        r"```python\n(# test_thermostat.py\n.*?)```", (DOCS / "device-guide.md").read_text(), re.DOTALL
    )
    names = re.findall(r"^def (test_\w+)", block, re.MULTILINE)
    assert len(names) == 3
    program = block + "".join(f"{name}()\n" for name in names)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def follow(source: Lines, target: Lines, count: int) -> dict[str, Any]:
    """Check that the target goes on with the number after the source's last one; return its first line."""
    before, moved = source.wait_for("moved")
    assert moved["moved"]
    _, first = target.wait_for("count")
    assert first["count"] == (before[-1]["count"] if before else count) + 1
    return first


def test_the_guide_shows_the_examples_as_they_are() -> None:
    for guide, examples in GUIDES.items():
        text = (DOCS / guide).read_text()
        for example in examples:
            assert f"```python\n{(EXAMPLES / example).read_text()}```" in text, example


def test_the_counter_is_as_short_as_promised() -> None:
    lines = [line for line in (EXAMPLES / "counter.py").read_text().splitlines() if line.strip()]
    assert len(lines) < 30


# -- tables --------------------------------------------------------------------------------------------------------


def table(document: str, heading: str) -> dict[str, list[str]]:
    """Return the first table below a heading: first cell without backquotes -> the other cells."""
    text = (DOCS / document).read_text()
    section = re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def shown(value: object) -> str:
    """Write a value as migratectl does."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def test_capabilities() -> None:
    documented = {name: cells[0] for name, cells in table("operator-guide.md", "Capabilities").items()}
    assert documented == {row.name: shown(row.default) for row in CAPABILITIES.values() if row.implemented}


def test_parameters() -> None:
    documented = {name: cells[:2] for name, cells in table("operator-guide.md", "Parameters").items()}
    kinds = {bool: "switch", str: "text", int: "number"}
    assert documented == {
        row.name: [row.unit or kinds[type(row.default)], shown(row.default)]
        for row in PARAMETERS.values()
        if row.implemented
    }


def test_exit_codes() -> None:
    assert set(table("operator-guide.md", "Exit codes of migratectl")) == {str(int(code)) for code in ExitCode}


def test_ownership_records() -> None:
    assert set(table("operator-guide.md", "The ownership record")) == {hold.value for hold in Hold}


def test_commands_and_events() -> None:
    assert set(table("operator-guide.md", "Events")) == set(EVENTS)
    text = (DOCS / "operator-guide.md").read_text()
    assert [name for name in [*COMMANDS, *NOT_IMPLEMENTED] if f"`{name}`" not in text] == []


def test_metrics() -> None:
    documented = table("operator-guide.md", "Metrics")
    shown_labels = {row.name: ", ".join(f"`{label}`" for label in row.labels) for row in ROWS}
    assert documented == {row.name: [row.kind.value, shown_labels[row.name], row.meaning] for row in ROWS}


def test_message_ids() -> None:
    documented = table("operator-guide.md", "Message ids")
    assert {event: cells[0].strip("`") for event, cells in documented.items()} == MESSAGE_IDS
    explained = {event for row in table("operator-guide.md", "Log") for event in re.findall(r"\w+", row)}
    code = "".join(path.read_text() for path in modules() if path.name != "journal.py")
    assert [event for event in MESSAGE_IDS if event not in explained or f'"{event}"' not in code] == []


def test_hooks_of_the_contract() -> None:
    assert list(table("workload-guide.md", "The hooks")) == list(SaveVMHandlers.__dataclass_fields__)


def test_elements_of_the_wire() -> None:
    documented = table("protocol.md", "Commands")
    assert set(documented) == {command.name for command in Command if command is not Command.INVALID}
    assert set(table("protocol.md", "Messages of the return path")) == {message.name for message in Message}

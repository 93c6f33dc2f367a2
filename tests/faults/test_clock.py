"""Row 41 of the fault matrix: somebody sets the clock, forwards and back, in the middle of a migration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults.test_matrix import lead_to
from tests.support.compiler import NEEDS, compile_c, has_compiler
from tests.support.stage import FaultySite, Stage

SOURCE = Path(__file__).resolve().parents[1] / "support" / "clock.c"
HOUR_S = 3600


class Clock:
    """The wall clock of everything that was started since."""

    def __init__(self, shift: Path) -> None:
        self._shift = shift
        self.set(0)

    def set(self, seconds: int) -> None:
        """Have it go wrong by so many seconds."""
        aside = self._shift.with_suffix(".new")
        aside.write_text(str(seconds))
        aside.rename(self._shift)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    if not has_compiler():
        pytest.skip(NEEDS)
    library = compile_c(tmp_path / "clock.so", [SOURCE], ["-shared", "-fPIC", "-ldl"])
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("CLOCK_SHIFT", str(tmp_path / "shift"))
    return Clock(tmp_path / "shift")


@pytest.fixture
def stage(clock: Clock, tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as stage:
        yield stage


def hours_off(site: FaultySite) -> int:
    """Return by how many hours the last line of the daemon's log is wrong."""
    written = datetime.fromisoformat(json.loads(site.log_path.read_text().splitlines()[-1])["timestamp"])
    return round((written - datetime.now(UTC)).total_seconds() / HOUR_S)


@pytest.mark.row(41)
def test_the_clock_jumps(clock: Clock, stage: Stage) -> None:
    for point, postcopy in (("source.pass", False), ("source.write-released", False), ("source.background", True)):
        for hours in (1, -1):
            site = lead_to(stage, point, postcopy=postcopy)
            clock.set(hours * HOUR_S)
            site.let_go(point)
            stage.check("target")
            assert hours_off(site) == hours, "the clock was set indeed"

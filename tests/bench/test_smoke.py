"""The benchmark runs: one cheap case from its command line to its report, with tiny machines and no word about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.board import Board, encode, record
from tests.bench.documents import FIGURES, ROOT
from tests.bench.figures import Figure, Target
from tests.bench.qemu import version


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.limit(120)
def test_a_case_from_end_to_end(tmp_path: Path) -> None:
    out, committed = tmp_path / "results.json", FIGURES.read_bytes()
    done = bench("--pairs", "1", "--shrink", "64", "--out", str(out), "zeros")
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]
    assert [figure["name"].split(" GiB ")[1] for figure in figures] == ["never written", "populated with zeros"]
    assert all(len(figure["ours"]) == 1 and figure["ours"][0] > 0 for figure in figures)
    assert f"written: {out}" in done.stdout.replace("\n", "")
    assert FIGURES.read_bytes() == committed


@pytest.mark.limit(120)
@pytest.mark.skipif(version() is None, reason="needs qemu-system-x86")
def test_a_regression_counts_where_it_is_to_count(tmp_path: Path) -> None:
    never_so_fast = Figure("zeros", "0.015625 GiB never written", "ms", "by a wish", Target("<=", 0.333), "qemu")
    never_so_fast.pair(1.0, 1e9)
    planted = record([never_so_fast], date="2026-01-01", machine="m", pairs=1, seconds=1.0, load=0.0)
    against = tmp_path / "planted.json"
    against.write_bytes(encode(Board({"zeros": planted})))
    command = ["--pairs", "1", "--shrink", "64", "--out", str(tmp_path / "out"), "--against", str(against), "zeros"]
    done = bench("--strict", *command)
    assert done.returncode == 1, done.stderr
    assert "zeros: 0.015625 GiB never written, migrated against qemu" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "--shrink", "64", "zeros"], "--keep is for figures"),
        (["nonsense"], "unknown: nonsense; there are bulk"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], says: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert says in done.stderr

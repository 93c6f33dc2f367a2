"""Reports: what is picked from an answer, how one is found again, who owns the machine afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from migrated.errors import CommandError
from migrated.model.faults import FaultFigures
from migrated.model.handover import Hold
from migrated.model.history import (
    PASSES_FIRST,
    PASSES_LAST,
    UNFINISHED,
    UNKNOWN,
    Direction,
    Report,
    Tally,
    Unreadable,
    entry,
    find,
    format_wall,
    interrupted,
    listed,
    outcome_of,
    with_answer,
)
from migrated.model.stats import RamStats

ANSWER: dict[str, Any] = {
    "status": "failed",
    "error-desc": "no good",
    "x-migrated-error": {"id": "link-closed"},
    "x-migrated-peer": {"address": "h:1", "kind": "migrated"},
    "x-migrated-passes": [{"pass": 1}],
    "total-time": 12,
    "ram": {"transferred": 5, "total": 9},
}


def begun(migration_id: str = "move-1", started: str = "2026-11-26T18:00:00.000Z") -> Report:
    return Report(
        id=migration_id, direction=Direction.OUTGOING, machine="kv", started=started, status=UNFINISHED,
        outcome=UNKNOWN, uri="tcp:h:1",
    )  # fmt: skip


def test_walls_sort_as_their_texts_do() -> None:
    texts = [format_wall(wall_ms) for wall_ms in (0, 999, 1000, 1_764_180_085_123)]
    assert texts == sorted(texts)
    assert texts[-1] == "2025-11-26T18:01:25.123Z"


def test_an_answer_becomes_a_report() -> None:
    report = with_answer(begun(), ANSWER, outcome="source-owns")
    assert (report.status, report.outcome, report.peer) == ("failed", "source-owns", "h:1")
    assert (report.error, report.error_id) == ("no good", "link-closed")
    assert report.migration == ANSWER
    assert report.passes_left_out == 0
    assert report.key == (begun().started, "move-1")


def test_an_answer_with_little_in_it() -> None:
    report = with_answer(begun(), {"status": "active"}, outcome=UNKNOWN)
    assert (report.status, report.peer, report.error, report.migration) == ("active", "", "", {"status": "active"})


def test_of_many_passes_the_first_and_the_last_are_kept() -> None:
    passes = [{"pass": number} for number in range(1, 1001)]
    report = with_answer(begun(), {**ANSWER, "x-migrated-passes": passes}, outcome=UNKNOWN)
    kept = [one["pass"] for one in report.migration["x-migrated-passes"]]
    assert (len(kept), kept[0], kept[-1]) == (PASSES_FIRST + PASSES_LAST, 1, 1000)
    assert report.passes_left_out == 1000 - len(kept)


def test_an_interrupted_one_says_so() -> None:
    report = interrupted(begun(), outcome="source-owns")
    assert (report.status, report.outcome, report.error_id, report.ended) == (
        "interrupted", "source-owns", "migration-interrupted", "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("direction", "owning", "unknown"),
    [
        (Direction.OUTGOING, {Hold.MOVED}, {Hold.RELEASED, Hold.ACCEPTED}),
        (Direction.INCOMING, {Hold.OWNER, Hold.INCOMPLETE}, {Hold.RELEASED, Hold.ACCEPTED}),
    ],
)
def test_who_owns_the_machine_afterwards(direction: Direction, owning: set[Hold], unknown: set[Hold]) -> None:
    found = {hold: outcome_of(direction, hold) for hold in Hold}
    assert {hold for hold, outcome in found.items() if outcome == "destination-owns"} == owning
    assert {hold for hold, outcome in found.items() if outcome == "unknown"} == unknown
    assert set(found.values()) == {"destination-owns", "unknown", "source-owns"}


def test_a_line_of_the_list_leaves_out_what_is_not_known() -> None:
    assert entry(begun()) == {
        "id": "move-1", "direction": "outgoing", "started": "2026-11-26T18:00:00.000Z", "status": "unfinished",
        "outcome": "unknown", "uri": "tcp:h:1",
    }  # fmt: skip
    line = entry(with_answer(begun(), ANSWER, outcome="source-owns"))
    assert (line["error-id"], line["total-time"], line["transferred"], line["ram"]) == ("link-closed", 12, 5, 9)
    assert "downtime" not in line


def test_damaged_ones_come_behind_the_others() -> None:
    found = listed([Unreadable(path="/x", unreadable="cut short"), begun()])
    assert found == [entry(begun()), {"path": "/x", "unreadable": "cut short"}]


def test_a_report_is_found_by_the_beginning_of_its_id() -> None:
    later = begun(started="2026-11-27T18:00:00.000Z")
    reports = [later, begun("move-10"), begun("other"), begun()]
    assert find(reports, "o").id == "other"
    assert find(reports, "move-10").id == "move-10"
    assert find(reports, "move-1") is later
    for wanted in ("none", ""):
        with pytest.raises(CommandError, match=f"no report of a migration '{wanted}'. Next: "):
            find(reports, wanted)
    with pytest.raises(CommandError, match="the beginning of 2 ids: move-1, move-10"):
        find(reports, "move")


def test_the_tally_adds_up() -> None:
    tally, figures = Tally(), FaultFigures()
    stats = RamStats(precopy_bytes=1, downtime_bytes=2, postcopy_bytes=3, transferred=6, postcopy_requests=4)
    figures.remote.add(0.001)
    figures.requests = 1
    for _ in range(2):
        tally.ended(Direction.OUTGOING, "completed")
        tally.add(Direction.OUTGOING, stats)
        tally.add(Direction.INCOMING, stats)
        tally.add_faults(figures)
    assert tally.results == {(Direction.OUTGOING, "completed"): 2}
    assert tally.sent_bytes == {"precopy": 2, "downtime": 4, "postcopy": 6}
    assert (tally.received_bytes, tally.postcopy_requests) == (12, 8)
    assert (tally.faults.remote.count, tally.faults.requests) == (2, 2)

"""`migratectl whoowns`, `status` without a daemon, `resolve`, and a dry run: what they say to people and programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from migrated.cli.ownership import may_be_lost
from tests.unit.cli.conftest import Ctl

UNKNOWN = (
    "the outcome is unknown: the last byte went to 10.0.0.7:7400 and no answer came back; the machine may run there"
)


def record(path: Path, **members: Any) -> Path:
    text = json.dumps({"epoch": 7, "peer": "", "migration_id": "", "run_state": "running", **members})
    (path / "ownership.json").write_text(text)
    return path


async def test_whoowns(ctl: Ctl, tmp_path: Path) -> None:
    state = record(tmp_path, hold="moved", peer="10.0.0.7:7400", migration_id="move-1")
    ran = await ctl.run("whoowns", "--state", str(state))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "  owner        the other host",
        "  record       moved: the machine runs at 10.0.0.7:7400",
        "  epoch        7",
        "  peer         10.0.0.7:7400",
        "  migration    move-1",
        "  next step    migrate it back from there; its memory here is out of date",
    ]
    assert ctl.migrator.calls == []


@pytest.mark.parametrize(
    ("hold", "owner", "code"),
    [
        ("owner", "this host", 0),
        ("incomplete", "this host", 0),
        ("moved", "the other host", 0),
        ("none", "nobody", 0),
        ("partial", "nobody", 0),
        ("released", "unknown", 6),
        ("accepted", "unknown", 6),
    ],
)
async def test_whoowns_for_programs(ctl: Ctl, tmp_path: Path, hold: str, owner: str, code: int) -> None:
    ran = await ctl.run("--json", "whoowns", "--state", str(record(tmp_path, hold=hold)))
    assert ran.code == code
    assert (ran.json["owner"], ran.json["record"], ran.json["epoch"], ran.json["written"]) == (owner, hold, 7, True)


async def test_whoowns_where_there_is_nothing(ctl: Ctl, tmp_path: Path) -> None:
    ran = await ctl.run("whoowns", "--state", str(tmp_path))
    assert ran.code == 0
    assert f"  note         no daemon has ever written a record in {tmp_path}" in ran.out.splitlines()
    ran = await ctl.run("whoowns", "--state", str(tmp_path / "none"))
    assert ran.code == 3
    assert ran.err.startswith(f"migratectl: {tmp_path / 'none'}: there is no such state directory. Next: ")
    (tmp_path / "ownership.json").write_text("{")
    ran = await ctl.run("whoowns", "--state", str(tmp_path), "--json")
    assert (ran.code, ran.json["error"]["id"]) == (3, "config-invalid")


async def test_status_without_a_daemon(ctl: Ctl, tmp_path: Path) -> None:
    state = record(tmp_path, hold="owner")
    await ctl.server.close()
    ran = await ctl.run("status", "--state", str(state))
    assert ran.code == 3
    assert "[link-closed]" in ran.err
    assert ran.out.splitlines()[0] == "  owner        this host"
    ran = await ctl.run("status", "--state", str(state), "--json")
    assert (ran.json["error"]["id"], ran.json["ownership"]["owner"]) == ("link-closed", "this host")
    ran = await ctl.run("status", "--state", str(tmp_path / "none"))
    assert (ran.code, "no such state directory" in ran.err) == (3, True)


async def test_resolve_says_what_may_be_lost(ctl: Ctl) -> None:
    ctl.migrator.record = {"record": "released", "peer": "10.0.0.7:7400", "text": "settled", "next-step": "`cont`"}
    ran = await ctl.run("resolve", "--peer-is-fenced")
    assert ran.code == 0
    lost = may_be_lost("released", "10.0.0.7:7400", peer_is_fenced=True)
    assert lost.startswith("if the machine had begun to run at 10.0.0.7:7400: everything that it has done")
    lines = ["Settled by your word: settled", f"  may be lost  {lost}", "  next step    `cont`"]
    assert ran.out.splitlines() == lines
    assert ("resolve", True, False) in ctl.migrator.calls


def test_each_word_has_its_price() -> None:
    assert "given up with the next machine" in may_be_lost("released", "", peer_is_fenced=False)
    assert may_be_lost("accepted", "b", peer_is_fenced=True).startswith("nothing, if b really does not run")


READY: dict[str, object] = {
    "ready": True,
    "checked": ["source", "destination"],
    "blockers": [],
    "peer": {"address": "h:1", "kind": "migrated"},
    "destination": {"name": "kv", "tool": "migrated 0.1.0"},
}
BLOCKER = {"id": "block-size", "side": "destination", "text": "it differs", "next-step": "mend it", "warning": False}
WARNING = {**BLOCKER, "id": "clock-skew", "text": "one hour", "warning": True}


async def test_a_dry_run_that_is_ready(ctl: Ctl) -> None:
    ctl.migrator.verdict = {**READY, "blockers": [WARNING]}
    ran = await ctl.run("migrate", "--dry-run", "tcp:h:1")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "Ready: nothing stands in the way of a migration to tcp:h:1",
        "  destination  kv, migrated 0.1.0",
        "  warning      destination: one hour [clock-skew]",
        "               next: mend it",
    ]
    assert ctl.migrator.calls == [("preflight", "tcp:h:1")]


async def test_a_dry_run_that_is_not(ctl: Ctl) -> None:
    ctl.migrator.verdict = {**READY, "ready": False, "blockers": [BLOCKER, WARNING]}
    ran = await ctl.run("migrate", "--dry-run", "tcp:h:1")
    assert ran.code == 3
    assert ran.out.splitlines()[0] == "Not ready: 1 blocker to a migration to tcp:h:1"
    ran = await ctl.run("migrate", "--dry-run", "tcp:h:1", "--json")
    assert (ran.code, ran.json) == (3, ctl.migrator.verdict)


async def test_a_dry_run_of_one_side_says_so(ctl: Ctl) -> None:
    ctl.migrator.verdict = {name: value for name, value in READY.items() if name != "destination"}
    ran = await ctl.run("migrate", "--dry-run", "tcp:h:1")
    assert "the peer does not know how to be asked: only this side was checked" in ran.out


async def test_a_migration_that_is_blocked(ctl: Ctl) -> None:
    error = {"id": "preflight-blocked", "fault": "setup", "phase": "setup", "known": "", "next-step": ""}
    blocked: dict[str, object] = {
        "status": "failed", "error-desc": "nothing was moved: it differs", "x-migrated-error": error,
        "x-migrated-blockers": [BLOCKER], "x-migrated-outcome": "source-owns", "x-migrated-migration-id": "m",
    }  # fmt: skip
    ctl.migrator.script = [blocked]
    ran = await ctl.run("migrate", "tcp:h:1")
    assert ran.code == 4
    assert "  blocker      destination: it differs [block-size]" in ran.out.splitlines()
    ctl.migrator.script = [blocked]
    report = (await ctl.run("migrate", "tcp:h:1", "--json", "--request-id", "m")).json
    assert (report["error-id"], report["blockers"], report["migration-id"]) == ("preflight-blocked", [BLOCKER], "m")
    assert ctl.migrator.calls[-1] == ("migrate", "tcp:h:1", False, "m")


async def test_a_request_id_that_is_none(ctl: Ctl) -> None:
    ran = await ctl.run("migrate", "--request-id", "a b", "tcp:h:1")
    assert (ran.code, "[argument-invalid]" in ran.err) == (3, True)

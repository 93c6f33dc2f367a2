"""Every hook is called at its moment, in its order, under its lock regime, in a migration between two real daemons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from migrated.demo.site import Site
from tests.integration.conftest import MakeSite
from tests.support.contract_device import STEPS
from tests.support.following import migrate, wait_status, wait_until
from tests.support.recorder import QUESTIONS

CONFIG = '[handlers]\nload = ["tests.support.contract_device:register"]\n'

#: hook -> lock held
REGIME = {
    "save_setup": False,
    "save_live_pending": False,
    "save_live_iterate": False,
    "save_live_complete_precopy": True,
    "save_state": True,
    "save_cleanup": True,
    "load_setup": True,
    "load_state": True,
    "load_cleanup": True,
}


@pytest.fixture
def sites(make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Site, Site]:
    monkeypatch.setenv("CONTRACT_DIR", str(tmp_path))
    a, b = make_site("A", config=CONFIG), make_site("B", config=CONFIG)
    a.qmp.execute("cont")
    a.wait_event("running")
    return a, b


def calls(site: Site, tmp_path: Path) -> list[tuple[str, bool, str]]:
    """Return (hook, lock held, run state) of everything that was called, without the questions."""
    lines = (tmp_path / f"{site.daemon.pid}.jsonl").read_text().splitlines()
    return [(hook, held, state) for hook, held, state in map(json.loads, lines) if hook not in QUESTIONS]


def test_a_whole_migration(sites: tuple[Site, Site], tmp_path: Path) -> None:
    a, b = sites
    migrate(a, b)
    saved, loaded = calls(a, tmp_path), calls(b, tmp_path)
    for hook, held, _ in saved + loaded:
        assert held is REGIME[hook], hook
    hooks = [hook for hook, _, _ in saved]
    assert hooks[0] == "save_setup"
    assert hooks[-3:] == ["save_live_complete_precopy", "save_state", "save_cleanup"]
    middle = hooks[1:-3]
    assert middle[0] == "save_live_pending"
    assert middle.count("save_live_iterate") >= STEPS
    assert set(middle) == {"save_live_pending", "save_live_iterate"}
    states = {hook: state for hook, _, state in saved}
    assert states["save_live_iterate"] == "running"
    assert states["save_live_complete_precopy"] == states["save_state"] == "finish-migrate"
    assert states["save_cleanup"] == "postmigrate"
    # START, one per PART, END, FULL: every section is handed to load_state.
    assert [hook for hook, _, _ in loaded] == (
        ["load_setup"] + ["load_state"] * (1 + middle.count("save_live_iterate") + 2) + ["load_cleanup"]
    )
    assert {state for hook, _, state in loaded if hook == "load_state"} == {"inmigrate"}
    assert loaded[-1][2] == "running"


def test_cleanup_comes_even_when_setup_never_ran(sites: tuple[Site, Site], tmp_path: Path) -> None:
    a, _ = sites
    a.qmp.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
    wait_status(a, {"failed"})
    assert calls(a, tmp_path) == [("save_cleanup", True, "running")]


def test_nothing_is_called_where_the_machine_cannot_come(
    sites: tuple[Site, Site], make_site: MakeSite, tmp_path: Path
) -> None:
    a, _ = sites
    small = make_site("small", ram_bytes=8 << 20, config=CONFIG)
    a.qmp.execute("migrate", {"uri": small.address})
    wait_status(a, {"failed"})
    assert calls(small, tmp_path) == []
    assert calls(a, tmp_path)[-1] == ("save_cleanup", True, "running")


def test_cleanup_comes_after_a_stream_that_broke(sites: tuple[Site, Site], tmp_path: Path) -> None:
    a, b = sites
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: (tmp_path / f"{b.daemon.pid}.jsonl").exists() and calls(b, tmp_path), "B loads")
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    wait_until(lambda: calls(b, tmp_path)[-1][0] == "load_cleanup", "B has cleaned up")
    assert calls(b, tmp_path)[0][0] == "load_setup"
    assert calls(a, tmp_path)[-1] == ("save_cleanup", True, "running")

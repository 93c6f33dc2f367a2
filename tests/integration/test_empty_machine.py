"""A machine in which there is nothing does not migrate; one of in-daemon handlers only does."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.integration.conftest import MakeSite
from tests.support.following import migrate, run_state, wait_status, wait_until

HELD = '[handlers]\nload = ["tests.support.held_device:register"]\n'


def test_nothing_is_not_migrated(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.stop_walker()
    wait_until(lambda: not a.qmp.execute("x-migrated-query-machine")["blocks"], "the walker's memory is gone")
    with pytest.raises(CommandError, match=r"no RAM block and no device here\. Next: start its workload"):
        a.qmp.execute("migrate", {"uri": b.address})
    assert "status" not in a.qmp.execute("query-migrate")
    assert (run_state(a), run_state(b)) == ("running", "inmigrate")
    a.start_walker()
    a.wait_event("running")
    migrate(a, b)


def test_handlers_alone_are_a_machine(make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELD_DEVICE", str(tmp_path))
    a, b = make_site("A", module="", config=HELD), make_site("B", module="", config=HELD)
    a.qmp.execute("cont")
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"completed"})
    assert (run_state(a), run_state(b)) == ("postmigrate", "running")

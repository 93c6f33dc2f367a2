"""A snapshot is a migration stream: a real QEMU 7.2 without a machine loads one of a machine without devices."""

from __future__ import annotations

import pytest

from tests.interop.conftest import SIZE, content
from tests.support.holding_site import MakeSite
from tests.support.jobs import run_job
from tests.support.qemu import BLOCK, MakeQemu


@pytest.mark.parametrize("run_state", ["running", "paused"])
def test_a_qemu_loads_it(make_site: MakeSite, make_qemu: MakeQemu, run_state: str) -> None:
    source = make_site("source", incoming=None)
    source.wait_event("running")
    source.poke(BLOCK, 0, content(1))
    if run_state == "paused":
        source.qmp.execute("stop")
    run_job(source.qmp, "snapshot-save", "one")
    assert source.run_state() == run_state
    stream = source.directory / "state" / "snapshots" / "one" / "stream"
    target = make_qemu("target", incoming=f"exec:cat {stream}", ram=content(9))
    target.wait_status({"completed"})
    assert target.ram() == content(1)
    assert target.run_state() == run_state
    assert not target.said()


def test_what_a_qemu_saved_is_not_mistaken_for_a_snapshot(make_site: MakeSite, make_qemu: MakeQemu) -> None:
    """It has no manifest; as a stream it is loaded all the same."""
    source = make_qemu("source", ram=content(3), stopped=True)
    target = make_site("target", incoming="defer")
    shelf = target.directory / "state" / "snapshots" / "foreign"
    shelf.mkdir(parents=True)
    source.migrate(f"exec:cat > {shelf}/stream")
    (listed,) = target.qmp.execute("x-migrated-query-snapshots")
    assert listed["error"].startswith("the manifest cannot be read")
    target.qmp.execute("migrate-incoming", {"uri": f"file:{shelf}/stream"})
    target.wait_status("completed")
    assert target.peek(BLOCK) == content(3)
    assert len(target.peek(BLOCK)) == SIZE

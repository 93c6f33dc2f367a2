"""A real QEMU 7.2 is the destination: it gets all memory, and no machine that it cannot run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.interop.conftest import SIZE, content, with_content
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.qemu import BLOCK, MakeQemu, Qemu

SLOW_BPS = 1 << 20


@pytest.fixture
def target(make_qemu: MakeQemu) -> Qemu:
    return make_qemu("target", incoming="defer", ram=content(9))


@pytest.fixture
def source(make_site: MakeSite) -> HoldingSite:
    """A daemon whose machine runs, with content in its memory."""
    return with_content(make_site("source", incoming=None))


def assert_runs_on(site: HoldingSite) -> None:
    assert site.run_state() == "running"
    assert site.query()["x-migrated-outcome"] == "source-owns"
    assert site.peek(BLOCK) == content(1)


@pytest.mark.parametrize("run_state", ["running", "paused"])
def test_memory_arrives_and_the_run_state_is_followed(run_state: str, source: HoldingSite, target: Qemu) -> None:
    if run_state == "paused":
        source.qmp.execute("stop")
    target.events()
    ours = source.migrate(target.listen())
    theirs = target.wait_status({"completed"})
    assert target.ram() == content(1)
    assert (source.run_state(), target.run_state()) == ("postmigrate", run_state)
    assert ours["x-migrated-peer"]["kind"] == "qemu"
    assert ours["x-migrated-outcome"] == "destination-owns"
    assert ours["ram"]["total"] == SIZE
    assert ours["ram"]["remaining"] == 0
    assert theirs["status"] == "completed"
    assert not target.said(), "a QEMU says something only when something is wrong"
    seen = [event["data"]["status"] for event in target.events() if event["event"] == "MIGRATION"]
    assert seen == ["setup", "active", "completed"]
    if run_state == "running":
        source.wait_event("moved")


def test_memory_that_changes_on_the_way_arrives_as_it_was_last(source: HoldingSite, target: Qemu) -> None:
    source.parameter("max-bandwidth", SLOW_BPS)
    source.parameter("downtime-limit", 1)
    source.qmp.execute("migrate", {"uri": target.listen()})
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > SLOW_BPS // 4, "some pages were sent")
    source.poke(BLOCK, 0, content(2, SIZE // 2))
    source.parameter("max-bandwidth", 0)
    source.wait_status("completed")
    target.wait_status({"completed"})
    assert target.ram() == content(2, SIZE // 2) + content(1)[SIZE // 2 :]


def test_a_machine_with_devices_is_refused_up_front(make_site: MakeSite, target: Qemu) -> None:
    source = with_content(make_site("source", incoming=None, devices={"disk": 16, "clock": 8}))
    refused = source.migrate(target.listen(), "failed")
    assert "is a QEMU, and a QEMU exits on sections it does not know: disk/0, clock/0" in refused["error-desc"]
    assert_runs_on(source)
    assert target.ram() == content(9), "not a page was sent"


@pytest.mark.parametrize("problem", ["machine type", "block size", "block name"])
def test_a_qemu_that_does_not_fit_ends_and_the_machine_goes_on(
    problem: str, make_site: MakeSite, make_qemu: MakeQemu
) -> None:
    every: dict[str, dict[str, Any]] = {
        "machine type": {"machine_type": "pc-q35-7.2"},
        "block size": {"blocks": {BLOCK: SIZE * 2}},
        "block name": {"blocks": {BLOCK: SIZE, "other": SIZE}},
    }
    source = with_content(make_site("source", incoming=None, **every[problem]))
    if problem == "block size":
        source.poke(BLOCK, SIZE, content(1))
    source.parameter("max-bandwidth", SLOW_BPS)
    target = make_qemu("target", incoming="defer")
    refused = source.migrate(target.listen(), "failed")
    assert target.wait_exit() == 1
    assert {
        "machine type": "Machine type received is 'pc-q35-7.2' and local is 'none'",
        "block size": f"Size mismatch: {BLOCK}: {SIZE * 2:#x} != {SIZE:#x}: Invalid argument",
        "block name": 'Unknown ramblock "other", cannot accept migration',
    }[problem] in target.said()
    assert refused["error-desc"]
    assert source.run_state() == "running"
    assert refused["x-migrated-outcome"] == "source-owns"
    assert source.peek(BLOCK)[:SIZE] == content(1)


def test_cancel_and_once_more(source: HoldingSite, make_qemu: MakeQemu) -> None:
    first, second = (make_qemu(name, incoming="defer") for name in ("first", "second"))
    source.parameter("max-bandwidth", SLOW_BPS)
    source.qmp.execute("migrate", {"uri": first.listen()})
    source.wait_status("active")
    source.qmp.execute("migrate_cancel")
    source.wait_status("cancelled")
    assert_runs_on(source)
    first.wait_exit()
    source.parameter("max-bandwidth", 0)
    source.migrate(second.listen())
    second.wait_status({"completed"})
    assert second.ram() == content(1)


def test_a_qemu_that_dies_on_the_way(source: HoldingSite, target: Qemu) -> None:
    source.parameter("max-bandwidth", SLOW_BPS)
    source.qmp.execute("migrate", {"uri": target.listen()})
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > 4096, "pages were sent")
    target.process.kill()
    assert source.wait_status("failed")["error-desc"]
    assert_runs_on(source)

"""A real QEMU 7.2 is the source: its memory arrives byte for byte, and its machine runs at exactly one place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.errors import CommandError
from tests.interop.conftest import MIB, SIZE, content
from tests.support.dissect import dissect
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.proxy import Proxy
from tests.support.qemu import BLOCK, MakeQemu, Qemu

#: The one PONG a QEMU source gets is this long; what comes behind it is SHUT.
PONG_BYTES = 8
#: More than the sockets of a connection can hold, so that a source without return path notices a refusal.
BEYOND_BUFFERS = 64 * MIB


def with_return_path(qemu: Qemu) -> Qemu:
    qemu.capability("return-path")
    return qemu


@pytest.fixture
def source(make_qemu: MakeQemu) -> Qemu:
    return with_return_path(make_qemu("source", ram=content(1)))


def assert_runs_on(qemu: Qemu, run_state: str = "running") -> None:
    assert qemu.run_state() == run_state
    assert qemu.process.poll() is None


@pytest.mark.parametrize("run_state", ["running", "paused", "prelaunch"])
def test_memory_arrives_and_the_run_state_is_followed(run_state: str, make_qemu: MakeQemu, make_site: MakeSite) -> None:
    source = with_return_path(make_qemu("source", ram=content(2), stopped=run_state == "prelaunch"))
    if run_state == "paused":
        source.qmp.execute("stop")
    site = make_site("site")
    source.events()
    theirs = source.migrate(site.address)
    ours = site.wait_status("completed")
    assert site.peek(BLOCK) == source.ram() == content(2)
    assert (source.run_state(), site.run_state()) == ("postmigrate", run_state)
    assert theirs["ram"]["total"] == ours["ram"]["total"] == SIZE
    assert ours["ram"]["normal"] + ours["ram"]["duplicate"] >= SIZE // 4096
    assert ours["x-migrated-peer"]["kind"] == "qemu"
    assert site.qmp.execute("x-migrated-query-ownership")["record"] == "owner"
    seen = [event["data"]["status"] for event in source.events() if event["event"] == "MIGRATION"]
    assert seen == ["setup", "active", "completed"]
    if run_state == "running":
        site.wait_event("running")
    else:
        site.qmp.execute("cont")
        site.wait_event("running")


def test_without_a_return_path_it_is_refused_and_goes_on(make_qemu: MakeQemu, make_site: MakeSite) -> None:
    source = make_qemu("source", size=BEYOND_BUFFERS, ram=content(3, MIB) * (BEYOND_BUFFERS // MIB))
    source.parameter("max-bandwidth", 0)
    site = make_site("site", blocks={BLOCK: BEYOND_BUFFERS})
    source.migrate(site.address, ("failed",))
    assert_runs_on(source)
    refused = site.wait_status("failed")
    assert "did not open a return path" in refused["error-desc"]
    assert "expected OPEN_RETURN_PATH (capability return-path on a QEMU source)" in refused["error-desc"]
    assert "x-migrated-allow-no-return-path" in refused["error-desc"]
    assert site.run_state() == "inmigrate"
    with_return_path(source).migrate(site.address)
    assert site.wait_status("completed")
    assert site.run_state() == "running"


def test_without_a_return_path_where_the_operator_allows_it(make_qemu: MakeQemu, make_site: MakeSite) -> None:
    source = make_qemu("source", ram=content(4))
    site = make_site("site", parameters={"x-migrated-allow-no-return-path": True})
    source.migrate(site.address)
    site.wait_status("completed")
    assert site.peek(BLOCK) == source.ram() == content(4)
    assert site.run_state() == "running"


def test_over_a_unix_socket(source: Qemu, make_site: MakeSite, tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/incoming"
    site = make_site("site", incoming=path)
    source.migrate(path)
    site.wait_status("completed")
    assert site.peek(BLOCK) == content(1)


@pytest.mark.parametrize("where", ["ram", "configuration"])
def test_a_refused_machine_goes_on_at_the_source(where: str, source: Qemu, make_site: MakeSite) -> None:
    wrong: dict[str, Any] = {"ram": {"blocks": {BLOCK: SIZE * 2}}, "configuration": {"machine_type": "other"}}
    site = make_site("wrong", **wrong[where])
    source.migrate(site.address, ("failed",))
    assert_runs_on(source)
    refused = site.wait_status("failed")["error-desc"]
    if where == "ram":
        assert f"Size mismatch: {BLOCK}: {SIZE:#x} != {SIZE * 2:#x}: Invalid argument" in refused
    else:
        assert "Machine type received is 'none' and local is 'other'" in refused
    assert f"section {where}" in refused
    assert site.run_state() == "inmigrate"
    right = make_site("right")
    source.migrate(right.address)
    right.wait_status("completed")
    assert right.peek(BLOCK) == content(1)


def test_a_block_nobody_declared_is_refused(source: Qemu, make_site: MakeSite) -> None:
    site = make_site("site", blocks={"other": SIZE}, attach_timeout_s=0)
    source.migrate(site.address, ("failed",))
    assert_runs_on(source)
    assert BLOCK in site.wait_status("failed")["error-desc"]


def test_a_missing_device_is_refused(source: Qemu, make_site: MakeSite) -> None:
    site = make_site("site", devices={"disk": 16})
    source.migrate(site.address, ("failed",))
    assert_runs_on(source)
    assert "the stream ended without the state of disk/0" in site.wait_status("failed")["error-desc"]
    assert site.run_state() == "inmigrate"


@pytest.fixture
def held(source: Qemu, make_site: MakeSite) -> Iterator[tuple[HoldingSite, Proxy]]:
    """A site that has everything and has sent SHUT 0, which did not get through yet."""
    site = make_site("site")
    with Proxy(("127.0.0.1", site.port)) as link:
        link.backward.limit, link.backward.at_limit = PONG_BYTES, "stall"
        source.qmp.execute("migrate", {"uri": link.uri})
        wait_until(lambda: site.qmp.execute("x-migrated-query-ownership")["record"] == "accepted", "SHUT 0 sent")
        yield site, link


def test_a_qemu_completes_only_after_shut(source: Qemu, held: tuple[HoldingSite, Proxy]) -> None:
    site, link = held
    assert source.query()["status"] == "active"
    assert source.run_state() == "finish-migrate"
    assert site.run_state() == "inmigrate"
    with pytest.raises(CommandError, match="Migration is not finalized yet"):
        site.qmp.execute("cont")
    link.resume()
    assert source.wait_status({"completed"})
    site.wait_status("completed")
    assert (source.run_state(), site.run_state()) == ("postmigrate", "running")
    assert site.peek(BLOCK) == content(1)


def test_a_lost_shut_leaves_the_machine_at_the_source(source: Qemu, held: tuple[HoldingSite, Proxy]) -> None:
    site, link = held
    link.cut()
    source.wait_status({"failed"})
    assert_runs_on(source)
    error = site.wait_status("failed")["error-desc"]
    assert "the outcome is unknown" in error
    assert "migratectl resolve" in error
    with pytest.raises(CommandError, match="the outcome is unknown"):
        site.qmp.execute("cont")
    assert site.run_state() != "running"
    site.qmp.execute("x-migrated-resolve", {"peer-is-running": True})
    assert site.run_state() == "postmigrate"


def test_there_and_on_to_another_qemu(source: Qemu, make_site: MakeSite, make_qemu: MakeQemu) -> None:
    site, target = make_site("site"), make_qemu("target", incoming="defer")
    source.migrate(site.address)
    site.wait_status("completed")
    site.wait_event("running")
    site.migrate(target.listen())
    target.wait_status({"completed"})
    assert source.ram() == target.ram() == content(1)
    assert (source.run_state(), site.run_state(), target.run_state()) == ("postmigrate", "postmigrate", "running")
    assert "Warning" not in target.said()


def test_a_captured_qemu_goes_in_and_out_again_as_it_was(
    make_qemu: MakeQemu, make_site: MakeSite, tmp_path: Path
) -> None:
    """What the daemon does not understand of a machine it keeps as it came; the run state, too."""
    source = make_qemu("source", ram=content(5), stopped=True)
    source.migrate(f"exec:cat > {tmp_path}/in")
    site = make_site("site", incoming=f"exec:cat {tmp_path}/in")
    site.wait_status("completed")
    assert site.run_state() == "prelaunch"
    site.migrate(f"file:{tmp_path}/out")
    came, went = dissect((tmp_path / "in").read_bytes()), dissect((tmp_path / "out").read_bytes())
    assert went.memory == came.memory == {BLOCK: content(5)}
    assert {s.idstr: (s.version, s.body) for s in went.devices()} == {
        s.idstr: (s.version, s.body) for s in came.devices()
    }

"""A real QEMU 7.2 whose memory is in huge pages of 2 MiB, as source and as destination of blocks in huge pages here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.interop.conftest import MIB, content
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.huge_pages import huge_bytes_of, huge_pages
from tests.support.qemu import BLOCK, MakeQemu, Qemu

SIZE = 8 * MIB
HUGE = 2 * MIB
#: All sorts of pages, zeros, and a huge page that is zero but for one byte.
MEMORY = content(1, 2 * HUGE) + bytes(HUGE) + bytes(HUGE - 1) + b"\1"
#: Precopy would take minutes with this, so that it never ends by itself.
SLOW_BPS = 64 << 10


@pytest.fixture(autouse=True)
def reserved() -> Iterator[None]:
    with huge_pages(3 * SIZE // HUGE):
        yield


@pytest.fixture
def source(make_site: MakeSite) -> HoldingSite:
    """A daemon whose machine runs, with MEMORY."""
    site = make_site("source", incoming=None, blocks={BLOCK: SIZE}, huge_pages=True)
    site.wait_event("running")
    site.poke(BLOCK, 0, MEMORY)
    return site


@pytest.fixture
def between(source: HoldingSite, make_qemu: MakeQemu) -> Qemu:
    """A QEMU whose machine runs, with MEMORY: it came by precopy."""
    qemu = make_qemu("between", size=SIZE, incoming="defer", memory="huge")
    source.migrate(qemu.listen())
    qemu.wait_status({"completed"})
    assert qemu.dump() == MEMORY
    qemu.capability("return-path")
    return qemu


@pytest.fixture
def target(make_site: MakeSite) -> HoldingSite:
    return make_site("target", blocks={BLOCK: SIZE}, huge_pages=True)


def in_huge_pages(site: HoldingSite) -> int:
    return huge_bytes_of(site.holder.pid)


def test_precopy_there_and_back(between: Qemu, target: HoldingSite) -> None:
    assert huge_bytes_of(between.process.pid) > 0
    between.migrate(target.address)
    target.wait_status("completed")
    assert target.peek(BLOCK) == MEMORY
    assert in_huge_pages(target) == SIZE


def prepare(preempt: bool, *ends: HoldingSite | Qemu) -> None:
    for end in ends:
        end.capability("postcopy-ram")
        end.capability("postcopy-preempt", state=preempt)


@pytest.mark.parametrize("preempt", [False, True])
def test_postcopy_from_a_qemu(between: Qemu, target: HoldingSite, preempt: bool) -> None:
    prepare(preempt, between, target)
    between.parameter("downtime-limit", 1)
    between.parameter("max-bandwidth", SLOW_BPS)
    between.parameter("max-postcopy-bandwidth", SLOW_BPS)
    between.qmp.execute("migrate", {"uri": target.address})
    between.wait_status({"active"})
    between.qmp.execute("migrate-start-postcopy")
    between.wait_status({"postcopy-active"})
    target.wait_event("running")
    target.begin("peek", block=BLOCK, offset=SIZE - 16, length=16)
    assert bytes.fromhex(target.wait_event("did")["hex"]) == MEMORY[-16:]
    assert between.query()["ram"]["postcopy-requests"] >= 1
    between.parameter("max-postcopy-bandwidth", 0)
    target.wait_status("completed")
    between.wait_status({"completed"})
    assert target.peek(BLOCK) == MEMORY
    assert in_huge_pages(target) == SIZE


@pytest.mark.parametrize("preempt", [False, True])
def test_postcopy_to_a_qemu(source: HoldingSite, make_qemu: MakeQemu, preempt: bool) -> None:
    target = make_qemu("target", size=SIZE, incoming="defer", memory="huge")
    prepare(preempt, source, target)
    for name, value in (("downtime-limit", 1), ("max-bandwidth", SLOW_BPS), ("max-postcopy-bandwidth", SLOW_BPS)):
        source.parameter(name, value)
    source.qmp.execute("migrate", {"uri": target.listen()})
    source.qmp.execute("migrate-start-postcopy")
    wait_until(lambda: source.query().get("x-migrated-outcome") == "destination-owns", "the QEMU runs it")
    oob = target.oob()
    path = target.directory / "tail"
    oob.finish(oob.start("pmemsave", {"val": SIZE - 16, "size": 16, "filename": str(path)}))
    assert path.read_bytes() == MEMORY[-16:]
    assert source.query()["ram"]["postcopy-requests"] >= 1
    source.parameter("max-postcopy-bandwidth", 0)
    source.wait_status("completed")
    target.wait_status({"completed"})
    assert target.dump() == MEMORY
    assert huge_bytes_of(target.process.pid) > 0
    assert not target.said()


def test_postcopy_after_a_pass_to_a_qemu(source: HoldingSite, make_qemu: MakeQemu) -> None:
    """Parts of huge pages that were sent, and are dropped again with the rest."""
    target = make_qemu("target", size=SIZE, incoming="defer", memory="huge")
    prepare(False, source, target)
    source.parameter("downtime-limit", 1)
    source.parameter("max-bandwidth", SIZE)
    source.qmp.execute("migrate", {"uri": target.listen()})
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > HUGE // 2, "the beginning was sent")
    source.parameter("max-bandwidth", SLOW_BPS)
    source.poke(BLOCK, 5, b"new")
    source.qmp.execute("migrate-start-postcopy")
    source.wait_status("completed")
    target.wait_status({"completed"})
    assert target.dump() == MEMORY[:5] + b"new" + MEMORY[8:]
    assert not target.said()


Make = Callable[..., HoldingSite]


@pytest.mark.parametrize("there", [True, False], ids=["huge pages there", "huge pages here"])
def test_other_pages_are_refused_by_name_and_the_machine_goes_on(
    there: bool, make_qemu: MakeQemu, make_site: Make
) -> None:
    source = make_qemu("source", size=SIZE, memory="huge" if there else "file")
    site = make_site("site", blocks={BLOCK: SIZE}, huge_pages=not there)
    for name in ("return-path", "postcopy-ram"):
        source.capability(name)
    site.capability("postcopy-ram")
    source.migrate(site.address, ("failed",))
    assert source.run_state() == "running"
    sizes = (4096, HUGE) if there else (HUGE, 4096)
    error = site.wait_status("failed")["error-desc"]
    assert f"Mismatched RAM page size {BLOCK} (local) {sizes[0]} != {sizes[1]}" in error

"""A PC of a real QEMU visits a host that knows none of its devices, and goes on at another QEMU with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.conftest import MIB
from tests.support import qemu
from tests.support.dissect import dissect
from tests.support.following import wait_until
from tests.support.holding_site import MakeSite
from tests.support.proxy import Proxy
from tests.support.qemu import Qemu

MACHINE = "pc-i440fx-7.2"
KEEP = {"x-migrated-keep-unknown-sections": True}


class Pc(Qemu):
    """A QEMU with a PC, whose firmware runs."""

    def _ram_arguments(self) -> list[str]:
        return ["-M", MACHINE]


@pytest.fixture
def pcs(tmp_path: Path) -> Iterator[tuple[Pc, Pc]]:
    """One that runs, and one that waits for it."""
    if qemu.PROGRAM is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    with (
        Pc("source", tmp_path, size=16 * MIB, memory="default") as source,
        Pc("target", tmp_path, size=16 * MIB, memory="default", incoming="defer") as target,
    ):
        for one in (source, target):
            one.capability("return-path")
        yield source, target


def blocks_of(source: Pc, path: Path) -> dict[str, int]:
    """Return the PC's RAM blocks, from a stream in a file."""
    source.capability("return-path", state=False)
    source.migrate(f"exec:cat > {path}")
    wait_until(lambda: source.run_state() == "postmigrate", "it may go on")  # which comes behind "completed"
    source.qmp.execute("cont")
    source.capability("return-path")
    return dissect(path.read_bytes()).blocks


def devices(stream: bytes) -> dict[tuple[str, int], tuple[int, bytes]]:
    return {(one.idstr, one.instance): (one.version, one.body) for one in dissect(stream).devices()}


def test_every_section_goes_on_as_it_came(pcs: tuple[Pc, Pc], make_site: MakeSite, tmp_path: Path) -> None:
    source, target = pcs
    site = make_site("site", blocks=blocks_of(source, tmp_path / "pc"), machine_type=MACHINE, parameters=KEEP)
    with Proxy(("127.0.0.1", site.port)) as there:
        there.forward.kept = bytearray()
        source.migrate(there.uri)
        site.wait_status("completed")
        came = devices(there.take_forward())
    assert site.run_state() == "running"
    with Proxy(("127.0.0.1", int(target.listen().rpartition(":")[2]))) as onward:
        onward.forward.kept = bytearray()
        site.migrate(onward.uri)
        target.wait_status({"completed"})
        went = devices(onward.take_forward())
    assert went == came
    assert len(came) > 20
    assert target.run_state() == "running"


def test_without_the_parameter_it_is_refused_by_name(pcs: tuple[Pc, Pc], make_site: MakeSite, tmp_path: Path) -> None:
    source, _ = pcs
    blocks = blocks_of(source, tmp_path / "pc")
    site = make_site("site", blocks=blocks, machine_type=MACHINE, attach_timeout_s=1)
    source.migrate(site.address, ("failed",))
    assert "cpu_common" in site.wait_status("failed")["error-desc"]
    assert source.run_state() == "running"

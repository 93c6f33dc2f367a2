"""What is sent again is sent as what is new in it: between two daemons, and with a real QEMU 7.2 at either end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from tests.bench.boot_sector import write_floppy
from tests.integration.conftest import MIB, MakePager, make_pager, pager_program
from tests.integration.test_pager import assert_sound, start_pair
from tests.integration.test_workloads import memory_of
from tests.interop.test_kept_sections import KEEP, MACHINE, Pc, blocks_of
from tests.support import qemu
from tests.support.following import assert_moved, wait_status, wait_until
from tests.support.holding_site import MakeSite
from tests.support.qemu import MakeQemu

__all__ = ["make_pager", "pager_program"]  # fixtures

RAM_BYTES = 8 * MIB
ENOUGH_BYTES = 1000


def send_deltas(source: Site, uri: str, cache_bytes: int = 64 * MIB) -> dict[str, Any]:
    """Migrate, slowly until deltas are sent; return query-migrate's last answer."""
    source.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle", "state": True}]})
    parameters = {"xbzrle-cache-size": cache_bytes, "max-bandwidth": RAM_BYTES, "downtime-limit": 1}
    source.qmp.execute("migrate-set-parameters", parameters)
    source.qmp.execute("migrate", {"uri": uri})
    wait_until(lambda: delta_bytes(source.qmp.execute("query-migrate")) > ENOUGH_BYTES, "deltas are sent")
    source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 10_000})
    figures = wait_status(source, {"completed"})
    cache = figures["xbzrle-cache"]
    assert cache["pages"] > 0
    assert cache["encoding-rate"] > 10
    assert cache["cache-size"] == cache_bytes
    return figures


def delta_bytes(figures: dict[str, Any]) -> int:
    found: int = figures.get("xbzrle-cache", {}).get("bytes", 0)
    return found


@pytest.mark.parametrize("cache_bytes", [64 * MIB, 2 * MIB])
def test_between_two_daemons(make_pager: MakePager, cache_bytes: int) -> None:
    a, b = start_pair(make_pager, ram_bytes=RAM_BYTES, rate=5000, pattern="random")
    send_deltas(a, b.address, cache_bytes)
    assert_moved(a, b)
    assert_sound(b)


def test_to_a_qemu(make_pager: MakePager, make_qemu: MakeQemu) -> None:
    target = make_qemu("target", incoming="defer", size=RAM_BYTES, block="heap")
    source = make_pager("A", ram_bytes=RAM_BYTES, rate=5000, pattern="random")
    source.run()
    send_deltas(source, target.listen())
    target.wait_status({"completed"})
    assert source.wait_event("moved")["invariant"]
    assert target.ram() == memory_of(source)
    assert not target.said(), "a QEMU says something only when something is wrong"


@pytest.mark.skipif(qemu.PROGRAM is None, reason="qemu-system-x86_64 is not installed")
def test_from_a_qemu(tmp_path: Path, make_site: MakeSite) -> None:
    floppy = tmp_path / "walk.img"
    write_floppy(floppy, RAM_BYTES)
    arguments = ["-drive", f"if=floppy,file={floppy},format=raw,readonly=on", "-boot", "a"]
    with Pc("source", tmp_path, size=32 * MIB, memory="default", arguments=arguments) as source:
        source.capability("return-path")
        site = make_site("site", blocks=blocks_of(source, tmp_path / "pc"), machine_type=MACHINE, parameters=KEEP)
        source.capability("xbzrle")
        source.parameter("max-bandwidth", 2 * RAM_BYTES)
        source.parameter("downtime-limit", 1)
        source.qmp.execute("migrate", {"uri": site.address})
        wait_until(lambda: delta_bytes(source.query()) > ENOUGH_BYTES, "deltas are sent")
        source.parameter("max-bandwidth", 0)
        source.parameter("downtime-limit", 60_000)
        source.wait_status({"completed"})
        site.wait_status("completed")
        assert site.peek("pc.ram") == source.dump()

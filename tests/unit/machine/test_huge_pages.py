"""Blocks in huge pages, as workloads declare them: with enough of them, without, and together."""

from __future__ import annotations

from pathlib import Path

from migrated.kernel.huge_pages import HUGE_PAGE_SIZE
from tests.support.attached import Site, workload
from tests.support.huge_pages import huge_pages

SIZE = 4 * HUGE_PAGE_SIZE

ASKS = f"""
with attach(name="asks") as machine:
    try:
        machine.ram("heap", {SIZE}, huge_pages=True)
    except Exception as error:
        say([type(error).__name__, str(error)])
    try:
        machine.ram("heap", 4096, huge_pages=True)
    except ValueError as error:
        say(str(error))
    machine.ram("heap", {SIZE})[:2] = b"ok"
    machine.ready()
    say("ready")
    hear()
"""
OWNS = f"""
with attach(name="owns") as machine:
    machine.ram("heap", {SIZE}, huge_pages=True)
    machine.ready()
    say("ready")
    hear()
"""
SHARES = """
with attach(name="shares") as machine:
    machine.ram("heap")[-3:] = b"abc"
    machine.ready()
    say("ready")
    hear()
"""


async def test_who_gets_none_is_told_what_to_do_and_can_do_without(tmp_path: Path) -> None:
    with huge_pages(3):
        async with Site(tmp_path) as site, workload(site, ASKS) as process:
            kind, text = await process.said()
            assert kind == "KernelError"
            assert f"not enough huge pages of 2 MiB for memory of {SIZE} bytes: expected 4, found 3 free" in text
            assert "Next: raise vm.nr_hugepages" in text
            assert await process.said() == f"the size of a RAM block must be a multiple of {HUGE_PAGE_SIZE}, not 4096"
            assert await process.said() == "ready"
            (block,) = site.machine.ram_blocks()
            assert (block.page_size, block.size_bytes) == (4096, SIZE)


async def test_processes_share_a_block_in_huge_pages(tmp_path: Path) -> None:
    with huge_pages(4):
        async with Site(tmp_path) as site, workload(site, OWNS) as owner:
            assert await owner.said() == "ready"
            async with workload(site, SHARES) as other:
                assert await other.said() == "ready"
                (block,) = site.machine.ram_blocks()
                assert (block.page_size, len(block.mappings)) == (HUGE_PAGE_SIZE, 2)
                assert block.pages.shape == (SIZE // 4096, 4096)
                assert bytes(block.pages[-1, -3:]) == b"abc"

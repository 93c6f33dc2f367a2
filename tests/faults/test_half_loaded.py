"""A machine that arrived only in part never runs, whenever it is asked to."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from migrated.wire.command import Command, encode_command
from migrated.wire.ram_encoder import encode_block_list
from migrated.wire.section import (
    Configuration,
    SectionHeader,
    SectionType,
    encode_configuration,
    encode_footer,
    encode_section_header,
    encode_stream_header,
)
from tests.faults.conftest import HELD
from tests.integration.conftest import MakeSite
from tests.support.following import assert_still_runs, run_state, wait_status, wait_until

HEAP_BYTES = 16 << 20


def broken_stream() -> bytes:
    """Announce the blocks, and then talk nonsense."""
    section = encode_section_header(SectionHeader(SectionType.START, 0, "ram", 0, 4))
    return b"".join(
        [
            encode_stream_header(),
            encode_configuration(Configuration("none")),
            encode_command(Command.OPEN_RETURN_PATH),
            section + encode_block_list([("heap", HEAP_BYTES)]) + encode_footer(0),
            b"\xff" * 64,
        ]
    )


def test_not_while_the_refused_source_is_still_listened_to(make_site: MakeSite) -> None:
    b = make_site("B")
    host, port = b.address.removeprefix("tcp:").rsplit(":", 1)
    with socket.create_connection((host, int(port))) as source:
        source.sendall(broken_stream())
        wait_status(b, {"failed"})
        # The source has not closed yet, so the load is still being wound up.
        with pytest.raises(CommandError, match=r"loaded only in part|not finalized yet"):
            b.qmp.execute("cont")
    wait_until(lambda: run_state(b) == "inmigrate", "B waits")
    with pytest.raises(CommandError, match="loaded only in part"):
        b.qmp.execute("cont")


@pytest.mark.row(12)
def test_a_paused_machine_whose_twin_died_stays_at_the_source(held_pair: tuple[Site, Site], hold: Path) -> None:
    a, b = held_pair
    a.qmp.execute("stop")
    (hold / "hold-load").touch()
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until((hold / "loading").exists, "B loads")
    b.walker.kill()
    wait_until(lambda: b.qmp.execute("x-migrated-query-machine")["workloads"] == [], "B noticed")
    (hold / "hold-load").unlink()
    figures = wait_status(a, {"failed", "completed"})
    assert figures["x-migrated-outcome"] == "source-owns"
    assert "walker-B" in figures["error-desc"]
    a.qmp.execute("cont")
    assert_still_runs(a)


def test_nor_does_one_that_has_nothing_but_memory(make_site: MakeSite, hold: Path) -> None:
    options = {"config": HELD, "module": "tests.support.misbehave", "walker_arguments": ["--mode", "signal"]}
    a, b = make_site("A", **options), make_site("B", **options)
    a.qmp.execute("cont")
    a.wait_event("running")
    a.qmp.execute("stop")
    (hold / "hold-load").touch()
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until((hold / "loading").exists, "B loads")
    b.walker.kill()
    wait_until(lambda: b.qmp.execute("x-migrated-query-machine")["workloads"] == [], "B noticed")
    (hold / "hold-load").unlink()
    figures = wait_status(a, {"failed", "completed"})
    assert figures["x-migrated-outcome"] == "source-owns"
    assert "walker-B" in figures["error-desc"]

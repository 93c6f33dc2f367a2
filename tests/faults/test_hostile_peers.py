"""Whatever comes to a listening daemon is refused with the reason, and a good machine is taken in right afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from migrated.errors import CommandError
from tests.support import craft
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite
from tests.support.hostile import BLOCKS, CASES, DEVICES, LEAD, MEMORY, RAM, Case
from tests.support.target import PONG_BYTES, TOLD_NO, TOLD_YES, Target
from tests.support.visit import PONG, REASON, Visit, visit

#: What a single migration has for its stream; a hundred of them are kept where one is forgotten.
BUFFERS_BYTES = 3 << 19


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory: Path = tmp_path_factory.mktemp("hostile")
    devices = {name: len(state) for name, state in DEVICES.items()}
    with HoldingSite("site", directory, blocks=BLOCKS, devices=devices, attach_timeout_s=0.05) as site:
        target = Target(site)
        target.settle()
        yield target


@pytest.mark.row(22)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_stream_is_refused_by_name(case: Case, target: Target) -> None:
    answers = visit(target.port, case.stream, end=True)
    refusal = target.refusal()
    for text in case.says:
        assert text in refusal
    if case.told:
        assert answers[-1] == TOLD_NO
    else:
        assert TOLD_NO not in answers
    target.takes_a_machine()


PIECES = craft.machine(MEMORY, DEVICES)
STREAM = craft.join(PIECES)


def cuts() -> list[int]:
    """Every border between elements, one byte to each side of it, and some places in between."""
    found = {0, *(border + i for border in craft.borders(PIECES) for i in (-1, 0, 1))}
    found.update(random.Random(2).sample(range(len(STREAM)), 24))
    return sorted(cut for cut in found if cut < len(STREAM))


@pytest.mark.row(26)
def test_a_stream_cut_anywhere_is_refused(target: Target) -> None:
    for cut in cuts():
        answers = visit(target.port, STREAM[:cut], end=True)
        assert "the stream ends too early" in target.refusal(), cut
        told = cut >= len(craft.join(PIECES[:3]))
        assert answers[-1:] == [TOLD_NO] if told else not answers, cut
    target.takes_a_machine()


@pytest.mark.row(22, 26)
def test_a_reset_anywhere_is_refused(target: Target) -> None:
    for cut in craft.borders(PIECES)[3:-1]:
        with Visit(target.port) as peer:
            peer.say(STREAM[:cut])
            peer.hear_exactly(PONG_BYTES)
            peer.reset()
        assert "Connection reset" in target.refusal()
    target.takes_a_machine()


def test_a_migrated_source_is_told_why(target: Target) -> None:
    stream = craft.join(craft.machine(MEMORY, DEVICES, ping_value=craft.OUR_PING)[:4]) + craft.ram_part(b"", 2, 77)
    *pongs, reason, shut = visit(target.port, stream, end=True)
    assert [kind for kind, _ in pongs] == [PONG, PONG, PONG]
    assert shut == TOLD_NO
    assert reason[0] == REASON
    assert reason[1].decode() == target.refusal()
    assert "Unknown savevm section 77" in target.refusal()
    target.takes_a_machine()


def test_bytes_behind_a_whole_machine_leave_its_outcome_open(target: Target) -> None:
    """SHUT 0 is out, and a QEMU never goes on after its description: nobody may guess what the source does now."""
    site = target.site
    with Visit(target.port) as peer:
        peer.say(STREAM)
        peer.hear()
        peer.say(b"more")
        wait_until(lambda: site.query()["status"] == "failed", "noticed")
    failed = site.wait_status("failed")
    assert "the source goes on sending after SHUT 0, expected end of stream" in failed["error-desc"]
    assert "the outcome is unknown" in failed["error-desc"]
    assert site.run_state() == "inmigrate"
    with pytest.raises(CommandError, match="the outcome is unknown"):
        site.qmp.execute("cont")
    visit(target.port, STREAM, end=True)
    assert "cannot take a machine in: the outcome is unknown" in site.wait_status("failed")["error-desc"]
    visit(target.port, LEAD + craft.EOF + craft.description(), end=True)
    target.alone()
    assert "without a machine" in site.wait_status("failed")["error-desc"]
    assert site.qmp.execute("x-migrated-query-ownership")["record"] == "accepted"
    site.qmp.execute("x-migrated-resolve", {"peer-is-running": True})
    assert site.run_state() == "postmigrate"
    target.waits_again()
    target.takes_a_machine()


def test_memory_that_was_half_loaded_stays_so(tmp_path: Path) -> None:
    with HoldingSite("fresh", tmp_path, blocks=BLOCKS) as site:
        target = Target(site)
        visit(target.port, LEAD + RAM + craft.ram_part(craft.pages("mem0", b"\xee" * 4096)), end=True)
        target.refusal()
        visit(target.port, b"a stranger", end=True)
        assert "Not a migration stream" in target.refusal()
        with pytest.raises(CommandError, match="loaded only in part"):
            site.qmp.execute("cont")


def test_a_machine_that_runs_here_is_not_overwritten(target: Target) -> None:
    site = target.site
    answers = visit(target.port, STREAM, end=True)
    assert answers[-1] == TOLD_YES
    site.wait_status("completed")
    target.alone()
    other = {name: bytes(len(content)) for name, content in MEMORY.items()}
    for stream in (craft.join(craft.machine(other, DEVICES)), LEAD + craft.EOF + craft.description()):
        assert visit(target.port, stream, end=True)[-1] == TOLD_NO
        target.alone()
        assert {name: site.peek(name) for name in BLOCKS} == MEMORY
        assert site.run_state() == "paused"
    site.qmp.execute("cont")
    assert visit(target.port, STREAM, end=True)[-1] == TOLD_NO
    target.alone()
    assert site.run_state() == "running"
    site.migrate("file:/dev/null")
    site.wait_event("moved")
    target.waits_again()
    target.takes_a_machine()


@pytest.mark.row(22)
def test_refusals_leave_nothing_in_memory(target: Target) -> None:
    """Neither the buffers of a stream nor the error that is remembered, with all that its frames refer to."""
    bad = LEAD + RAM + craft.short_head(craft.PART, craft.RAM_ID) + bytes(8)
    target.hear_out(bad)
    before = target.site.private_bytes()
    for _ in range(100):
        target.hear_out(bad)
    assert target.site.private_bytes() < before + BUFFERS_BYTES
    target.takes_a_machine()


def test_a_second_connection_is_closed_at_once(target: Target) -> None:
    with Visit(target.port) as first:
        first.say(LEAD)
        first.hear_exactly(PONG_BYTES)
        for _ in range(20):
            assert visit(target.port, STREAM) == []
        first.say(STREAM[len(LEAD) :], end=True)
        assert first.hear().endswith(bytes(4))
    target.site.wait_status("completed")
    assert target.site.peek("mem0") == MEMORY["mem0"]
    target.sends_it_away()


@pytest.mark.row(47)
def test_two_hundred_quick_connections(target: Target) -> None:
    generator = random.Random(3)
    for _ in range(200):
        with suppress(ConnectionResetError):  # who comes beside one that just ends is closed with it, perhaps at once
            peer = Visit(target.port)
            peer.say(STREAM[: generator.randrange(200)])
            if generator.random() < 0.5:
                peer.reset()
            else:
                peer.socket.close()
    several = []
    for _ in range(50):
        with suppress(ConnectionResetError):
            several.append(Visit(target.port))
    for peer in several:
        peer.socket.close()
    target.alone()
    assert target.site.run_state() == "inmigrate"
    target.takes_a_machine()


def test_an_operator_is_answered_while_a_peer_floods(target: Target) -> None:
    """Records of alternating kinds give the parser the most to do per byte."""
    record = craft.record(craft.ZERO, "vram", b"\0") + craft.record(craft.ZERO, "mem0", b"\0")
    with Visit(target.port) as peer:
        peer.say(LEAD + RAM + craft.short_head(craft.PART, craft.RAM_ID))
        peer.hear_exactly(PONG_BYTES)
        for _ in range(20):
            peer.say(record * 5000)
            assert target.site.query()["status"] == "active"
        peer.say(b"", end=True)
        peer.hear()
    assert "ends too early" in target.refusal()
    target.takes_a_machine()

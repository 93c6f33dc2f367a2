"""Peers that take their time: whoever keeps a daemon waiting is sent away, and a good machine is taken in afterwards.

Deadlines are configured short; a peer's pace is how long it listens between two bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import craft
from tests.support.holding_site import HoldingSite
from tests.support.hostile import BLOCKS, DEVICES, HEAD, LEAD, MEMORY, RAM, WHOLE_RAM
from tests.support.target import PONG_BYTES, TOLD_NO, TOLD_YES, Target
from tests.support.visit import REASON, Visit, messages, visit

SILENCE_MS = 300
#: Well within the silence a daemon bears.
PACE_S = 0.02
MIGRATED_LEAD = HEAD + craft.open_return_path(craft.OUR_PING)
PART = craft.short_head(craft.PART, craft.RAM_ID)
PAGE_HEAD = craft.record(craft.WHOLE, "mem0")
DEVICE_HEAD = craft.full_head(craft.FULL, craft.DEVICE_ID, "disk", 0, 1) + craft.number(4000, 4)
#: The second where this process did not get its turn for as long; what matters is that it ends.
TOO_SLOW = ("the peer sends too slowly", "the peer sent nothing")
HEADER_TOO_SLOW = ("no complete stream header and configuration within 0.3 s", "the peer sent nothing")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory: Path = tmp_path_factory.mktemp("slow")
    devices = {name: len(state) for name, state in DEVICES.items()}
    parameters = {"x-migrated-silence-timeout": SILENCE_MS}
    with HoldingSite("site", directory, blocks=BLOCKS, devices=devices, parameters=parameters) as site:
        target = Target(site)
        target.settle()
        yield target


@pytest.mark.row(21)
def test_a_header_byte_by_byte(target: Target) -> None:
    long_name = craft.header() + craft.configuration("n" * 255)
    with Visit(target.port) as peer:
        assert peer.drip(long_name, PACE_S) == b""
    assert target.refusal().startswith(HEADER_TOO_SLOW)
    target.takes_a_machine()


@pytest.mark.row(21)
@pytest.mark.parametrize(
    ("lead", "begin", "where"),
    [
        pytest.param(LEAD, RAM + PART + PAGE_HEAD, "section id 2 (PART)", id="page of a qemu"),
        pytest.param(MIGRATED_LEAD, RAM + PART + PAGE_HEAD, "section id 2 (PART)", id="page"),
        pytest.param(
            MIGRATED_LEAD, RAM + PART + craft.record(craft.WHOLE) + b"\xff", "section id 2 (PART)", id="block name"
        ),
        pytest.param(MIGRATED_LEAD, WHOLE_RAM + DEVICE_HEAD, "section disk (FULL)", id="device state"),
        pytest.param(MIGRATED_LEAD, b"\x01" + craft.number(2, 4) + b"\xff", "section between sections", id="idstr"),
        pytest.param(
            MIGRATED_LEAD, b"\x08" + craft.number(craft.PING, 2) + b"\xff\xff", "section between sections", id="command"
        ),
    ],
)
def test_byte_by_byte_within_one_thing(lead: bytes, begin: bytes, where: str, target: Target) -> None:
    with Visit(target.port) as peer:
        peer.say(lead + begin)
        told = list(messages(peer.drip(b"n" * 4000, PACE_S)))
    refusal = target.refusal()
    assert refusal.startswith(TOO_SLOW)
    assert where in refusal
    assert "stream offset" in refusal
    assert told[-1] == TOLD_NO
    if lead is MIGRATED_LEAD:
        assert told[-2] == (REASON, refusal.encode())
    target.takes_a_machine()


@pytest.mark.row(14)
@pytest.mark.parametrize(
    ("begin", "seconds"),
    [
        pytest.param(b"", 0.9, id="before the first section"),
        pytest.param(RAM, 0.9, id="between sections"),
        pytest.param(RAM + PART, 0.3, id="before a record"),
        pytest.param(RAM + PART + PAGE_HEAD + b"x", 0.3, id="within a page"),
        pytest.param(WHOLE_RAM + DEVICE_HEAD, 0.3, id="within a device"),
        pytest.param(WHOLE_RAM + craft.device("disk", DEVICES["disk"]) + craft.EOF, 0.3, id="before the end"),
    ],
)
def test_a_migrated_source_falls_silent(begin: bytes, seconds: float, target: Target) -> None:
    with Visit(target.port) as peer:
        peer.say(MIGRATED_LEAD + begin)
        told = list(messages(peer.hear()))
    refusal = target.refusal()
    assert f"the peer sent nothing for {seconds} s" in refusal
    assert told[-2:] == [(REASON, refusal.encode()), TOLD_NO]
    target.takes_a_machine()


@pytest.mark.row(21)
def test_a_stranger_that_only_pings(target: Target) -> None:
    """Somebody who never sends a section does not keep the daemon from one who does."""
    with Visit(target.port) as peer:
        peer.say(LEAD)
        told = list(messages(peer.drip(craft.ping() * 100_000, PACE_S, step=len(craft.ping()))))
    assert told[-1] == TOLD_NO
    assert "no section within 0.9 s" in target.refusal()
    target.takes_a_machine()


def test_a_qemu_may_be_silent_between_sections(target: Target) -> None:
    """Its dirty pages may be few: what comes late is taken, as long as nobody else could have been meant."""
    stream = craft.join(craft.machine(MEMORY, DEVICES))
    with Visit(target.port) as peer:
        peer.say(stream[: len(LEAD + RAM)])
        peer.hear_exactly(PONG_BYTES)
        assert peer.listen(1.2) is None
        peer.say(stream[len(LEAD + RAM) :], end=True)
        assert peer.hear().endswith(bytes(4))
    target.site.wait_status("completed")
    target.sends_it_away()


@pytest.mark.row(21)
def test_a_machine_behind_somebody_who_says_nothing(target: Target) -> None:
    """Under TLS the connection that was made first may come in last, so it is not the first that counts."""
    with Visit(target.port):
        answers = visit(target.port, craft.join(craft.machine(MEMORY, DEVICES)), end=True)
        assert answers[-1:] == [TOLD_YES]
    target.site.wait_status("completed")
    target.sends_it_away()

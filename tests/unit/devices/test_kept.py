"""Sections that nothing here takes: kept byte for byte, within limits, and sent on."""

from __future__ import annotations

import pytest

from migrated.devices import kept as module
from migrated.devices.kept import KeptSections
from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.section import SectionHeader, SectionType, encode_footer, encode_section_header
from tests.support.channel import MemoryChannel
from tests.unit.savevm.test_registry import Bench

HEADER = SectionHeader(SectionType.FULL, 0x2A, "0000:00:02.0/e1000", 3, 2)
FOOTER = encode_footer(HEADER.section_id)
#: What may stand behind a section: EOF, START, PART, END, FULL, a command.
FOLLOWING = [b"\x00", b"\x01", b"\x02", b"\x03", b"\x04", b"\x08"]


async def keep(
    bench: Bench, body: bytes, kept: KeptSections, header: SectionHeader = HEADER, end: bytes = b"\0"
) -> int:
    """Keep one section; return what the stream has taken."""
    stream = bench.incoming(body + encode_footer(header.section_id) + end)
    async with bench.lock:

        async def take(f: object, header: SectionHeader) -> None:
            assert f is stream
            assert await kept.keep(stream, header, from_qemu=True) == len(body)

        assert await bench.registry.load_state(stream, header, keep=take) == header.idstr
    return stream.offset


BODIES = [
    b"",
    b"x",
    bytes(range(256)) * 9000,
    FOOTER,  # what looks like the footer, and is followed by no element
    FOOTER * 1000,
    b"\x7e" * 5000,
    FOOTER + b"\x05",
    FOOTER[:-1],
    encode_footer(0x2B) + b"\x04",
]


@pytest.mark.parametrize("end", FOLLOWING)
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
async def test_a_section_goes_out_as_it_came(body: bytes, end: bytes) -> None:
    bench = Bench()
    kept = KeptSections(bench.registry)
    assert await keep(bench, body, kept, end=end) == len(body)
    assert kept.describe() == [{"id": HEADER.idstr, "instance-id": 3, "version-id": 2, "size": len(body)}]
    async with bench.lock:
        await bench.registry.save_state(bench.f)
    number = bench.registry.find(HEADER.idstr, 3)
    assert number is not None
    head = SectionHeader(SectionType.FULL, number.section_id, HEADER.idstr, 3, 2)
    assert await bench.sent() == encode_section_header(head) + body + encode_footer(number.section_id)


async def test_what_arrives_byte_by_byte_is_the_same() -> None:
    bench = Bench()
    channel = MemoryChannel(cut=1)
    channel.feed(FOOTER + b"\x7e\0" + FOOTER + b"\0")
    stream = bench.incoming_from(channel)
    kept = KeptSections(bench.registry)
    assert await kept.keep(stream, HEADER, from_qemu=False) == len(FOOTER) + 2


async def test_known_sections_are_not_kept_and_old_ones_make_room() -> None:
    bench = Bench()
    recorder = bench.add("cpu")
    kept = KeptSections(bench.registry)
    async with bench.lock:
        await bench.registry.load_state(
            bench.incoming(b"body"), SectionHeader(SectionType.FULL, 5, "cpu", 0, 1), keep=kept_nothing
        )
    assert recorder.loaded == [(b"body", 1)]
    await keep(bench, b"one", kept)
    assert kept.known_to_qemu() == [HEADER.idstr]
    assert await bench.registry.not_loaded() == []
    assert not bench.registry.takes(HEADER.idstr, 3)
    with pytest.raises(RemoteProtocolError, match="e1000/3 comes twice, and is kept already"):
        await keep(bench, b"two", kept)
    with pytest.raises(LocalProtocolError, match="is registered already"):
        bench.add(HEADER.idstr, instance_id=3)
    for _ in range(2):
        kept.forget()
    assert kept.known_to_qemu() == []
    assert bench.registry.section_ids() == [("cpu", 0)]


async def kept_nothing(f: object, header: SectionHeader) -> None:
    raise AssertionError("offered a section that is known")


async def test_only_whole_sections_are_kept() -> None:
    bench = Bench()
    async with bench.lock:
        with pytest.raises(RemoteProtocolError, match="Unknown savevm section or instance 'vfio' 0"):
            await bench.registry.load_state(
                bench.incoming(b""), SectionHeader(SectionType.START, 5, "vfio", 0, 1), keep=kept_nothing
            )


async def test_there_are_limits() -> None:
    bench = Bench()
    kept = KeptSections(bench.registry)
    endless = bench.incoming(bytes(module.KEPT_MAX_BYTES + (1 << 20)))
    with pytest.raises(
        RemoteProtocolError, match=f"a body without end, expected at most {module.KEPT_MAX_BYTES} bytes"
    ):
        await kept.keep(endless, HEADER, from_qemu=False)
    for number in range(module.KEPT_MAX_SECTIONS):
        await keep(bench, b"", kept, SectionHeader(SectionType.FULL, number, "d", number, 1))
    with pytest.raises(
        RemoteProtocolError, match=f"too many sections to keep, expected at most {module.KEPT_MAX_SECTIONS}"
    ):
        await keep(bench, b"", kept)

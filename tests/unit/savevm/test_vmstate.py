"""A described object as a section: its bytes, its place, its refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from migrated.errors import LocalProtocolError, RemoteProtocolError, SectionError
from migrated.savevm.vmstate import vmstate_register, vmstate_unregister
from migrated.wire.section import SectionHeader, SectionType
from migrated.wire.vmstate import VMState, boolean, qtailq, uint8, uint32, vbuffer
from tests.unit.savevm.test_registry import Bench


class Counter(VMState):
    """A number, and a switch that came later."""

    name = "counter"
    version_id = 2
    minimum_version_id = 1
    fields = (uint32("count"), boolean("armed", since=2))

    @staticmethod
    def needed(obj: Any) -> bool:
        return bool(obj.count)


class Owner:
    """A VMStateIf."""

    def get_id(self) -> str:
        return "0000:00:03.0"


def full(version_id: int, idstr: str = "counter") -> SectionHeader:
    return SectionHeader(SectionType.FULL, 9, idstr, 0, version_id)


async def saved(bench: Bench) -> bytes:
    async with bench.lock:
        await bench.registry.save_state(bench.f)
    return await bench.sent()


async def load(bench: Bench, data: bytes, header: SectionHeader) -> int:
    """Load one section; return how many bytes it took."""
    stream = bench.incoming(data)
    async with bench.lock:
        await bench.registry.load_state(stream, header)
    return stream.offset


async def test_a_section_is_the_description_s_bytes_and_nothing_else() -> None:
    bench = Bench()
    assert vmstate_register(bench.registry, None, 0, Counter, SimpleNamespace(count=5, armed=True)) == 0
    assert await saved(bench) == bytes.fromhex(
        "04 00000001 07 636f756e746572 00000000 00000002 00000005 01 7e 00000001"
    )


async def test_what_is_not_needed_has_no_section() -> None:
    bench = Bench()
    vmstate_register(bench.registry, None, 0, Counter, SimpleNamespace(count=0))
    assert await saved(bench) == b""
    assert [need.active for need in await bench.registry.section_needs()] == [False]


async def test_the_description_goes_behind_the_stream() -> None:
    bench = Bench()
    vmstate_register(bench.registry, None, 0, Counter, SimpleNamespace(count=5, armed=True))
    bench.add("plain")
    await saved(bench)
    bench.channel.sent.clear()
    bench.f.put_end_of_stream()
    end = await bench.sent()
    assert end[:2] == b"\x00\x06"
    devices = json.loads(end[6:])["devices"]
    assert [(device["name"], device.get("vmsd_name")) for device in devices] == [
        ("counter", "counter"),
        ("plain", None),
    ]
    assert [entry["type"] for entry in devices[0]["fields"]] == ["uint32", "bool"]


async def test_a_description_of_other_bytes_is_our_bug() -> None:
    bench = Bench()
    bench.f.begin_section(full(1))
    bench.f.put_be8(0)
    bench.f.describe({"vmsd_name": "x", "version": 1, "fields": [{"name": "a", "type": "uint32", "size": 4}]})
    with pytest.raises(LocalProtocolError, match="section counter has 1 bytes, and is described otherwise"):
        bench.f.end_section(9)


async def test_names_instances_and_priorities() -> None:
    class First(Counter):
        name = "first"
        priority = 3

    bench = Bench()
    one, two = SimpleNamespace(count=1), SimpleNamespace(count=2)
    assert [vmstate_register(bench.registry, None, -1, Counter, each) for each in (one, two)] == [0, 1]
    vmstate_register(bench.registry, Owner(), 7, First, one)
    assert bench.registry.section_ids() == [("0000:00:03.0/first", 7), ("counter", 0), ("counter", 1)]
    assert [str(section) for section in await bench.registry.section_needs()] == [
        "0000:00:03.0/first/7", "counter/0", "counter/1"]  # fmt: skip
    vmstate_unregister(bench.registry, None, Counter, one)
    vmstate_unregister(bench.registry, Owner(), First, one)
    assert bench.registry.section_ids() == [("counter", 1)]


async def test_it_takes_its_bytes_and_leaves_the_footer() -> None:
    bench = Bench()
    counter = SimpleNamespace(count=0, armed=False)
    vmstate_register(bench.registry, None, 0, Counter, counter)
    assert await load(bench, bytes.fromhex("00000007 01 7e 00000009 00"), full(2)) == 5
    assert counter == SimpleNamespace(count=7, armed=True)
    assert await load(bench, bytes.fromhex("00000008 7e 00000009 00"), full(1)) == 4
    assert counter == SimpleNamespace(count=8, armed=True)


@pytest.mark.parametrize(
    ("state", "version_id", "why"),
    [
        ("", 3, "savevm: unsupported version 3 for 'counter' v2"),
        ("", 0, "counter: incoming version_id 0 is too old for local minimum version_id  1 "),
        ("00000007 02", 2, "Failed to load counter:armed: no bool, expected 0 or 1, found 2 "),
        ("000000", 2, "the stream ends too early"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field_and_the_offset(state: str, version_id: int, why: str) -> None:
    bench = Bench()
    vmstate_register(bench.registry, None, 0, Counter, SimpleNamespace())
    with pytest.raises(RemoteProtocolError) as refused:
        await load(bench, bytes.fromhex(state), full(version_id))
    assert str(refused.value).startswith(why)


async def test_offsets_are_those_of_the_stream() -> None:
    bench = Bench()
    vmstate_register(bench.registry, None, 0, Counter, SimpleNamespace())
    stream = bench.incoming(bytes(100) + bytes.fromhex("00000007 02"))
    await stream.get_buffer(100)
    async with bench.lock:
        with pytest.raises(RemoteProtocolError, match=r"stream offset 0x68"):
            await bench.registry.load_state(stream, full(2))


async def test_a_hook_that_refuses_names_the_section() -> None:
    class Odd(Counter):
        name = "counter"
        minimum_version_id = 1

        @staticmethod
        def post_load(obj: Any, version_id: int) -> None:
            raise ValueError("odd")

    bench = Bench()
    vmstate_register(bench.registry, None, 0, Odd, SimpleNamespace())
    with pytest.raises(SectionError, match=r"section counter/0 failed in load_state: post-load failed: counter: .*odd"):
        await load(bench, bytes(10), full(2))


async def test_a_long_state_takes_no_more_memory_than_it_has_bytes() -> None:
    class Long(VMState):
        name = "counter"
        version_id = 2
        fields = (uint32("n"), vbuffer("x", "n", limit=8 << 20), qtailq("q", Byte))

    bench = Bench()
    long = SimpleNamespace()
    vmstate_register(bench.registry, None, 0, Long, long)
    size = 5 << 20
    body = size.to_bytes(4, "big") + bytes(size) + b"\1\7" * 1000 + b"\0"
    assert await load(bench, body + b"\x7e\0\0\0\x09\0", full(2)) == len(body)
    assert (len(long.x), len(long.q)) == (size, 1000)


class Byte(VMState):
    """One byte."""

    name = "byte"
    fields = (uint8("b"),)

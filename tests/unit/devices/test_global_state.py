"""The two sections of every QEMU machine, byte for byte."""

from __future__ import annotations

import pytest

from migrated.devices.global_state import GlobalState, register_global_state
from migrated.errors import RemoteProtocolError
from migrated.model.runstate import RunState
from migrated.wire.section import SectionHeader, SectionType
from tests.unit.savevm.test_registry import Bench


def header(idstr: str, version_id: int) -> SectionHeader:
    return SectionHeader(SectionType.FULL, 4, idstr, 0, version_id)


async def load(bench: Bench, idstr: str, version_id: int, body: bytes) -> None:
    async with bench.lock:
        await bench.registry.load_state(bench.incoming(body + b"\x7e\0\0\0\4\0"), header(idstr, version_id))


async def saved(bench: Bench) -> bytes:
    async with bench.lock:
        await bench.registry.save_state(bench.f)
    return await bench.sent()


def body(name: bytes, size: int | None = None) -> bytes:
    return (len(name) + 1 if size is None else size).to_bytes(4, "big") + name.ljust(100, b"\0")


async def test_the_run_state_there_and_back() -> None:
    bench = Bench()
    state = register_global_state(bench.registry)
    state.store(RunState.PAUSED)
    assert await saved(bench) == (
        bytes.fromhex("04 00000002 0b") + b"globalstate" + bytes.fromhex("00000000 00000001") + body(b"paused")
        + bytes.fromhex("7e 00000002")
    )  # fmt: skip
    await load(bench, "globalstate", 1, body(b"paused"))
    assert state.received is RunState.PAUSED
    await load(bench, "globalstate", 1, body(b""))
    assert state.received is None


async def test_a_new_stream_begins_without_a_run_state() -> None:
    bench = Bench()
    state = register_global_state(bench.registry)
    await load(bench, "globalstate", 1, body(b"paused"))
    async with bench.lock:
        await bench.registry.load_setup(bench.incoming())
    assert state.received is None


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (body(b"dancing"), "invalid parameter value: dancing"),
        (body(b"\xff\x1b"), "invalid parameter value: "),
        (body(b"paused", 6), "globalstate has a wrong length, expected 7, found 6"),
        (body(b"x" * 100, 101), "globalstate has a wrong length"),
        (body(b"paused", 0xFFFFFFFF), "globalstate has a wrong length"),
    ],
)
async def test_refusals(state: bytes, why: str) -> None:
    bench = Bench()
    received: GlobalState = register_global_state(bench.registry)
    with pytest.raises(RemoteProtocolError, match=why):
        await load(bench, "globalstate", 1, state)
    assert received.received is None


async def test_a_timer_that_came_is_sent_on() -> None:
    bench = Bench()
    register_global_state(bench.registry)
    assert b"timer" not in await saved(bench)
    bench.channel.sent.clear()
    came = bytes.fromhex("fffffffffffffffe 0000000000000000 000000003b9aca00")
    await load(bench, "timer", 2, came)
    sent = await saved(bench)
    assert sent.startswith(bytes.fromhex("04 00000001 05") + b"timer" + bytes.fromhex("00000000 00000002") + came)

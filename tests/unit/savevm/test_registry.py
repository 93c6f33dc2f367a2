"""The registry calls every hook at its moment, in list order, under its lock regime."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from migrated.errors import LocalProtocolError, RemoteProtocolError, SectionError
from migrated.model.stats import BandwidthMeter
from migrated.savevm.handlers import Pending, SaveVMHandlers, VMStateIf
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.section import SectionHeader, SectionType
from tests.support.channel import MemoryChannel
from tests.support.recorder import Recorder, told

Calls = list[tuple[str, str, bool]]


class Bench:
    """A registry with its lock, a stream to write to, and the calls its recorders saw."""

    def __init__(self) -> None:
        self.lock = IothreadLock()
        self.registry = SaveVMRegistry(self.lock)
        self.calls: Calls = []
        self.channel = MemoryChannel()
        self.f = OutgoingStream(self.channel, BandwidthMeter())

    def add(
        self, name: str, *, instance_id: int = 0, version_id: int = 1, priority: int = 0, **fields: Any
    ) -> Recorder:
        recorder = Recorder(name, self.lock, self.calls, **fields)
        ops = SaveVMHandlers.of(recorder)
        self.registry.register_savevm_live(name, instance_id, version_id, ops, recorder, priority=priority)
        return recorder

    def incoming(self, data: bytes = b"") -> IncomingStream:
        channel = MemoryChannel()
        channel.feed(data, eof=True)
        return self.incoming_from(channel)

    def incoming_from(self, channel: MemoryChannel) -> IncomingStream:
        return IncomingStream(channel, silence_timeout_s=lambda: 5.0)

    async def sent(self) -> bytes:
        await self.f.drain()
        return bytes(self.channel.sent)


def test_of_collects_all_fourteen_hooks() -> None:
    bench = Bench()
    ops = SaveVMHandlers.of(Recorder("all", bench.lock, []))
    names = SaveVMHandlers.__dataclass_fields__
    assert len(names) == 14
    assert all(getattr(ops, name) is not None for name in names)


def test_of_leaves_out_what_is_not_there() -> None:
    ops = SaveVMHandlers.of(object())
    assert all(getattr(ops, name) is None for name in SaveVMHandlers.__dataclass_fields__)


async def test_save_walks_in_priority_order_under_the_right_lock() -> None:
    bench = Bench()
    bench.add("second", pending=Pending(1, 2, 3))
    bench.add("third", pending=Pending(10, 20, 30))
    bench.add("first", priority=2)
    order = ["first", "second", "third"]
    await bench.registry.save_setup(bench.f)
    assert await bench.registry.save_live_pending(bench.f, 99) == Pending(11, 22, 33)
    await bench.registry.save_live_iterate(bench.f)
    async with bench.lock:
        await bench.registry.save_live_complete_precopy(bench.f)
        await bench.registry.save_state(bench.f)
        assert await bench.registry.save_cleanup() == []
    regimes = {
        "save_setup": False,
        "save_live_pending": False,
        "save_live_iterate": False,
        "save_live_complete_precopy": True,
        "save_state": True,
        "save_cleanup": True,
    }
    assert told(bench.calls) == [(name, hook, held) for hook, held in regimes.items() for name in order]


async def test_sections_of_one_step_belong_to_every_handler() -> None:
    bench = Bench()
    bench.add("hog", steps=1000)
    bench.add("meek", steps=1)
    assert not await bench.registry.save_live_iterate(bench.f)
    assert [name for name, hook, _ in told(bench.calls)] == ["hog", "meek"]
    assert (await bench.sent()).count(b"\x02\0\0\0") == 2


@pytest.mark.parametrize(
    ("hook", "held"),
    [
        ("save_setup", True),
        ("save_live_iterate", True),
        ("save_live_complete_precopy", False),
        ("save_live_complete_postcopy", False),
        ("save_state", False),
        ("save_cleanup", False),
        ("load_setup", False),
        ("load_cleanup", False),
        ("resume_prepare", True),
    ],
)
async def test_the_wrong_lock_regime_is_refused_before_any_hook_runs(hook: str, held: bool) -> None:
    bench = Bench()
    bench.add("quiet")
    arguments: tuple[Any, ...] = () if hook.endswith("cleanup") else (bench.f,)
    walk = getattr(bench.registry, hook)
    async with bench.lock if held else contextlib.nullcontext():
        with pytest.raises(LocalProtocolError, match=hook):
            await walk(*arguments)
    assert bench.calls == []


async def test_a_snapshot_iterates_inside_the_lock() -> None:
    bench = Bench()
    bench.add("disk")
    async with bench.lock:
        assert await bench.registry.save_live_iterate(bench.f, snapshot=True)
    assert told(bench.calls) == [("disk", "save_live_iterate", True)]
    with pytest.raises(LocalProtocolError):
        await bench.registry.save_live_iterate(bench.f, snapshot=True)


async def test_postcopy_iterates_and_skips_by_has_postcopy() -> None:
    bench = Bench()
    bench.add("precopy-only")
    bench.add("later", postcopy=True)
    await bench.registry.save_live_iterate(bench.f, postcopy=True)
    async with bench.lock:
        await bench.registry.save_live_complete_precopy(bench.f, postcopy=True)
        await bench.registry.save_live_complete_postcopy(bench.f)
    assert told(bench.calls) == [
        ("later", "save_live_iterate", False),
        ("precopy-only", "save_live_complete_precopy", True),
        ("precopy-only", "save_live_complete_postcopy", True),
        ("later", "save_live_complete_postcopy", True),
    ]


async def test_inactive_handlers_have_no_sections() -> None:
    bench = Bench()
    bench.add("asleep", active=False)
    await bench.registry.save_setup(bench.f)
    assert await bench.registry.save_live_iterate(bench.f)
    assert told(bench.calls) == []
    assert await bench.sent() == b""


async def test_cleanup_runs_for_everybody_even_when_one_fails_and_without_setup() -> None:
    bench = Bench()

    def explode(opaque: Any) -> None:
        raise ValueError("no")

    bench.registry.register_savevm_live("bomb", 0, 1, SaveVMHandlers(save_cleanup=explode), None)
    bench.add("after")
    async with bench.lock:
        for _ in range(2):
            (failed,) = await bench.registry.save_cleanup()
            assert (failed.idstr, failed.phase) == ("bomb", "save_cleanup")
    assert [name for name, _, _ in bench.calls] == ["after", "after"]


async def test_a_hook_that_raises_names_its_section_and_keeps_its_cause() -> None:
    bench = Bench()

    async def explode(f: Any, opaque: Any) -> None:
        raise ValueError("bad cpu")

    bench.registry.register_savevm_live("cpu", 3, 1, SaveVMHandlers(save_state=explode), None)
    async with bench.lock:
        with pytest.raises(SectionError, match="section cpu/3 failed in save_state: bad cpu") as caught:
            await bench.registry.save_state(bench.f)
    assert isinstance(caught.value.__cause__, ValueError)


# -- registration ----------------------------------------------------------------------------------------------


class Device(VMStateIf):
    def get_id(self) -> str:
        return "0000:00:01.1"


def test_instance_ids_any_and_explicit() -> None:
    registry = SaveVMRegistry(IothreadLock())
    ops = SaveVMHandlers()
    assert registry.register_savevm_live("uart", -1, 1, ops, None) == 0
    assert registry.register_savevm_live("uart", 7, 1, ops, None) == 7
    assert registry.register_savevm_live("uart", -1, 1, ops, None) == 8
    assert registry.register_savevm_live("timer", -1, 1, ops, None) == 0
    with pytest.raises(LocalProtocolError, match="instance id 7 is registered already"):
        registry.register_savevm_live("uart", 7, 1, ops, None)


async def test_no_section_has_the_number_0() -> None:
    """A QEMU takes the first handler with a PART's number, and 0 is that of all it has not loaded yet."""
    bench = Bench()
    bench.add("ram")
    async with bench.lock:
        await bench.registry.save_state(bench.f)
    assert (await bench.sent())[:5] == bytes.fromhex("04 00000001")


@pytest.mark.parametrize("idstr", ["", "x" * 256, "é" * 128])
def test_an_idstr_must_fit_its_length_byte(idstr: str) -> None:
    with pytest.raises(LocalProtocolError, match="1 to 255 bytes"):
        SaveVMRegistry(IothreadLock()).register_savevm_live(idstr, 0, 1, SaveVMHandlers(), None)


def test_unregister_needs_the_same_opaque_and_the_full_name() -> None:
    registry = SaveVMRegistry(IothreadLock())
    ours, theirs = object(), object()
    for name, opaque in (("ide", ours), ("0000:00:01.1/ide", ours), ("0000:00:01.1/ide", theirs)):
        registry.register_savevm_live(name, -1, 1, SaveVMHandlers(), opaque)
    registry.unregister_savevm(Device(), "ide", ours)
    assert registry.section_ids() == [("ide", 0), ("0000:00:01.1/ide", 1)]
    registry.unregister_savevm(None, "ide", theirs)
    assert registry.section_ids() == [("ide", 0), ("0000:00:01.1/ide", 1)]
    registry.unregister_savevm(None, "ide", ours)
    assert registry.section_ids() == [("0000:00:01.1/ide", 1)]


# -- loading ---------------------------------------------------------------------------------------------------


def start(section_id: int, idstr: str, *, instance_id: int = 0, version_id: int = 1) -> SectionHeader:
    return SectionHeader(SectionType.START, section_id, idstr, instance_id, version_id)


async def test_load_routes_by_the_peers_section_ids_and_keeps_the_version_of_start() -> None:
    bench = Bench()
    ram = bench.add("ram", version_id=4)
    disk = bench.add("disk", version_id=9)
    f = bench.incoming(b"AAAABBBBCCCC")
    async with bench.lock:
        await bench.registry.load_setup(f)
        await bench.registry.load_state(f, start(0x01020304, "disk", version_id=8))
        await bench.registry.load_state(f, start(5, "ram", version_id=4))
        assert await bench.registry.load_state(f, SectionHeader(SectionType.END, 0x01020304)) == "disk"
        assert await bench.registry.load_cleanup() == []
    assert disk.loaded == [(b"AAAA", 8), (b"CCCC", 8)]
    assert ram.loaded == [(b"BBBB", 4)]
    assert {held for _, _, held in told(bench.calls)} == {True}
    hooks = [hook for _, hook, _ in told(bench.calls)]
    assert hooks == ["load_setup"] * 2 + ["load_state"] * 3 + ["load_cleanup"] * 2


async def test_after_listen_sections_are_loaded_without_the_lock() -> None:
    bench = Bench()
    bench.add("ram")
    await bench.registry.load_state(bench.incoming(b"AAAA"), start(1, "ram"), listening=True)
    assert told(bench.calls) == [("ram", "load_state", False)]
    with pytest.raises(LocalProtocolError):
        await bench.registry.load_state(bench.incoming(b"AAAA"), start(1, "ram"))


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (start(1, "nvme"), "Unknown savevm section or instance 'nvme' 0"),
        (start(1, "ram", instance_id=1), "Unknown savevm section or instance 'ram' 1"),
        (start(1, "ram", version_id=5), "savevm: unsupported version 5 for 'ram' v4"),
        (SectionHeader(SectionType.PART, 77), "Unknown savevm section 77"),
    ],
)
async def test_what_cannot_be_loaded_is_refused_by_name(header: SectionHeader, text: str) -> None:
    bench = Bench()
    bench.add("ram", version_id=4)
    async with bench.lock:
        with pytest.raises(RemoteProtocolError, match=text):
            await bench.registry.load_state(bench.incoming(), header)


async def test_a_section_id_cannot_change_its_handler() -> None:
    bench = Bench()
    bench.add("ram")
    bench.add("disk")
    async with bench.lock:
        await bench.registry.load_state(bench.incoming(b"AAAA"), start(1, "ram"))
        with pytest.raises(RemoteProtocolError, match=r"announced twice.*expected ram.*found disk"):
            await bench.registry.load_state(bench.incoming(b"AAAA"), start(1, "disk"))


async def test_section_ids_are_forgotten_between_two_loads() -> None:
    bench = Bench()
    bench.add("ram")
    f = bench.incoming(b"AAAA")
    async with bench.lock:
        await bench.registry.load_state(f, start(1, "ram"))
        await bench.registry.load_setup(f)
        with pytest.raises(RemoteProtocolError, match="Unknown savevm section 1"):
            await bench.registry.load_state(f, SectionHeader(SectionType.PART, 1))


async def test_what_a_stream_did_not_bring_is_named() -> None:
    bench = Bench()
    bench.add("ram")
    bench.add("cpu")
    bench.add("asleep", active=False)
    async with bench.lock:
        await bench.registry.load_setup(bench.incoming())
        await bench.registry.load_state(bench.incoming(b"AAAA"), start(1, "cpu"))
    assert await bench.registry.not_loaded() == ["ram/0"]
    assert await bench.registry.not_loaded(besides=["ram"]) == []


async def test_a_late_registration_is_waited_for() -> None:
    bench = Bench()
    asked = []

    async def missing(idstr: str, instance_id: int) -> None:
        asked.append((idstr, instance_id))
        bench.add(idstr)

    async with bench.lock:
        await bench.registry.load_state(bench.incoming(b"AAAA"), start(1, "late"), missing=missing)
    assert asked == [("late", 0)]


async def test_a_plain_load_state_may_wait_for_the_network_in_a_thread() -> None:
    bench = Bench()
    got: list[tuple[int, bytes, str, int]] = []

    def load_state(f: Any, opaque: Any, version_id: int) -> None:
        got.append((f.get_be32(), f.get_buffer(3), f.get_counted_string(), version_id))

    bench.registry.register_savevm_live("plain", 0, 2, SaveVMHandlers(load_state=load_state), None)
    async with bench.lock:
        await bench.registry.load_state(bench.incoming(b"\0\0\1\0abc\2hi"), start(1, "plain", version_id=2))
    assert got == [(256, b"abc", "hi", 2)]


async def test_a_plain_load_state_that_meets_the_end_names_its_section() -> None:
    bench = Bench()

    def load_state(f: Any, opaque: Any, version_id: int) -> None:
        f.get_be32()

    bench.registry.register_savevm_live("plain", 0, 2, SaveVMHandlers(load_state=load_state), None)
    async with bench.lock:
        with pytest.raises(RemoteProtocolError, match="the stream ends too early"):
            await bench.registry.load_state(bench.incoming(b"\0\0"), start(1, "plain"))


async def test_a_cleanup_that_hangs_does_not_keep_the_lock_or_the_others_from_theirs() -> None:
    lock = IothreadLock()
    done: list[str] = []
    registry = SaveVMRegistry(lock, cleanup_timeout_s=0.01)

    async def hang(opaque: Any) -> None:
        await asyncio.Event().wait()

    registry.register_savevm_live("stuck", 0, 1, SaveVMHandlers(save_cleanup=hang), None)
    registry.register_savevm_live("next", 0, 1, SaveVMHandlers(save_cleanup=done.append), "cleaned")
    async with lock:
        (failed,) = await registry.save_cleanup()
    assert (failed.idstr, failed.why) == ("stuck", "no end within 0.01 s")
    assert done == ["cleaned"]

"""The section of a workload's device: a length, the state, and a description of both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from migrated.devices.attached import register_device, unregister_device
from migrated.errors import RemoteProtocolError
from migrated.savevm.ports import DeviceState
from migrated.wire.section import SectionHeader, SectionType
from tests.unit.savevm.test_registry import Bench

TABLE = {"vmsd_name": "chip", "version": 1, "fields": [{"name": "a", "type": "uint16", "size": 2}]}


@dataclass
class Device:
    """A DevicePort."""

    state: DeviceState
    idstr: str = "cpu"
    instance_id: int = 0
    version_id: int = 2
    priority: int = 0
    workload: str = "w"
    loaded: list[tuple[bytes, int]] = field(default_factory=list)

    async def save(self) -> DeviceState:
        return self.state

    async def load(self, state: bytes, version_id: int) -> None:
        self.loaded.append((state, version_id))


async def described(bench: Bench) -> list[dict[str, Any]]:
    """Save, and return the entries of the description."""
    async with bench.lock:
        await bench.registry.save_state(bench.f)
    await bench.f.drain()
    bench.channel.sent.clear()
    bench.f.put_end_of_stream()
    devices: list[dict[str, Any]] = json.loads((await bench.sent())[6:])["devices"]
    return devices


@pytest.mark.parametrize(
    ("text", "kind"), [(json.dumps(TABLE), "struct"), ("", "buffer"), ("nonsense", "buffer"), ("{}", "buffer")]
)
async def test_a_framed_state_is_described_whole(text: str, kind: str) -> None:
    bench = Bench()
    register_device(bench.registry, Device(DeviceState(b"\1\2", text)))
    (entry,) = await described(bench)
    assert (entry["name"], entry["vmsd_name"], entry["version"]) == ("cpu", "cpu", 2)
    assert [(one["name"], one["type"], one["size"]) for one in entry["fields"]] == [
        ("size", "uint32", 4),
        ("state", kind, 2),
    ]


async def test_a_description_of_another_length_is_not_believed() -> None:
    bench = Bench()
    register_device(bench.registry, Device(DeviceState(b"\1\2\3", json.dumps(TABLE))))
    (entry,) = await described(bench)
    assert entry["fields"][1] == {"name": "state", "type": "buffer", "size": 3}


async def test_bytes_and_order() -> None:
    bench = Bench()
    low, high = Device(DeviceState(b"ab")), Device(DeviceState(b""), "disk", priority=3)
    for device in (low, high):
        register_device(bench.registry, device)
    assert bench.registry.section_ids() == [("disk", 0), ("cpu", 0)]
    unregister_device(bench.registry, high)
    async with bench.lock:
        await bench.registry.save_state(bench.f)
    assert await bench.sent() == bytes.fromhex("04 00000001 03 637075 00000000 00000002 00000002 6162 7e 00000001")


async def test_loading() -> None:
    bench = Bench()
    device = Device(DeviceState(b""))
    register_device(bench.registry, device)
    header = SectionHeader(SectionType.FULL, 9, "cpu", 0, 1)
    async with bench.lock:
        await bench.registry.load_state(bench.incoming(bytes.fromhex("00000002 6162")), header)
        assert device.loaded == [(b"ab", 1)]
        with pytest.raises(RemoteProtocolError, match="device state too long, expected at most 1073741824 bytes"):
            await bench.registry.load_state(bench.incoming(bytes.fromhex("40000001")), header)

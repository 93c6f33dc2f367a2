"""A device of a workload that a description describes: what it gives, and what it takes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from migrated.client.described import described_device
from migrated.errors import RemoteProtocolError
from migrated.wire.attach import MAX_DESCRIPTION_BYTES
from migrated.wire.vmstate import VMState, array, struct, uint8


class Chip(VMState):
    """Two versions, and a priority."""

    name = "chip"
    version_id = 3
    minimum_version_id = 2
    priority = 5
    fields = (uint8("a"), uint8("b", since=3))

    @staticmethod
    def pre_load(obj: Any) -> None:
        obj.b = 0


def test_it_gives_its_bytes_and_what_they_are() -> None:
    device = described_device("cpu", 7, Chip, SimpleNamespace(a=1, b=2))
    assert (device.name, device.instance_id, device.version_id, device.priority) == ("cpu", 7, 3, 5)
    state, description = device.save()
    assert state == b"\1\2"
    assert [entry["name"] for entry in json.loads(description)["fields"]] == ["a", "b"]


def test_it_takes_what_it_can_read_and_says_what_not() -> None:
    chip = SimpleNamespace()
    device = described_device("cpu", 0, Chip, chip)
    device.restore(b"\7", 2)
    assert chip == SimpleNamespace(a=7, b=0)
    with pytest.raises(
        RemoteProtocolError, match="chip: incoming version_id 1 is too old for local minimum version_id  2"
    ):
        device.restore(b"\7", 1)
    with pytest.raises(RemoteProtocolError, match="chip v3: the state goes on behind its end"):
        device.restore(b"\7\7\7", 3)


def test_a_description_that_fits_no_message_is_left_out() -> None:
    class Wide(VMState):
        name = "wide"
        fields = tuple(struct(f"chip{number}", Chip) for number in range(300))

    chips = SimpleNamespace(**{f"chip{number}": SimpleNamespace(a=1, b=2) for number in range(300)})
    state, description = described_device("wide", 0, Wide, chips).save()
    assert (len(state), description) == (600, "")

    class Narrow(VMState):
        name = "narrow"
        fields = (array("x", uint8, 3000),)

    _, description = described_device("narrow", 0, Narrow, SimpleNamespace(x=[0] * 3000)).save()
    assert 0 < len(description) < MAX_DESCRIPTION_BYTES

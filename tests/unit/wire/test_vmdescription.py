"""The text behind a stream stands for exactly the bytes of its sections."""

from __future__ import annotations

import json
from typing import Any

import pytest

from migrated.errors import RemoteProtocolError
from migrated.wire.vmdescription import DEPTH_MAX, DeviceEntry, describe, described_bytes, framed, parse_described

BYTE = {"name": "a", "type": "uint8", "size": 1}
TABLE = {"vmsd_name": "dev", "version": 1, "fields": [BYTE]}


def test_a_device_without_a_description_is_one_buffer() -> None:
    assert describe([DeviceEntry("held", 3, 5, {})]) == (
        '{"page_size": 4096, "devices": [{"name": "held", "instance_id": 3, "size": 5,'
        ' "fields": [{"name": "data", "type": "buffer", "size": 5}]}]}'
    )


def test_a_described_device_is_its_table() -> None:
    assert describe([DeviceEntry("dev", 0, 1, TABLE)]) == (
        '{"page_size": 4096, "devices": [{"name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 1,'
        ' "fields": [{"name": "a", "type": "uint8", "size": 1}]}]}'
    )


def test_a_text_that_no_tool_would_find_says_only_how_long_sections_are() -> None:
    entries = [DeviceEntry("dev", 0, 1, TABLE), DeviceEntry("ü", 0, 2, {})]
    whole = describe(entries)
    assert describe(entries, len(whole.encode())) == whole
    assert [device["size"] for device in json.loads(describe(entries, len(whole) - 1))["devices"]] == [1, 2]


@pytest.mark.parametrize(("state", "kind"), [(None, "buffer"), (TABLE, "struct")])
def test_a_framed_state(state: Any, kind: str) -> None:
    table = framed("cpu", 2, 1, state)
    assert (table["vmsd_name"], table["version"], described_bytes(table)) == ("cpu", 2, 5)
    assert [entry["type"] for entry in table["fields"]] == ["uint32", kind]


def test_sizes_add_up() -> None:
    array = {"name": "r", "array_len": 3, "type": "uint16", "size": 2}
    inner = {"name": "s", "type": "struct", "struct": TABLE, "size": 1}
    sub = {"vmsd_name": "dev/sub", "version": 1, "fields": [BYTE]}
    whole = {"vmsd_name": "dev", "version": 1, "fields": [array, inner], "subsections": [sub]}
    assert described_bytes(whole) == 3 * 2 + 1 + (1 + 1 + 7 + 4 + 1)


def deep(levels: int) -> dict[str, Any]:
    table = TABLE
    for _ in range(levels):
        table = {
            "vmsd_name": "d",
            "version": 1,
            "fields": [{"name": "x", "type": "struct", "struct": table, "size": 1}],
        }
    return table


@pytest.mark.parametrize(
    "table",
    [
        {},
        [],
        None,
        {**TABLE, "vmsd_name": 5},
        {**TABLE, "version": "1"},
        {**TABLE, "fields": 5},
        {**TABLE, "fields": [5]},
        {**TABLE, "fields": [{**BYTE, "name": 5}]},
        {**TABLE, "fields": [{**BYTE, "type": None}]},
        {**TABLE, "fields": [{**BYTE, "size": -1}]},
        {**TABLE, "fields": [{**BYTE, "size": "1"}]},
        {**TABLE, "fields": [{**BYTE, "array_len": -1}]},
        {**TABLE, "fields": [{"name": "s", "type": "struct", "struct": TABLE, "size": 2}]},
        {**TABLE, "subsections": [{"vmsd_name": 5}]},
        {**TABLE, "subsections": 5},
        deep(5000),
    ],
)
def test_what_is_no_description(table: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="no description of a state"):
        described_bytes(table)


@pytest.mark.parametrize(
    ("text", "size", "taken"),
    [
        (json.dumps(TABLE), 1, True),
        (json.dumps(TABLE), 2, False),
        ("", 0, False),
        ("{", 0, False),
        ("[]", 0, False),
        ("[" * 100_000, 0, False),
        ("1" * 5000, 0, False),
        (json.dumps({**TABLE, "version": float("nan")}), 1, False),
        (json.dumps({**TABLE, "fields": [{**BYTE, "index": float("nan")}]}), 1, False),
        (json.dumps({**TABLE, "fields": [{**BYTE, "size": True}]}), 1, False),
        (json.dumps({**TABLE, "more": [float("nan")], "fields": [{**BYTE, "more": [[]]}], "subsections": []}), 1, True),
    ],
)
def test_what_somebody_gives_is_taken_if_it_fits(text: str, size: int, taken: bool) -> None:
    assert parse_described(text, size) == (TABLE if taken else None)


def test_structs_and_subsections_of_somebody_else() -> None:
    sub = {"vmsd_name": "d/s", "version": 1, "fields": [BYTE]}
    inner = {"vmsd_name": "d", "version": 1, "fields": [BYTE], "subsections": [sub]}
    outer = {"name": "x", "index": 0, "type": "struct", "struct": inner, "size": 1 + 9 + 1}
    table = {"vmsd_name": "d", "version": 1, "fields": [outer, {**BYTE, "array_len": 3}]}
    assert parse_described(json.dumps(table), 14) == table


def test_a_table_may_be_so_deep_and_no_deeper() -> None:
    assert parse_described(json.dumps(deep(DEPTH_MAX)), 1) == deep(DEPTH_MAX)
    assert parse_described(json.dumps(deep(DEPTH_MAX + 1)), 1) is None

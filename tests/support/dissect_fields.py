"""An independent reader of device sections: walks a VMDESCRIPTION entry against the bytes that it describes.

The rule of the file: as `tests.support.dissect`: written from the description of the format, it imports nothing of the
product, and whatever does not add up is an error. Fields of a kind that only says its size are given as bytes.
"""

from __future__ import annotations

from typing import Any

SIGNED = {"int8", "int16", "int32", "int64", "int32 equal", "int32 le"}
UNSIGNED = {"uint8", "uint16", "uint32", "uint64", "uint8 equal", "uint16 equal", "uint32 equal", "int64 equal"}


class BadFieldsError(Exception):
    """The bytes are not what the description says."""


def read_section(entry: dict[str, Any], body: bytes) -> dict[str, Any]:
    """Return the values of a section's fields, by name; arrays as lists, subsections by their names."""
    if "size" in entry and entry["size"] != len(body):
        raise BadFieldsError(f"{entry['name']} has {len(body)} bytes, the description says {entry['size']}")
    values, at = _table(entry, body, 0)
    if at != len(body):
        raise BadFieldsError(f"the fields of {entry['name']} end after {at} of {len(body)} bytes")
    return values


def _table(table: dict[str, Any], body: bytes, at: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    for item in table["fields"]:
        if {"array_len", "index"} & set(item):
            values.setdefault(item["name"], [])
        elif item["name"] in values:
            raise BadFieldsError(f"two fields are called {item['name']}")
        for _ in range(item.get("array_len", 1)):
            value, at = _field(item, body, at)
            if {"array_len", "index"} & set(item):
                if item.get("index", len(values[item["name"]])) != len(values[item["name"]]):
                    raise BadFieldsError(f"element {item['index']} of {item['name']} is out of order")
                values[item["name"]].append(value)
            else:
                values[item["name"]] = value
    for sub in table.get("subsections", ()):
        name = sub["vmsd_name"].encode()
        head = bytes([5, len(name)]) + name + sub["version"].to_bytes(4, "big")
        if body[at : at + len(head)] != head:
            raise BadFieldsError(f"no subsection {name!r} v{sub['version']} at {at:#x}")
        values[sub["vmsd_name"]], at = _table(sub, body, at + len(head))
    return values, at


def _field(item: dict[str, Any], body: bytes, at: int) -> tuple[Any, int]:
    end = at + item["size"]
    raw = body[at:end]
    if len(raw) != item["size"]:
        raise BadFieldsError(f"field {item['name']} has {len(raw)} of {item['size']} bytes")
    kind = item["type"]
    if kind == "struct":
        value, reached = _table(item["struct"], body, at)
        if reached != end:
            raise BadFieldsError(f"struct {item['name']} has {reached - at} of {item['size']} bytes")
        return value, end
    if kind in SIGNED | UNSIGNED:
        return int.from_bytes(raw, "big", signed=kind in SIGNED), end
    if kind == "bool":
        if raw not in (b"\0", b"\1"):
            raise BadFieldsError(f"{item['name']} is no bool: {raw!r}")
        return raw == b"\1", end
    if kind == "nullptr" and raw != b"0":
        raise BadFieldsError(f"{item['name']} is no null pointer: {raw!r}")
    return raw, end

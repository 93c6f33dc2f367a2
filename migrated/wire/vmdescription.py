"""The text behind a stream that says what its FULL sections consist of, for tools such as analyze-migration.py.

The rule of the file: an entry stands for exactly the bytes of its section, or it is not used. Who has no description is
one buffer. Source of the shape: QEMU 7.2; sizes are those of one element, and a subsection's head (a byte, a counted
name, a version) is not in its fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrated.errors import RemoteProtocolError

#: analyze-migration.py looks for the description, and its length, in the last 10 MB of a file.
TEXT_MAX_BYTES = (10 << 20) - 4096
#: Structs in structs: a table that somebody gives must not be deeper than what is written here can be.
DEPTH_MAX = 32
PAGE_SIZE = 4096
#: An element type, a name's length, a version.
_SUBSECTION_HEAD_BYTES = 1 + 1 + 4
#: What is raised by looking into something that is no table.
_NO_TABLE = (KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A FULL section as it went out. ``described``: vmsd_name, version, fields; empty where nobody described it."""

    idstr: str
    instance_id: int
    body_bytes: int
    described: Mapping[str, Any]

    def shown(self) -> dict[str, Any]:
        """Return the entry as the text has it."""
        return {"name": self.idstr, "instance_id": self.instance_id, **(self.described or self._opaque())}

    def opaque(self) -> DeviceEntry:
        """Return the entry without its description."""
        return DeviceEntry(self.idstr, self.instance_id, self.body_bytes, {})

    def _opaque(self) -> dict[str, Any]:
        return {"size": self.body_bytes, "fields": [buffer_entry("data", self.body_bytes)]}


def buffer_entry(name: str, size: int) -> dict[str, Any]:
    """Describe bytes that nobody says more about."""
    return {"name": name, "type": "buffer", "size": size}


def describe(entries: Sequence[DeviceEntry], limit: int = TEXT_MAX_BYTES) -> str:
    """Return the VMDESCRIPTION; one that is too long for a tool to find it says of each section only how long it is."""
    text = _text(entries)
    return text if len(text) <= limit else _text([entry.opaque() for entry in entries])


def _text(entries: Iterable[DeviceEntry]) -> str:
    # Only ASCII: so many characters are so many bytes.
    return json.dumps({"page_size": PAGE_SIZE, "devices": [entry.shown() for entry in entries]})


def framed(name: str, version_id: int, size: int, state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Describe a state of ``size`` bytes behind a be32 that says so."""
    inside = (
        buffer_entry("state", size)
        if state is None
        else {"name": "state", "type": "struct", "struct": state, "size": size}
    )
    fields = [{"name": "size", "type": "uint32", "size": 4}, inside]
    return {"vmsd_name": name, "version": version_id, "fields": fields}


def parse_described(text: str, size: int) -> dict[str, Any] | None:
    """Return the table that somebody gave for a state of ``size`` bytes; None where it is none, or of another state."""
    try:
        described = _plain(json.loads(text))
        return described if described_bytes(described) == size else None
    except (ValueError, *_NO_TABLE, RemoteProtocolError):
        return None


def _plain(table: Any, depth: int = 0) -> dict[str, Any]:
    """Return a copy that has the members of a table and nothing else: nobody knows what else it may hold."""
    if depth > DEPTH_MAX:
        raise ValueError("too deep")
    plain = {
        "vmsd_name": table["vmsd_name"],
        "version": table["version"],
        "fields": [_plain_field(entry, depth) for entry in table["fields"]],
    }
    if subsections := [_plain(sub, depth + 1) for sub in table.get("subsections", ())]:
        plain["subsections"] = subsections
    return plain


def _plain_field(entry: Any, depth: int) -> dict[str, Any]:
    plain = {key: entry[key] for key in ("name", "array_len", "index", "type") if key in entry}
    if "struct" in entry:
        plain["struct"] = _plain(entry["struct"], depth + 1)
    return {**plain, "size": entry["size"]}


def described_bytes(described: Mapping[str, Any]) -> int:
    """Return how many bytes a table (vmsd_name, version, fields) stands for.

    Raises RemoteProtocolError when it is none: it may come from somebody else.
    """
    try:
        return _bytes_of(described)
    except _NO_TABLE as error:
        raise RemoteProtocolError("no description of a state", found=f"{error!r}"[:80]) from error


def _bytes_of(described: Mapping[str, Any]) -> int:
    if not isinstance(described["vmsd_name"], str) or not _count(described["version"]):
        raise TypeError("vmsd_name, version")
    total = 0
    for entry in described["fields"]:
        count, size = entry.get("array_len", 1), entry["size"]
        if not all(map(_count, (count, size, entry.get("index", 0)))):
            raise TypeError("array_len, index, size")
        if not isinstance(entry["name"], str) or not isinstance(entry["type"], str):
            raise TypeError("name, type")
        if "struct" in entry and _bytes_of(entry["struct"]) != size:
            raise TypeError(f"size of {entry['name']}"[:40])
        total += count * size
    for sub in described.get("subsections", ()):
        total += _SUBSECTION_HEAD_BYTES + len(sub["vmsd_name"].encode()) + _bytes_of(sub)
    return total


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

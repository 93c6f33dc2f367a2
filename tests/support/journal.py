"""Reading what was handed to the journal: at its socket, and as ``journalctl -o json`` shows it."""

from __future__ import annotations

import json
from typing import Any


def parse_fields(datagram: bytes) -> dict[str, str]:
    """Return the fields of one message of the native protocol."""
    fields = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length + 1 :]
        fields[name.decode()] = value.decode()
        datagram = rest
    return fields


def events_of(shown: str) -> list[dict[str, Any]]:
    """Return the events in the output of ``journalctl -o json``: what stands in JSON lines elsewhere."""
    lines = [json.loads(line) for line in shown.splitlines()]
    prefix = "MIGRATED_"
    return [
        {name.removeprefix(prefix).lower(): value for name, value in line.items() if name.startswith(prefix)}
        for line in lines
        if f"{prefix}EVENT" in line
    ]

"""Quantities as an operator reads them, and as an operator writes them.

The rule of the file: binary units, as QEMU's tools use them; three significant digits are enough for a person.
"""

from __future__ import annotations

import re

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SUFFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count /= 1024
        power += 1
    return f"{_short(count)} {_UNITS[power]}"


def format_rate(bytes_per_second: float) -> str:
    return f"{format_bytes(bytes_per_second)}/s"


def format_ms(duration_ms: float) -> str:
    """``0.42 ms``, ``41.2 ms``, ``2.31 s``, ``3 min 05 s``."""
    if duration_ms < 1000:
        return f"{_short(duration_ms)} ms"
    if duration_ms < 120_000:
        return f"{_short(duration_ms / 1000)} s"
    minutes, seconds = divmod(round(duration_ms / 1000), 60)
    return f"{minutes} min {seconds:02d} s"


def parse_size(text: str) -> int:
    """``512M`` -> 536870912, with the suffixes of QEMU's monitor (powers of 1024). Raises ValueError."""
    match = re.fullmatch(r"([0-9]+)([KMGTPE]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"'{text}' is not a size such as 1048576, 512M or 2G")
    return int(match[1]) << (10 * _SUFFIXES[match[2].upper()])


def _short(number: float) -> str:
    """At most three digits after which nobody looks, and no trailing zeros behind the point."""
    if number >= 100 or number == int(number):
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"

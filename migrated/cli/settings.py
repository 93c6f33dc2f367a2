"""``NAME=VALUE`` on the command line, for capabilities and parameters.

The rule of the file: names are not known here; the daemon's own answer says what type a parameter has, and the daemon
refuses what it does not know. Malformed words are ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from migrated.cli.units import parse_size

_SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def parse_switches(words: Iterable[str]) -> dict[str, bool]:
    """``["events=on"]`` -> ``{"events": True}``."""
    return {name: _parse_switch(name, value) for name, value in map(_split, words)}


def parse_values(words: Iterable[str], current: Mapping[str, Any]) -> dict[str, object]:
    """``["downtime-limit=500", "max-bandwidth=1G"]`` -> values of the types that ``current`` shows."""
    return {name: _parse_value(name, value, current.get(name)) for name, value in map(_split, words)}


def format_value(value: object) -> str:
    """The inverse: a value as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _split(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"'{word}' is not of the form NAME=VALUE")
    return name, value


def _parse_switch(name: str, value: str) -> bool:
    if value.lower() not in _SWITCHES:
        raise ValueError(f"{name} is on or off, not '{value}'")
    return _SWITCHES[value.lower()]


def _parse_value(name: str, value: str, current: object) -> object:
    match current:
        case bool():
            return _parse_switch(name, value)
        case int():
            return parse_size(value)
        case _:
            return value

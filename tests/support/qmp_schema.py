"""Checks values against a schema that a QMP server sent, as management software might.

The rule of the file: it knows introspection (SchemaInfo) and nothing of the server's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_BUILTIN: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "value": (object,),
}


class QmpSchema:
    """The answer of query-qmp-schema, by name."""

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        entries = list(entries)
        self.entries = {entry["name"]: entry for entry in entries}
        assert len(self.entries) == len(entries), "a name is listed twice"

    def references(self) -> set[str]:
        """Every name that some entry refers to."""
        found = set()
        for entry in self.entries.values():
            found |= {entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry}
            found |= {member["type"] for member in entry.get("members", ())}
        return found

    def members(self, name: str) -> dict[str, Mapping[str, Any]]:
        return {member["name"]: member for member in self.entries[name]["members"]}

    def check(self, name: str, value: object, where: str = "") -> None:
        """Assert that a value is of the type called ``name``."""
        entry = self.entries[name]
        match entry["meta-type"]:
            case "builtin":
                allowed = _BUILTIN[entry["json-type"]]
                assert isinstance(value, allowed), (where, name, value)
                assert allowed == (object,) or isinstance(value, bool) == (bool in allowed), (where, name, value)
            case "enum":
                assert value in entry["values"], (where, name, value)
            case "array":
                assert isinstance(value, list), (where, name, value)
                for i, item in enumerate(value):
                    self.check(entry["element-type"], item, f"{where}[{i}]")
            case "object":
                self._check_object(entry, value, where)
            case "alternate":
                assert any(self._fits(member["type"], value) for member in entry["members"]), (where, name, value)
            case other:
                raise AssertionError(f"{name} is a {other}, not a type")

    def _check_object(self, entry: Mapping[str, Any], value: object, where: str) -> None:
        assert isinstance(value, dict), (where, entry["name"], value)
        members = self.members(entry["name"])
        assert set(value) <= set(members), (where, entry["name"], set(value) - set(members))
        required = {name for name, member in members.items() if "default" not in member}
        assert required <= set(value), (where, entry["name"], required - set(value))
        for name, item in value.items():
            self.check(members[name]["type"], item, f"{where}.{name}")

    def _fits(self, name: str, value: object) -> bool:
        try:
            self.check(name, value)
        except AssertionError:
            return False
        return True

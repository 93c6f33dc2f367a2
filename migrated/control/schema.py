"""query-qmp-schema: the control protocol described in its own terms (QMP introspection, SchemaInfo).

The rule of the file: nothing is listed by hand. Commands and events come in as their table has them, types are found
by walking the structs that the table names, and every type referred to is in the list exactly once. QEMU hides type
names behind numbers because clients must not rely on them; here they are left readable, and mean as little.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec import inspect

from migrated.control.ports import CommandDescription, EventShapes

_BUILTINS = {"str": "string", "int": "int", "number": "number", "bool": "boolean", "null": "null", "any": "value"}


def build_schema(commands: Iterable[CommandDescription], events: EventShapes) -> list[dict[str, object]]:
    """Describe all commands, all events and every type they use, in this order."""
    catalogue = _Catalogue()
    described: list[dict[str, object]] = []
    for command in commands:
        entry: dict[str, object] = {
            "name": command.name,
            "ret-type": catalogue.refer(inspect.type_info(command.result)),
            "meta-type": "command",
            "arg-type": catalogue.refer(inspect.type_info(command.arguments)),
        }
        described.append({**entry, "features": ["unstable"]} if _is_unstable(command.name) else entry)
    for name, shape in events.items():
        data = catalogue.refer(inspect.type_info(shape))
        described.append({"name": name, "meta-type": "event", "arg-type": data})
    return described + list(catalogue.entries.values())


def _is_unstable(name: str) -> bool:
    """QEMU's names in x- may change; ours do not, their prefix only keeps them apart from QEMU's."""
    return name.startswith("x-") and not name.startswith("x-migrated-")


class _Catalogue:
    """The types referred to so far, by name."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, object]] = {}

    def refer(self, kind: inspect.Type) -> str:
        """Return the name under which a type is listed, adding it and what it needs."""
        match kind:
            case inspect.StrType():
                return self._builtin("str")
            case inspect.BoolType():
                return self._builtin("bool")
            case inspect.IntType():
                return self._builtin("int")
            case inspect.FloatType():
                return self._builtin("number")
            case inspect.NoneType():
                return self._builtin("null")
            case inspect.AnyType() | inspect.DictType():
                return self._builtin("any")
            case inspect.EnumType():
                return self._add(kind.cls.__name__, {"values": [item.value for item in kind.cls]}, "enum")
            case inspect.ListType():
                element = self.refer(kind.item_type)
                return self._add(f"[{element}]", {"element-type": element}, "array")
            case inspect.StructType():
                return self._object(kind)
            case inspect.UnionType():
                return self._alternate(kind)
            case _:
                raise NotImplementedError(f"QMP has no type like {kind!r}")

    def _builtin(self, name: str) -> str:
        return self._add(name, {"json-type": _BUILTINS[name]}, "builtin")

    def _object(self, kind: inspect.StructType) -> str:
        name = kind.cls.__name__
        if name not in self.entries:
            members: list[dict[str, object]] = []
            self._add(name, {"members": members}, "object")  # before its members, for the ones that refer to it
            members.extend(self._member(field) for field in kind.fields)
        return name

    def _member(self, field: inspect.Field) -> dict[str, object]:
        member: dict[str, object] = {"name": field.encode_name, "type": self.refer(field.type)}
        if not field.required:
            member["default"] = None  # QEMU's way to say "optional"
        if _is_unstable(field.encode_name):
            member["features"] = ["unstable"]
        return member

    def _alternate(self, kind: inspect.UnionType) -> str:
        names = [self.refer(one) for one in kind.types]
        title = "Or".join(name.capitalize() for name in names)
        return self._add(title, {"members": [{"type": name} for name in names]}, "alternate")

    def _add(self, name: str, body: dict[str, Any], meta_type: str) -> str:
        self.entries.setdefault(name, {"name": name, **body, "meta-type": meta_type})
        return name

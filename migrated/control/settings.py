"""Capabilities and parameters of a migration as command arguments and results.

The rule of the file: made from the tables of `model.parameters`, row by row; there is no second list of names. Types
and whether a member exists are checked here, ranges and what this version can do there.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from migrated.control.shape import Shape
from migrated.model.parameters import CAPABILITIES, PARAMETERS, Kind, Parameter


def _enum(name: str, values: Iterable[str]) -> Any:
    return Enum(name, {value.replace("-", "_").upper(): value for value in values}, type=str, module=__name__)


def _struct(name: str, fields: Iterable[tuple[str, Any] | tuple[str, Any, Any]]) -> type[Shape]:
    """A Shape whose fields are known at import only; ``fields`` have the names of QMP."""
    named = [(field[0].replace("-", "_"), *field[1:]) for field in fields]
    made = msgspec.defstruct(
        name, named, bases=(Shape,), module=__name__, frozen=True, rename="kebab", omit_defaults=True
    )
    assert issubclass(made, Shape)
    return made


MigrationCapability: Any = _enum("MigrationCapability", CAPABILITIES)
MigrationCapabilityStatus: Any = _struct(
    "MigrationCapabilityStatus", [("capability", MigrationCapability), ("state", bool)]
)
MigrateSetCapabilitiesArguments = _struct("MigrateSetCapabilities", [("capabilities", list[MigrationCapabilityStatus])])

_TYPES: dict[Kind, Any] = {
    Kind.SIZE: Annotated[int, Meta(ge=0)],
    Kind.UINT64: Annotated[int, Meta(ge=0)],
    Kind.UINT32: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)],
    Kind.UINT8: Annotated[int, Meta(ge=0, le=0xFF)],
    Kind.BOOL: bool,
    Kind.LIST: list[Any],
}


def _type_of(row: Parameter, texts: Any) -> Any:
    match row.kind:
        case Kind.ENUM:
            return _enum("".join(word.capitalize() for word in row.name.split("-")), row.choices)
        case Kind.STR:
            return texts
        case kind:
            return _TYPES[kind]


def _parameters(name: str, texts: Any) -> type[Shape]:
    types = {row.name: _type_of(row, texts) for row in PARAMETERS.values()}
    return _struct(name, [(parameter, kind | UnsetType, UNSET) for parameter, kind in types.items()])


MigrateSetParametersArguments = _parameters("MigrateSetParameters", str | None)
"""Any subset of the parameters; a string parameter may be set to null, which clears it."""

MigrationParameters = _parameters("MigrationParameters", str)
"""All parameters that have a value."""

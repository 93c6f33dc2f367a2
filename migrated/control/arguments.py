"""From a command's JSON arguments to its typed argument struct, refusing with the texts QEMU uses.

The rule of the file: the shapes of `shapes.py` are the only description of an argument; this module walks them as
`msgspec.inspect` shows them. msgspec could convert by itself, but management software logs and (against advice)
matches QEMU's sentences, so the sentences are made here. Source of the texts: QEMU 7.2, observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from migrated.errors import ArgumentError

ShapeT = TypeVar("ShapeT", bound=msgspec.Struct)

UINT64_MAX = (1 << 64) - 1
_C_TYPE = {0xFF: "uint8_t", 0xFFFF_FFFF: "uint32_t"}  # QEMU names the C type of the narrow ones, and says uint64 else


def convert_arguments(shape: type[ShapeT], arguments: Mapping[str, object]) -> ShapeT:
    """Build ``shape`` from a command's arguments. Raises ArgumentError with QEMU's text for the first thing wrong."""
    return shape(**_convert_members(_struct_type(shape), arguments, ""))


@cache
def _struct_type(shape: type[msgspec.Struct]) -> inspect.StructType:
    described = inspect.type_info(shape)
    assert isinstance(described, inspect.StructType)
    return described


def _convert_members(shape: inspect.StructType, members: Mapping[str, object], prefix: str) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for field in shape.fields:
        path = prefix + field.encode_name
        if field.encode_name in members:
            known[field.name] = _convert(field.type, members[field.encode_name], path)
        elif field.required:
            raise ArgumentError(f"Parameter '{path}' is missing")
    expected = {field.encode_name for field in shape.fields}
    for name in members:
        if name not in expected:
            raise ArgumentError(f"Parameter '{prefix}{name}' is unexpected")
    return known


def _convert(expected: inspect.Type, value: object, path: str) -> object:
    match expected:
        case inspect.UnionType():
            return _convert_alternative(value, path)
        case inspect.StrType():
            return _checked(value, str, "string", path)
        case inspect.BoolType():
            return _checked(value, bool, "boolean", path)
        case inspect.IntType():
            return _convert_integer(expected, value, path)
        case inspect.EnumType():
            return _convert_choice(expected, value, path)
        case inspect.ListType():
            items = _checked(value, list, "array", path)
            return [_convert(expected.item_type, item, f"{path}[{i}]") for i, item in enumerate(items)]
        case inspect.StructType():
            members = _checked(value, dict, "object", path)
            return expected.cls(**_convert_members(expected, members, path + "."))
        case inspect.AnyType():
            return value
        case _:
            raise NotImplementedError(f"no QMP argument is a {expected!r}")


def _checked(value: object, wanted: type[Any], name: str, path: str) -> Any:
    if not isinstance(value, wanted):
        raise ArgumentError(f"Invalid parameter type for '{path}', expected: {name}")
    return value


def _convert_integer(expected: inspect.IntType, value: object, path: str) -> int:
    """All integers that arrive are unsigned. As in QEMU, negative ones wrap around into 64 bits, not into fewer."""
    highest = UINT64_MAX if expected.le is None else expected.le
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentError(f"Parameter '{path}' expects uint64")
    if highest == UINT64_MAX and -(1 << 63) <= value < 0:
        return value + (1 << 64)
    if not 0 <= value <= highest:
        raise ArgumentError(f"Parameter '{path}' expects {_C_TYPE.get(highest, 'uint64')}")
    return value


def _convert_choice(expected: inspect.EnumType, value: object, path: str) -> object:
    text = _checked(value, str, "string", path)
    try:
        return expected.cls(text)
    except ValueError:
        # QEMU names the member only, without the way to it; of a list's element it says 'null', which helps nobody.
        raise ArgumentError(f"Parameter '{path.rpartition('.')[2]}' does not accept value '{text}'") from None


def _convert_alternative(value: object, path: str) -> object:
    """The only alternative among arguments is a string or null, which QEMU calls by this name."""
    if value is None or isinstance(value, str):
        return value
    raise ArgumentError(f"Invalid parameter type for '{path}', expected: StrOrNull")

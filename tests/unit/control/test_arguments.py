"""Conversion of arguments: whatever arrives becomes the command's struct or one of QEMU's sentences."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.control.arguments import convert_arguments
from migrated.control.commands import COMMANDS
from migrated.control.settings import MigrateSetParametersArguments
from migrated.control.shape import Shape
from migrated.errors import CommandError

NAMES = sorted(
    {field.encode_name for command in COMMANDS.values() for field in msgspec.structs.fields(command.arguments)}
    | {"capability", "state", "foo", ""}
)
WORDS = st.sampled_from(["events", "active", "none", "oob", "", "x"]) | st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)


class Odd(Shape, frozen=True):
    at: bytes


@given(st.sampled_from(sorted(COMMANDS)), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_arguments_are_taken_or_refused(name: str, arguments: dict[str, Any]) -> None:
    shape = COMMANDS[name].arguments
    try:
        converted = convert_arguments(shape, arguments)
    except CommandError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(("Parameter '", "Invalid parameter type for '"))
        return
    # What was taken is what was sent, but for numbers that wrap; msgspec itself accepts it as this shape.
    back = msgspec.to_builtins(converted)
    assert msgspec.convert(back, shape) == converted
    assert set(back) <= set(arguments)


def test_negative_numbers_wrap_into_64_bits_as_in_qemu() -> None:
    converted = convert_arguments(MigrateSetParametersArguments, {"max-bandwidth": -1})
    assert msgspec.to_builtins(converted) == {"max-bandwidth": 2**64 - 1}


def test_a_type_qmp_does_not_have_is_a_bug_here() -> None:
    with pytest.raises(NotImplementedError):
        convert_arguments(Odd, {"at": "x"})

"""Conversion of arguments beyond what today's commands use."""

from __future__ import annotations

import pytest

from migrated.control.arguments import convert_arguments
from migrated.control.settings import MigrateSetParametersArguments
from migrated.control.shapes import Shape


class Odd(Shape, frozen=True):
    at: bytes


def test_negative_numbers_wrap_into_64_bits_as_in_qemu() -> None:
    converted = convert_arguments(MigrateSetParametersArguments, {"max-bandwidth": -1})
    assert converted.max_bandwidth == 2**64 - 1  # type: ignore[attr-defined]


def test_a_type_qmp_does_not_have_is_a_bug_here() -> None:
    with pytest.raises(NotImplementedError):
        convert_arguments(Odd, {"at": "x"})

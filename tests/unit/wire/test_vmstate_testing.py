"""What authors test their descriptions with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from migrated.errors import RemoteProtocolError
from migrated.wire.vmstate import VMState, uint8
from migrated.wire.vmstate_testing import round_trip, transfer


class Old(VMState):
    """A device as it was."""

    name = "dev"
    fields = (uint8("a"),)


class New(VMState):
    """The device now."""

    name = "dev"
    version_id = 2
    minimum_version_id = 1
    fields = (uint8("a"), uint8("b", since=2))

    @staticmethod
    def pre_load(obj: Any) -> None:
        obj.b = 9


class Forgetful(Old):
    """A device whose load does not take what was saved."""

    @staticmethod
    def post_load(obj: Any, version_id: int) -> None:
        obj.a = 0


OBJECT = SimpleNamespace(a=1, b=2)


def test_a_round_trip() -> None:
    assert round_trip(New, OBJECT, SimpleNamespace()) == OBJECT


def test_a_round_trip_that_loses_something() -> None:
    with pytest.raises(AssertionError, match="dev: sent 01, and what was loaded saves as 00"):
        round_trip(Forgetful, OBJECT, SimpleNamespace())


def test_an_older_stream_into_a_newer_description() -> None:
    assert transfer(Old, OBJECT, New, SimpleNamespace()).b == 9
    assert transfer(New, OBJECT, New, SimpleNamespace(), version_id=1).b == 9


def test_a_refused_newer_stream() -> None:
    with pytest.raises(RemoteProtocolError, match="too new"):
        transfer(New, OBJECT, Old, SimpleNamespace())

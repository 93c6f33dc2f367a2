"""Versions, optional rows, subsections and hooks: what an older or newer stream does to an object."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from migrated.errors import LocalProtocolError, MigratedError, RemoteProtocolError, WorkloadError
from migrated.wire import vmstate as vm
from migrated.wire.vmdescription import described_bytes
from migrated.wire.vmstate import VMState, dump, parse_body, restore, save_state
from tests.unit.wire.cuts import refusal


class First(VMState):
    """A device as it was."""

    name = "dev"
    fields = (vm.uint8("a"),)


class Second(VMState):
    """The same device with a row more."""

    name = "dev"
    version_id = 3
    minimum_version_id = 1
    fields = (vm.uint8("a"), vm.uint8("b", since=2), vm.uint8("c", since=3))

    @staticmethod
    def pre_load(obj: Any) -> None:
        obj.b = obj.c = 0x77


OBJECT = SimpleNamespace(a=1, b=2, c=3)


def loaded(description: type[VMState], state: bytes, version_id: int, **given: Any) -> SimpleNamespace:
    obj = SimpleNamespace(**given)
    restore(description, obj, state, version_id)
    return obj


def test_an_older_stream_leaves_what_it_does_not_have_to_pre_load() -> None:
    assert loaded(Second, dump(First, OBJECT), 1) == SimpleNamespace(a=1, b=0x77, c=0x77)
    assert loaded(Second, dump(Second, OBJECT, version_id=2), 2) == SimpleNamespace(a=1, b=2, c=0x77)
    assert loaded(Second, dump(Second, OBJECT), 3) == OBJECT


def test_a_newer_stream_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="dev: incoming version_id 3 is too new for local version_id 1"):
        loaded(First, dump(Second, OBJECT), 3)


def test_a_stream_that_is_too_old_is_refused_before_anything_is_touched() -> None:
    class Strict(Second):
        version_id = 3
        minimum_version_id = 3

    with pytest.raises(
        RemoteProtocolError, match="dev: incoming version_id 2 is too old for local minimum version_id  3"
    ):
        loaded(Strict, b"\1\2", 2)


def test_without_a_minimum_only_the_present_version_is_read() -> None:
    class Bumped(First):
        version_id = 2

    with pytest.raises(RemoteProtocolError, match="too old"):
        loaded(Bumped, b"\1", 1)
    assert loaded(Bumped, b"\1", 2).a == 1


@pytest.mark.parametrize("version_id", [0, 4])
def test_no_other_version_is_saved(version_id: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"dev has no version {version_id} any more, or yet"):
        dump(Second, OBJECT, version_id)


def test_a_row_may_be_there_or_not() -> None:
    class Optional(VMState):
        name = "dev"
        fields = (vm.boolean("has"), vm.pointer("x", First, when=lambda obj, version_id: obj.has))

    there, gone = SimpleNamespace(has=True, x=SimpleNamespace(a=5)), SimpleNamespace(has=False, x=None)
    assert dump(Optional, there) == bytes.fromhex("0105")
    assert dump(Optional, gone) == bytes.fromhex("00")
    assert loaded(Optional, b"\1\5", 1, x=SimpleNamespace()) == there
    assert loaded(Optional, b"\0", 1, x=None) == gone


def test_arrays_of_what_may_vary_are_described_one_by_one() -> None:
    class Element(VMState):
        name = "element"
        fields = (vm.uint8("n"), vm.uint8("x", when=lambda obj, version_id: obj.n > 1))

    class Table(VMState):
        name = "dev"
        fields = (vm.array("e", Element, 2),)

    one = SimpleNamespace(n=1)
    saved = save_state(Table, SimpleNamespace(e=[one, SimpleNamespace(n=2, x=3)]))
    assert saved.state == bytes.fromhex("010203")
    assert [(entry["index"], entry["size"]) for entry in saved.described["fields"]] == [(0, 1), (1, 2)]
    alike = save_state(Table, SimpleNamespace(e=[one, one]))
    assert [(entry["index"], entry["size"]) for entry in alike.described["fields"]] == [(0, 1), (1, 1)]


def test_a_struct_travels_as_todays_version_and_a_vstruct_as_its_own() -> None:
    class Outer(VMState):
        name = "outer"
        fields = (vm.struct("now", Second), vm.vstruct("then", Second, 2), vm.qtailq("old", Second, version_id=1))

    state = dump(Outer, SimpleNamespace(now=OBJECT, then=OBJECT, old=[OBJECT]))
    assert state == bytes.fromhex("0102030102010100")
    outer = loaded(Outer, state, 1)
    assert (outer.now, outer.then.c, outer.old[0].b) == (OBJECT, 0x77, 0x77)


def test_rows_of_one_name_are_numbered_in_the_description() -> None:
    class Registers(VMState):
        name = "cpu"
        version_id = 2
        minimum_version_id = 1
        fields = (
            vm.uint8("cr", attribute="cr0"),
            vm.uint8("cr", attribute="cr1", since=2),
            vm.uint8("cr", attribute="cr2"),
            vm.uint8("eip"),
        )

    saved = save_state(Registers, SimpleNamespace(cr0=0, cr1=1, cr2=2, eip=3), version_id=1)
    assert [entry["name"] for entry in saved.described["fields"]] == ["cr[0]", "cr[2]", "eip"]


# -- validation ----------------------------------------------------------------------------------------------------


def test_a_check_holds_at_both_ends() -> None:
    class Checked(VMState):
        name = "dev"
        fields = (vm.uint8("a"), vm.validate("a is even", lambda obj, version_id: obj.a % 2 == 0), vm.uint8("b"))

    assert dump(Checked, SimpleNamespace(a=2, b=1)) == bytes.fromhex("0201")
    assert loaded(Checked, b"\2\1", 1) == SimpleNamespace(a=2, b=1)
    with pytest.raises(LocalProtocolError, match="Input validation failed: dev/a is even"):
        dump(Checked, SimpleNamespace(a=1, b=1))
    assert (
        refusal(lambda: parse_body(Checked, SimpleNamespace(), 1), b"\1\1") == "Input validation failed: dev/a is even"
    )


def test_a_check_may_be_of_a_struct_in_an_array() -> None:
    class Even(VMState):
        name = "even"
        fields = (vm.uint8("a"), vm.validate("a is even", lambda obj, version_id: obj.a % 2 == 0))

    class Table(VMState):
        name = "dev"
        fields = (vm.array("e", Even, 2),)

    evens = SimpleNamespace(e=[SimpleNamespace(a=2), SimpleNamespace(a=4)])
    assert save_state(Table, evens).described["fields"][0]["array_len"] == 2
    with pytest.raises(RemoteProtocolError, match=r"dev:e: \[1\] Input validation failed: even/a is even"):
        loaded(Table, b"\2\3", 1)


# -- subsections ---------------------------------------------------------------------------------------------------


class Deep(VMState):
    """A subsection of a subsection."""

    name = "dev/alarm/deep"
    version_id = 7
    fields = (vm.uint8("deep"),)

    @staticmethod
    def needed(obj: Any) -> bool:
        return bool(obj.deep)


class Alarm(VMState):
    """A subsection that is left out where there is nothing to say."""

    name = "dev/alarm"
    version_id = 2
    minimum_version_id = 1
    fields = (vm.uint8("alarm"), vm.uint8("tone", since=2))
    subsections = (Deep,)

    @staticmethod
    def needed(obj: Any) -> bool:
        return bool(obj.alarm)


class Always(VMState):
    """A subsection that is always sent."""

    name = "dev/always"
    fields = (vm.uint8("always"),)


class Nested(VMState):
    """A device with two subsections, one of which has one itself."""

    name = "dev"
    fields = (vm.uint8("a"),)
    subsections = (Alarm, Always)

    @staticmethod
    def pre_load(obj: Any) -> None:
        obj.alarm = obj.tone = obj.deep = 0


def head(name: str, version_id: int) -> bytes:
    return b"\5" + bytes([len(name)]) + name.encode() + version_id.to_bytes(4, "big")


FULL = SimpleNamespace(a=1, alarm=2, tone=3, deep=4, always=5)
FULL_STATE = (
    b"\1" + head("dev/alarm", 2) + b"\2\3" + head("dev/alarm/deep", 7) + b"\4" + head("dev/always", 1) + b"\5"
)  # fmt: skip


def test_subsections_with_subsections() -> None:
    saved = save_state(Nested, FULL)
    assert saved.state == FULL_STATE
    assert saved.described == {
        "vmsd_name": "dev", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}],
        "subsections": [
            {
                "vmsd_name": "dev/alarm", "version": 2,
                "fields": [{"name": "alarm", "type": "uint8", "size": 1}, {"name": "tone", "type": "uint8", "size": 1}],
                "subsections": [
                    {"vmsd_name": "dev/alarm/deep", "version": 7,
                     "fields": [{"name": "deep", "type": "uint8", "size": 1}]}
                ],
            },
            {"vmsd_name": "dev/always", "version": 1, "fields": [{"name": "always", "type": "uint8", "size": 1}]},
        ],
    }  # fmt: skip
    assert described_bytes(saved.described) == len(FULL_STATE)
    assert loaded(Nested, FULL_STATE, 1) == FULL


def test_what_is_not_needed_is_left_out() -> None:
    quiet = SimpleNamespace(a=1, alarm=0, tone=3, deep=4, always=5)
    state = dump(Nested, quiet)
    assert state == b"\1" + head("dev/always", 1) + b"\5"
    assert loaded(Nested, state, 1) == SimpleNamespace(a=1, alarm=0, tone=0, deep=0, always=5)
    assert loaded(Nested, b"\1", 1) == SimpleNamespace(a=1, alarm=0, tone=0, deep=0)


def test_subsections_come_in_any_order_and_in_older_versions() -> None:
    state = b"\1" + head("dev/always", 1) + b"\5" + head("dev/alarm", 1) + b"\2"
    assert loaded(Nested, state, 1) == SimpleNamespace(a=1, always=5, alarm=2, tone=0, deep=0)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (head("dev/mystery", 1), "subsection dev/mystery of dev is unknown here"),
        (head("device", 1), "subsection device of dev is unknown here"),
        (head("dev/always", 1) + b"\5" + head("dev/always", 1), "subsection dev/always of dev is here twice"),
        (head("dev/always", 2), "dev/always: incoming version_id 2 is too new for local version_id 1"),
        (head("dev/alarm", 0), "dev/alarm: incoming version_id 0 is too old for local minimum version_id  1"),
        (
            head("dev/alarm", 2) + b"\2\3" + head("dev/alarm/x", 1),
            "subsection dev/alarm/x of dev/alarm is unknown here",
        ),
        (head("dev/\n", 1), "the name of a subsection has characters that cannot be printed"),
    ],
)
def test_subsections_that_are_refused(more: bytes, why: str) -> None:
    assert refusal(lambda: parse_body(Nested, SimpleNamespace(), 1), b"\1" + more).startswith(why)


@pytest.mark.parametrize("rest", [b"\5", b"\5\3dev", b"\5\5other", b"\5\x08device", b"\4\x09dev/alarm"])
def test_what_is_not_ours_is_left_to_whom_it_belongs(rest: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        restore(Nested, SimpleNamespace(), b"\1" + rest, 1)
    text = str(refused.value)
    assert "goes on behind its end" in text or "truncated" in text


class Struct(VMState):
    """A struct with a subsection of its own."""

    name = "inner"
    fields = (vm.uint8("a"),)
    subsections = (type("Extra", (VMState,), {"name": "inner/extra", "fields": (vm.uint8("extra"),),
                                              "needed": staticmethod(lambda obj: obj.extra)}),)  # fmt: skip


class Around(VMState):
    """The subsection of the struct stands in the middle of this one's rows."""

    name = "outer"
    fields = (vm.struct("x", Struct), vm.uint8("type"), vm.capability("text"))
    subsections = (type("More", (VMState,), {"name": "outer/more", "fields": (vm.uint8("more"),)}),)


@pytest.mark.parametrize("extra", [0, 9])
def test_a_row_that_looks_like_a_subsection_is_a_row(extra: int) -> None:
    around = SimpleNamespace(x=SimpleNamespace(a=1, extra=extra), type=5, text="other", more=4)
    state = dump(Around, around)
    middle = head("inner/extra", 1) + b"\x09" if extra else b""
    assert state == b"\1" + middle + b"\5\5other" + head("outer/more", 1) + b"\4"
    assert loaded(Around, state, 1, x=SimpleNamespace(extra=0)) == around


def test_structs_with_subsections_are_described_one_by_one() -> None:
    class Table(VMState):
        name = "dev"
        fields = (vm.array("s", Struct, 2),)

    saved = save_state(Table, SimpleNamespace(s=[SimpleNamespace(a=1, extra=0), SimpleNamespace(a=2, extra=3)]))
    assert ["subsections" in entry["struct"] for entry in saved.described["fields"]] == [False, True]
    assert described_bytes(saved.described) == len(saved.state)


# -- hooks ---------------------------------------------------------------------------------------------------------


def hooked(calls: list[str], fail: str = "", error: Exception | None = None) -> type[VMState]:
    """Return a description whose hooks say that they ran, one of which fails."""

    def hook(name: str) -> staticmethod[..., None]:
        def run(obj: Any, *more: Any) -> None:
            calls.append(name + "".join(f" {one}" for one in more))
            if name == fail:
                raise error or ValueError("no")

        return staticmethod(run)

    hooks = {name: hook(name) for name in ("pre_save", "post_save", "pre_load", "post_load")}
    return type("Hooked", (First,), {"minimum_version_id": 0, **hooks})


def test_hooks_in_their_order() -> None:
    calls: list[str] = []
    state = dump(hooked(calls), SimpleNamespace(a=1))
    restore(hooked(calls), SimpleNamespace(), state, 0)
    assert calls == ["pre_save", "post_save", "pre_load", "post_load 0"]


def test_post_save_is_called_when_saving_failed() -> None:
    calls: list[str] = []
    with pytest.raises(LocalProtocolError):
        dump(hooked(calls), SimpleNamespace(a=256))
    assert calls == ["pre_save", "post_save"]


@pytest.mark.parametrize("hook", ["pre_save", "post_save", "pre_load", "post_load"])
def test_a_hook_that_raises_is_named(hook: str) -> None:
    with pytest.raises(MigratedError, match=hook.replace("_", "-") + r" failed: dev: ValueError\('no'\)"):
        restore(hooked([], hook), SimpleNamespace(), dump(hooked([], hook), SimpleNamespace(a=1)), 1)


def test_an_error_of_this_package_keeps_its_type() -> None:
    with pytest.raises(WorkloadError):
        dump(hooked([], "pre_save", WorkloadError("w", "gone")), SimpleNamespace(a=1))


# -- descriptions that cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({}, "Wrong.name must be 1 to 255 printable bytes, not ''"),
        ({"name": "x" * 256}, "Wrong.name must be"),
        ({"name": "a\nb"}, "Wrong.name must be"),
        ({"name": "x", "version_id": 1, "minimum_version_id": 2}, "x: versions must be"),
        ({"name": "x", "version_id": 1 << 32}, "x: versions must be"),
        ({"name": "x", "fields": (vm.uint8("a", since=2),)}, "x: row 'a' is there since 2, beyond version_id 1"),
        (
            {"name": "x", "subsections": (Always,)},
            "x: its subsections have different names, x/SUFFIX, and not 'dev/",
        ),
        ({"name": "dev", "subsections": (Always, Always)}, "dev: its subsections have different names"),
    ],
)
def test_a_description_that_no_stream_could_carry(members: dict[str, Any], why: str) -> None:
    with pytest.raises(TypeError) as refused:
        type("Wrong", (VMState,), members)
    assert str(refused.value).startswith(why)

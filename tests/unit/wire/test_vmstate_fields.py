"""Every kind of row, in both directions, against bytes made by hand from the description of the format."""

from __future__ import annotations

import math
import struct as packer
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire import vmstate as vm
from migrated.wire.pull import feed
from migrated.wire.vmdescription import described_bytes
from migrated.wire.vmstate import VMState, dump, parse_body, restore, save_state
from migrated.wire.vmstate_rows import Loading, Row
from migrated.wire.vmstate_table import load_state
from tests.unit.wire.cuts import largest_piece, refusal


def table(*rows: Row, version_id: int = 1) -> type[VMState]:
    """Return a description of these rows."""
    return type("Table", (VMState,), {"name": "dev", "version_id": version_id, "fields": rows})


class Item(VMState):
    """A struct of three bytes."""

    name = "item"
    fields = (vm.uint8("kind"), vm.uint16("value"))


@dataclass
class Pair:
    """An object of a type of its own."""

    kind: int = 0
    value: int = 0


class PairItem(Item):
    """The same table, and objects of that type."""

    name = "item"
    new = Pair


ITEM = {"vmsd_name": "item", "version": 1, "fields": [
    {"name": "kind", "type": "uint8", "size": 1}, {"name": "value", "type": "uint16", "size": 2}]}  # fmt: skip


def entry(kind: str, size: int) -> dict[str, Any]:
    return {"name": "x", "type": kind, "size": size}


def items(*pairs: tuple[int, int]) -> list[Pair]:
    return [Pair(*pair) for pair in pairs]


#: row, value, bytes in hex, entries of the VMDESCRIPTION
VECTORS: list[tuple[Row, Any, str, list[dict[str, Any]]]] = [
    (vm.boolean("x"), True, "01", [entry("bool", 1)]),
    (vm.boolean("x"), False, "00", [entry("bool", 1)]),
    (vm.int8("x"), -2, "fe", [entry("int8", 1)]),
    (vm.int16("x"), -2, "fffe", [entry("int16", 2)]),
    (vm.int32("x"), -2, "fffffffe", [entry("int32", 4)]),
    (vm.int64("x"), -2, "fffffffffffffffe", [entry("int64", 8)]),
    (vm.uint8("x"), 0x81, "81", [entry("uint8", 1)]),
    (vm.uint16("x"), 0x8123, "8123", [entry("uint16", 2)]),
    (vm.uint32("x"), 0x81234567, "81234567", [entry("uint32", 4)]),
    (vm.uint64("x"), 0x8123456789ABCDEF, "8123456789abcdef", [entry("uint64", 8)]),
    (vm.timer("x"), 1_000_000_000, "000000003b9aca00", [entry("timer", 8)]),
    (vm.timer("x"), None, "ffffffffffffffff", [entry("timer", 8)]),
    (vm.cpu_double_u("x"), -1.5, "bff8000000000000", [entry("CPU_Double_U", 8)]),
    (vm.capability("x"), "xbzrle", "0678627a726c65", [entry("capability", 7)]),
    (vm.capability("x"), "", "00", [entry("capability", 1)]),
    (vm.buffer("x", 3), b"abc", "616263", [entry("buffer", 3)]),
    (vm.bitmap("x", 3), 0b101, "0000000000000005", [entry("bitmap", 8)]),
    # Word 0 holds bits 0 to 63, each word is big-endian.
    (vm.bitmap("x", 66), 1 << 65 | 1, "0000000000000001 0000000000000002", [entry("bitmap", 16)]),
    (vm.struct("x", PairItem), Pair(7, 0x1234), "071234",
     [{"name": "x", "type": "struct", "struct": ITEM, "size": 3}]),
    (vm.pointer("x", PairItem, alloc=True), Pair(7, 0x1234), "071234",
     [{"name": "x", "type": "struct", "struct": ITEM, "size": 3}]),
    (vm.pointer("x", vm.uint16, alloc=True), 5, "0005", [entry("uint16", 2)]),
    (vm.array("x", vm.uint16, 3), [1, 2, 3], "000100020003",
     [{"name": "x", "array_len": 3, "type": "uint16", "size": 2}]),
    (vm.array("x", vm.uint16, 1), [1], "0001", [entry("uint16", 2)]),
    (vm.array("x", vm.uint16, 0), [], "", []),
    (vm.array("x", vm.boolean, 2), [True, False], "0100", [{"name": "x", "array_len": 2, "type": "bool", "size": 1}]),
    (vm.array("x", vm.timer, 2), [None, 1], "ffffffffffffffff 0000000000000001",
     [{"name": "x", "array_len": 2, "type": "timer", "size": 8}]),
    (vm.array("x", PairItem, 2), items((1, 2), (3, 4)), "010002 030004",
     [{"name": "x", "array_len": 2, "type": "struct", "struct": ITEM, "size": 3}]),
    (vm.array("x", vm.capability, 2), ["a", "bc"], "0161 026263",
     [{"name": "x", "index": 0, "type": "capability", "size": 2},
      {"name": "x", "index": 1, "type": "capability", "size": 3}]),
    (vm.array_2d("x", vm.uint8, 2, 3), [[1, 2, 3], [4, 5, 6]], "010203040506",
     [{"name": "x", "array_len": 6, "type": "uint8", "size": 1}]),
    (vm.array_of_pointer("x", vm.uint8, 2), [None, None], "3030",
     [{"name": "x", "index": 0, "type": "nullptr", "size": 1},
      {"name": "x", "index": 1, "type": "nullptr", "size": 1}]),
    (vm.qtailq("x", PairItem), items((1, 2), (3, 4)), "01010002 01030004 00", [entry("qtailq", 9)]),
    (vm.qtailq("x", PairItem), [], "00", [entry("qtailq", 1)]),
    (vm.qlist("x", PairItem), items((1, 2)), "01010002 00", [entry("qlist", 5)]),
    (vm.gtree("x", PairItem), {9: Pair(1, 2), 3: Pair(3, 4)},
     "00000002 010000000000000003 03000401 0000000000000009010002 00", [entry("gtree", 29)]),
    (vm.gtree("x", PairItem), {}, "00000000 00", [entry("gtree", 5)]),
    (vm.gtree("x", PairItem, key=PairItem), [(Pair(9, 9), Pair(1, 2))],
     "00000001 01090009 010002 00", [entry("gtree", 12)]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "value", "wire", "entries"), VECTORS, ids=lambda v: v if isinstance(v, str) else None)
def test_vectors(row: Row, value: Any, wire: str, entries: list[dict[str, Any]]) -> None:
    saved = save_state(table(row), SimpleNamespace(x=value))
    assert saved.state == bytes.fromhex(wire)
    assert saved.described == {"vmsd_name": "dev", "version": 1, "fields": entries}
    assert described_bytes(saved.described) == len(saved.state)
    loaded = SimpleNamespace()
    restore(table(row), loaded, saved.state, 1)
    assert loaded.x == value


@pytest.mark.parametrize(("row", "value", "wire", "entries"), VECTORS, ids=lambda v: v if isinstance(v, str) else None)
def test_every_shorter_state_is_refused(row: Row, value: Any, wire: str, entries: list[dict[str, Any]]) -> None:
    state = bytes.fromhex(wire)
    for length in range(len(state)):
        with pytest.raises(RemoteProtocolError, match="truncated"):
            restore(table(row), SimpleNamespace(), state[:length], 1)
    with pytest.raises(RemoteProtocolError, match="goes on behind its end, expected nothing, found 0x00"):
        restore(table(row), SimpleNamespace(), state + b"\0", 1)


@pytest.mark.parametrize(
    ("row", "value", "why"),
    [
        (vm.uint8("x"), 256, "no uint8: "),
        (vm.uint8("x"), "1", "no uint8: "),
        (vm.int8("x"), -129, "no int8: "),
        (vm.array("x", vm.uint8, 2), [1, 256], "no uint8: "),
        (vm.timer("x"), 1 << 63, "no timer: "),
        (vm.array("x", vm.uint8, 2), [1], "expected 2 elements, found 1"),
        (vm.array("x", vm.uint8, 2), [1, 2, 3], "expected 2 elements, found 3"),
        (vm.sub_array("x", vm.uint8, 1, 2), [1, 2], "expected 2 elements, found 1"),
        (vm.array_2d("x", vm.uint8, 2, 2), [[1, 2], [3]], "expected 4 elements, found 3"),
        (vm.buffer("x", 2), b"abc", "expected 2 bytes, found 3"),
        (vm.bitmap("x", 3), 8, "no bitmap of 3 bits: 0x8"),
        (vm.bitmap("x", 3), -1, "no bitmap of 3 bits: -0x1"),
        (vm.struct("x", Item), None, "there is no item"),
        (vm.pointer("x", Item), None, "the pointer leads nowhere"),
        (vm.struct("x", Item), Pair(0x100, 0), "Save of field item/kind failed: no uint8: "),
        (vm.qlist("x", Item, limit=1), items((1, 2), (3, 4)), "at most 1 elements, not 2"),
        (vm.gtree("x", Item, limit=1), {1: Pair(), 2: Pair()}, "at most 1 nodes, not 2"),
        (vm.gtree("x", Item), {-1: Pair()}, "can't convert negative int to unsigned"),
        (vm.capability("x"), "a" * 256, "a counted string has at most 255 bytes"),
        (vm.uint8("y"), 1, "has no attribute 'y'"),
    ],
)
def test_a_value_that_is_not_what_its_row_says_is_not_saved(row: Row, value: Any, why: str) -> None:
    with pytest.raises(LocalProtocolError) as refused:
        dump(table(row), SimpleNamespace(x=value))
    assert str(refused.value).startswith(f"Save of field dev/{row.name} failed: ")
    assert why in str(refused.value)


TWICE = "00000002 01 0000000000000003 030004 01 0000000000000003 030004 00"


@pytest.mark.parametrize(
    ("row", "wire", "why"),
    [
        (vm.boolean("x"), "02", "dev:x: no bool"),
        (vm.bitmap("x", 3), "0000000000000008", "dev:x: bits beyond the end of a bitmap"),
        (vm.array("x", vm.boolean, 2), "0102", "dev:x: [1] no bool"),
        (vm.array("x", table(vm.boolean("b")), 2), "0102", "dev:x: [1] Failed to load dev:b: no bool"),
        (vm.array_of_pointer("x", vm.uint8, 1), "31", "dev:x: [0] get_nullptr expected VMS_NULLPTR_MARKER"),
        (vm.qtailq("x", Item), "02", "dev:x: neither another element nor the end"),
        (vm.qtailq("x", Item, limit=1), "01010002 01010002 00", "dev:x: a list that is too long"),
        (vm.gtree("x", Item, limit=1), "00000002", "dev:x: a count out of range"),
        (vm.gtree("x", Item), "ffffffff", "dev:x: a count out of range"),
        (vm.gtree("x", Item), "00000001 00", "dev:x: a tree that ends early"),
        (vm.gtree("x", Item), "00000000 01", "dev:x: a tree that goes on"),
        (vm.gtree("x", Item), TWICE, "dev:x: a tree with a key twice"),
        (vm.capability("x"), "0100", "dev:x: a text has characters that cannot be printed"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_row(row: Row, wire: str, why: str) -> None:
    assert refusal(lambda: parse_body(table(row), SimpleNamespace(), 1), bytes.fromhex(wire)) == f"Failed to load {why}"


def test_a_refusal_says_where_it_began() -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        restore(table(vm.uint32("a"), vm.boolean("x")), SimpleNamespace(), bytes.fromhex("0000000007"), 1)
    assert str(refused.value) == "Failed to load dev:x: no bool, expected 0 or 1, found 7 (stream offset 0x4)"


# -- sizes that the stream gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [vm.uint8, vm.uint16, vm.uint32, vm.int32])
def test_a_varray_has_as_many_elements_as_an_earlier_row_says(kind: Any) -> None:
    counted = table(kind("n"), vm.varray("x", PairItem, "n"))
    state = dump(counted, SimpleNamespace(n=2, x=items((1, 2), (3, 4))))
    assert state.hex().endswith("02010002030004")
    loaded = SimpleNamespace(x=items((9, 9), (9, 9), (9, 9)))
    first = loaded.x[0]
    restore(counted, loaded, state, 1)
    assert loaded.x == items((1, 2), (3, 4))
    assert loaded.x[0] is first, "what is there is loaded in place"


def test_sizes_may_be_multiples() -> None:
    rows = (
        vm.uint8("n"),
        vm.varray("x", vm.uint8, "n", multiply=2),
        vm.vbuffer("b", "n", multiply=3),
        vm.bitmap("m", "n"),
    )
    state = dump(table(*rows), SimpleNamespace(n=2, x=[1, 2, 3, 4], b=b"abcdef", m=3))
    assert state == bytes.fromhex("02010203046162636465660000000000000003")
    loaded = SimpleNamespace()
    restore(table(*rows), loaded, state, 1)
    assert (loaded.x, loaded.b, loaded.m) == ([1, 2, 3, 4], b"abcdef", 3)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (vm.varray("x", vm.uint8, "n"), "a count out of range"),
        (vm.varray("x", vm.uint8, "n", multiply=1 << 20, limit=1 << 16), "a count out of range"),
        (vm.vbuffer("x", "n"), "a size out of range"),
        (vm.bitmap("x", "n"), "a size out of range"),
    ],
)
@pytest.mark.parametrize("count", ["7fffffff", "80000000", "ffffffff"])
def test_no_count_is_believed(row: Row, why: str, count: str) -> None:
    hostile = table(vm.int32("n"), row)
    assert refusal(lambda: parse_body(hostile, SimpleNamespace(), 1), bytes.fromhex(count)).endswith(why)


@pytest.mark.parametrize("count", [-1, 3])
def test_a_count_that_is_out_of_bounds_is_not_saved(count: int) -> None:
    with pytest.raises(LocalProtocolError, match=r"dev/x failed: 'n' must be 0 to 2, not"):
        dump(table(vm.int32("n"), vm.varray("x", vm.uint8, "n", limit=2)), SimpleNamespace(n=count, x=[1, 2, 3]))


def test_lists_in_lists_are_bounded_together() -> None:
    inner = type("Inner", (VMState,), {"name": "inner", "fields": (vm.uint32("n"), vm.varray("x", Nothing, "n"))})
    outer = table(vm.qtailq("lists", inner))
    one = bytes.fromhex("010000000a")
    bounded = load_state(outer, SimpleNamespace(), 1, Loading(elements_max=100))
    with pytest.raises(RemoteProtocolError, match="too many elements, expected at most 100 in one body, found more"):
        feed(bounded, [one * 10])


class Nothing(VMState):
    """An element without a byte: it costs a hostile source nothing."""

    name = "nothing"


def test_large_arrays_come_in_pieces() -> None:
    large = table(vm.buffer("x", 200_000), vm.array("y", vm.uint64, 20_000))
    value = SimpleNamespace(x=bytes(range(250)) * 800, y=list(range(20_000)))
    state = dump(large, value)
    assert largest_piece(parse_body(large, SimpleNamespace(), 1), state) == 64 << 10
    loaded = SimpleNamespace()
    restore(large, loaded, state, 1)
    assert loaded == value


def test_a_body_has_a_limit_in_all() -> None:
    many = table(vm.uint32("n"), vm.varray("x", vm.uint64, "n"))
    bounded = load_state(many, SimpleNamespace(), 1, Loading(5, body_max_bytes=100))
    with pytest.raises(RemoteProtocolError, match="too much state, expected at most 100 bytes"):
        feed(bounded, [(13).to_bytes(4, "big")])


# -- what is ours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        (vm.uint8_equal, "05"),
        (vm.uint16_equal, "0005"),
        (vm.uint32_equal, "00000005"),
        (vm.int32_equal, "00000005"),
        (vm.int64_equal, "0000000000000005"),
    ],
)
def test_both_ends_must_agree(kind: Any, wire: str) -> None:
    assert dump(table(kind("x")), SimpleNamespace(x=5)) == bytes.fromhex(wire)
    restore(table(kind("x")), SimpleNamespace(x=5), bytes.fromhex(wire), 1)
    with pytest.raises(RemoteProtocolError, match=r"dev:x: 5 != 1a, expected 26, found 5"):
        restore(table(kind("x")), SimpleNamespace(x=26), bytes.fromhex(wire), 1)
    with pytest.raises(LocalProtocolError, match=r"dev:x: there is nothing to hold the .* equal of the stream against"):
        restore(table(kind("x")), SimpleNamespace(), bytes.fromhex(wire), 1)


@pytest.mark.parametrize(("value", "fits"), [(0, True), (5, True), (6, False), (-1, False)])
def test_at_most_what_it_is_here(value: int, fits: bool) -> None:
    state = dump(table(vm.int32_le("x")), SimpleNamespace(x=value))
    here = SimpleNamespace(x=5)
    if fits:
        restore(table(vm.int32_le("x")), here, state, 1)
        assert here.x == value
    else:
        with pytest.raises(RemoteProtocolError, match="expected at most 5, found"):
            restore(table(vm.int32_le("x")), here, state, 1)


def test_checked_numbers_in_arrays() -> None:
    sizes = table(vm.array("x", vm.uint8_equal, 2))
    restore(sizes, SimpleNamespace(x=[1, 2]), b"\1\2", 1)
    with pytest.raises(RemoteProtocolError, match=r"\[1\] 3 != 2"):
        restore(sizes, SimpleNamespace(x=[1, 2]), b"\1\3", 1)


def test_a_bytearray_is_filled_in_place() -> None:
    memory = bytearray(b"old")
    here = SimpleNamespace(x=memory)
    restore(table(vm.buffer("x", 3)), here, b"new", 1)
    assert here.x is memory
    assert memory == b"new"


def test_structs_and_pointers_are_filled_in_place() -> None:
    pair, other = Pair(), Pair()
    here = SimpleNamespace(x=pair, y=other)
    restore(table(vm.struct("x", Item), vm.pointer("y", Item)), here, bytes.fromhex("010002030004"), 1)
    assert (here.x, here.y) == (Pair(1, 2), Pair(3, 4))
    assert here.x is pair
    assert here.y is other


def test_a_pointer_that_leads_nowhere_is_not_loaded() -> None:
    with pytest.raises(LocalProtocolError, match="dev:x: the pointer leads nowhere; make the object first"):
        restore(table(vm.pointer("x", Item)), SimpleNamespace(x=None), bytes.fromhex("010002"), 1)


def test_an_object_without_type_is_made_where_none_is_named() -> None:
    here = SimpleNamespace()
    restore(table(vm.struct("x", Item)), here, bytes.fromhex("010002"), 1)
    assert here.x == SimpleNamespace(kind=1, value=2)


def test_a_part_of_a_list() -> None:
    part = table(vm.sub_array("x", vm.uint8, 1, 2))
    assert dump(part, SimpleNamespace(x=[1, 2, 3, 4])) == b"\2\3"
    here = SimpleNamespace(x=[9, 9, 9, 9])
    same = here.x
    restore(part, here, b"\2\3", 1)
    assert here.x == [9, 2, 3, 9]
    assert here.x is same
    for short in ([9, 9], None, (9, 9, 9)):
        with pytest.raises(LocalProtocolError, match="'x' must be a list of at least 3 elements"):
            restore(part, SimpleNamespace(x=short), b"\2\3", 1)


def test_the_first_part_of_a_list() -> None:
    part = table(vm.sub_array("x", vm.uint8, 0, 2))
    assert dump(part, SimpleNamespace(x=[1, 2, 3])) == b"\1\2"
    here = SimpleNamespace(x=[9, 9, 9])
    restore(part, here, b"\1\2", 1)
    assert here.x == [1, 2, 9]


def test_an_array_of_pointers_knows_at_both_ends_where_there_is_nothing() -> None:
    slots = table(vm.array_of_pointer("x", PairItem, 3))
    saved = save_state(slots, SimpleNamespace(x=[None, Pair(1, 2), None]))
    assert saved.state == bytes.fromhex("3001000230")
    assert [(e["index"], e["type"], e["size"]) for e in saved.described["fields"]] == [
        (0, "nullptr", 1), (1, "struct", 3), (2, "nullptr", 1)]  # fmt: skip
    here = SimpleNamespace(x=[None, Pair(), None])
    restore(slots, here, saved.state, 1)
    assert here.x == [None, Pair(1, 2), None]


def test_what_was_there_once_is_zeros_and_ignored() -> None:
    gone = table(vm.uint8("a"), vm.unused(3), vm.uint8("b"))
    saved = save_state(gone, SimpleNamespace(a=1, b=2))
    assert saved.state == bytes.fromhex("0100000002")
    assert saved.described["fields"][1] == {"name": "unused", "type": "unused_buffer", "size": 3}
    here = SimpleNamespace()
    restore(gone, here, bytes.fromhex("01deadbe02"), 1)
    assert here == SimpleNamespace(a=1, b=2)


def test_a_temporary_object() -> None:
    class Halves(VMState):
        name = "halves"
        fields = (vm.uint8("high"), vm.uint8("low"))

        @staticmethod
        def pre_save(obj: Any) -> None:
            obj.high, obj.low = divmod(obj.parent.value, 256)

        @staticmethod
        def post_load(obj: Any, version_id: int) -> None:
            obj.parent.value = obj.high * 256 + obj.low

    saved = save_state(table(vm.with_tmp(Halves)), SimpleNamespace(value=0x1234))
    assert saved.state == bytes.fromhex("1234")
    assert saved.described["fields"] == [
        {
            "name": "tmp", "type": "tmp", "vmsd_name": "halves", "version": 1,
            "fields": [{"name": "high", "type": "uint8", "size": 1}, {"name": "low", "type": "uint8", "size": 1}],
            "size": 2,
        }
    ]  # fmt: skip
    here = SimpleNamespace(value=0)
    restore(table(vm.with_tmp(Halves)), here, saved.state, 1)
    assert here == SimpleNamespace(value=0x1234)


def test_an_attribute_of_another_name() -> None:
    renamed = table(vm.uint8("count", attribute="n"))
    saved = save_state(renamed, SimpleNamespace(n=5))
    assert saved.described["fields"][0]["name"] == "count"
    here = SimpleNamespace()
    restore(renamed, here, saved.state, 1)
    assert here.n == 5


def test_a_double_keeps_every_bit() -> None:
    odd = bytes.fromhex("7ff0000000000001")
    here = SimpleNamespace()
    restore(table(vm.cpu_double_u("x")), here, odd, 1)
    assert math.isnan(here.x)
    assert packer.pack(">d", here.x) == odd
    assert dump(table(vm.cpu_double_u("x")), here) == odd


EVERYTHING = table(
    vm.uint8("n"), vm.varray("a", vm.uint16, "n"), vm.varray("s", PairItem, "n"), vm.bitmap("m", 70), vm.timer("t"),
    vm.qtailq("q", PairItem), vm.gtree("g", PairItem), vm.vbuffer("b", "n"), vm.capability("c"), vm.boolean("f"),
)  # fmt: skip
_pairs = st.builds(Pair, st.integers(0, 255), st.integers(0, 65535))


@given(st.data())
def test_anything_that_can_be_said_comes_back(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 5))
    value = SimpleNamespace(
        n=n,
        a=data.draw(st.lists(st.integers(0, 65535), min_size=n, max_size=n)),
        s=data.draw(st.lists(_pairs, min_size=n, max_size=n)),
        m=data.draw(st.integers(0, (1 << 70) - 1)),
        t=data.draw(st.none() | st.integers(0, (1 << 63) - 1)),
        q=data.draw(st.lists(_pairs, max_size=4)),
        g=data.draw(st.dictionaries(st.integers(0, (1 << 64) - 1), _pairs, max_size=4)),
        b=data.draw(st.binary(min_size=n, max_size=n)),
        c=data.draw(st.text("abc", max_size=4)),
        f=data.draw(st.booleans()),
    )
    saved = save_state(EVERYTHING, value)
    loaded = SimpleNamespace()
    restore(EVERYTHING, loaded, saved.state, 1)
    assert loaded == value
    assert described_bytes(saved.described) == len(saved.state)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_state_or_refused(noise: bytes) -> None:
    loaded = SimpleNamespace()
    try:
        restore(EVERYTHING, loaded, noise, 1)
    except RemoteProtocolError:
        return
    assert dump(EVERYTHING, loaded) == noise or loaded.g, "only a tree has more than one way to be written"

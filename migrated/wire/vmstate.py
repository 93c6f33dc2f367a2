"""VMState descriptions: a class that reads like a table says how an object travels. This is what authors import.

    class Counter(VMState):
        name = "counter"
        version_id = 2
        minimum_version_id = 1
        fields = (uint32("count"), boolean("armed", since=2), array("regs", uint16, 4), qtailq("queue", Item))
        subsections = (CounterAlarm,)

The rule of the file: a row is made by the word QEMU's macro has for it, in small letters. Every row takes ``since=``,
``when=`` and ``attribute=`` (`RowOptions`). Standard library only: the client imports this module. How to use it:
docs/device-guide.md.
"""

from __future__ import annotations

from typing import Any, Unpack

from migrated.errors import RemoteProtocolError
from migrated.wire.pull import Parser, feed
from migrated.wire.vmstate_kinds import Bitmap, Boolean, Buffer, Capability, Checked, Scalar, Timer, Unused
from migrated.wire.vmstate_rows import (
    COUNT_MAX,
    Array,
    Count,
    Kind,
    Loading,
    Row,
    RowOptions,
    Single,
    Unattached,
    Validate,
)
from migrated.wire.vmstate_struct import LinkedList, Nullable, Pointer, Struct, Temporary, Tree
from migrated.wire.vmstate_table import Description, Saved, VMState, load_state, save_state

__all__ = [
    "Description", "Element", "Saved", "VMState", "array", "array_2d", "array_of_pointer", "bitmap", "boolean",
    "buffer", "capability", "cpu_double_u", "dump", "gtree", "int8", "int16", "int32", "int32_equal", "int32_le",
    "int64", "int64_equal", "parse_body", "pointer", "qlist", "qtailq", "restore", "save_state", "struct",
    "sub_array", "timer", "uint8", "uint8_equal", "uint16", "uint16_equal", "uint32", "uint32_equal", "uint64",
    "unused", "validate", "varray", "vbuffer", "vstruct", "with_tmp",
]  # fmt: skip

#: A buffer whose size the stream gives. What is larger is memory, and travels as RAM.
VBUFFER_MAX_BYTES = 16 << 20

# Numbers and flags: ``uint32("count")`` is a row; ``uint32`` alone is what an array is of.
boolean = Boolean()
int8 = Scalar("int8", "b")
int16 = Scalar("int16", "h")
int32 = Scalar("int32", "i")
int64 = Scalar("int64", "q")
uint8 = Scalar("uint8", "B")
uint16 = Scalar("uint16", "H")
uint32 = Scalar("uint32", "I")
uint64 = Scalar("uint64", "Q")
#: When it expires, in ns of its clock; None: it is not armed.
timer = Timer()
#: A float: the upper half, then the lower one.
cpu_double_u = Scalar("CPU_Double_U", "d")
#: A text of at most 255 bytes.
capability = Capability()


def _equal(stream: int, ours: int) -> bool:
    return stream == ours


# Both ends must agree; what is ours stays.
int32_equal = Checked("int32 equal", "i", _equal, "")
uint8_equal = Checked("uint8 equal", "B", _equal, "")
uint16_equal = Checked("uint16 equal", "H", _equal, "")
uint32_equal = Checked("uint32 equal", "I", _equal, "")
int64_equal = Checked("int64 equal", "Q", _equal, "")
#: At most what it is here, and not negative.
int32_le = Checked("int32 le", "i", lambda stream, ours: 0 <= stream <= ours, "at most ")

#: What an array, a list or a pointer is of: a kind, or another description.
Element = Kind | Description


def _kind(element: Element) -> Kind:
    return element if isinstance(element, Kind) else Struct(element)


def buffer(name: str, size: int, **options: Unpack[RowOptions]) -> Row:
    """Exactly ``size`` bytes."""
    return Single(name, Buffer(Count(size, limit=size)), **options)


def vbuffer(
    name: str, size: str, *, multiply: int = 1, limit: int = VBUFFER_MAX_BYTES, **options: Unpack[RowOptions]
) -> Row:
    """Bytes; how many, an earlier row gave: the attribute ``size``, times ``multiply``."""
    return Single(name, Buffer(Count(size, multiply, limit)), **options)


def unused(size: int, name: str = "unused", **options: Unpack[RowOptions]) -> Row:
    """``size`` zeros, in the place of what was there once."""
    return Unattached(name, Unused(size), **options)


def bitmap(name: str, bits: int | str, *, limit: int = 8 * VBUFFER_MAX_BYTES, **options: Unpack[RowOptions]) -> Row:
    """So many bits, as an int; or as many as an earlier row gave."""
    return Single(name, Bitmap(Count(bits, limit=bits if isinstance(bits, int) else limit)), **options)


def struct(name: str, description: Description, **options: Unpack[RowOptions]) -> Row:
    """Another object. No version travels with it: both ends must have the same one of ``description``."""
    return Single(name, Struct(description), **options)


def vstruct(name: str, description: Description, version_id: int, **options: Unpack[RowOptions]) -> Row:
    """Another object, as ``version_id`` of its description has it, whatever that is today."""
    return Single(name, Struct(description, version_id), **options)


def pointer(name: str, element: Element, *, alloc: bool = False, **options: Unpack[RowOptions]) -> Row:
    """What a pointer leads to, which must not be None. ``alloc``: an object is made where there is none to load into.

    One that may be absent says so by ``when=``, or is an element of `array_of_pointer`.
    """
    return Single(name, Pointer(_kind(element), alloc=alloc), **options)


def array(name: str, element: Element, count: int, **options: Unpack[RowOptions]) -> Row:
    """Exactly ``count`` elements."""
    return Array(name, _kind(element), Count(count, limit=count), **options)


def array_2d(name: str, element: Element, rows: int, columns: int, **options: Unpack[RowOptions]) -> Row:
    """A list of ``rows`` lists of ``columns`` elements."""
    return Array(name, _kind(element), Count(rows * columns, limit=rows * columns), rows=rows, **options)


def sub_array(name: str, element: Element, start: int, count: int, **options: Unpack[RowOptions]) -> Row:
    """``count`` elements of a list, from ``start`` on; the others stay."""
    return Array(name, _kind(element), Count(count, limit=count), start=start, **options)


def varray(
    name: str,
    element: Element,
    count: str,
    *,
    multiply: int = 1,
    limit: int = COUNT_MAX,
    **options: Unpack[RowOptions],
) -> Row:
    """As many elements as an earlier row gave: the attribute ``count``, times ``multiply``. No more than ``limit``."""
    return Array(name, _kind(element), Count(count, multiply, limit), **options)


def array_of_pointer(name: str, element: Element, count: int, **options: Unpack[RowOptions]) -> Row:
    """``count`` elements, some of which may be None: at both ends the same ones."""
    return Array(name, Nullable(_kind(element)), Count(count, limit=count), **options)


def with_tmp(description: Description, name: str = "tmp", **options: Unpack[RowOptions]) -> Row:
    """The rows of an object that exists only meanwhile; it finds the real one in its ``parent``."""
    return Unattached(name, Temporary(description), **options)


def qtailq(
    name: str,
    description: Description,
    *,
    version_id: int | None = None,
    limit: int = COUNT_MAX,
    **options: Unpack[RowOptions],
) -> Row:
    """A list of objects, of which the stream does not say how many. ``version_id``: as `vstruct`."""
    return Single(name, LinkedList("qtailq", Struct(description, version_id), limit), **options)


def qlist(
    name: str,
    description: Description,
    *,
    version_id: int | None = None,
    limit: int = COUNT_MAX,
    **options: Unpack[RowOptions],
) -> Row:
    """A list of objects; looks like a `qtailq`."""
    return Single(name, LinkedList("qlist", Struct(description, version_id), limit), **options)


def gtree(
    name: str,
    value: Description,
    *,
    key: Description | None = None,
    version_id: int | None = None,
    limit: int = COUNT_MAX,
    **options: Unpack[RowOptions],
) -> Row:
    """A tree: a dict of objects by number; with ``key``, a list of (key, value), both of them objects."""
    keys = None if key is None else Struct(key, version_id)
    return Single(name, Tree(keys, Struct(value, version_id), limit), **options)


#: No bytes: ``validate(what, check)``; ``check(object, version)`` must hold at both ends, where it stands in the table.
validate = Validate


# -- whole states ----------------------------------------------------------------------------------------------


def parse_body(description: Description, obj: Any, version_id: int, offset: int = 0) -> Parser[None]:
    """Load an object from the body of a section that begins at ``offset``."""
    yield from load_state(description, obj, version_id, Loading(offset))


def dump(description: Description, obj: Any, version_id: int | None = None) -> bytes:
    """Return an object's state; as an older version has it, if told so."""
    return save_state(description, obj, version_id).state


def restore(description: Description, obj: Any, state: bytes, version_id: int) -> None:
    """Load an object from bytes that hold its state and nothing else.

    Raises RemoteProtocolError when they are no such state, MigratedError when a hook of the description fails.
    """
    feed(_whole(description, obj, version_id), [state])


def _whole(description: Description, obj: Any, version_id: int) -> Parser[None]:
    loading = Loading()
    yield from load_state(description, obj, version_id, loading)
    if rest := (yield from loading.peek(1)):
        raise RemoteProtocolError(
            f"{description.name} v{version_id}: the state goes on behind its end",
            offset=loading.offset, expected="nothing", found=f"{rest[0]:#04x}",
        )  # fmt: skip

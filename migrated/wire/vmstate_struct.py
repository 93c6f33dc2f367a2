"""Kinds of values that have parts: structs, pointers, lists and trees of them.

The rule of the file: objects that are there are filled in place, those of lists and trees are made anew; how many
there are is bounded before any is made. Standard library only: the client imports this. Source of the format: QEMU's
VMS_STRUCT, vmstate_info_qtailq and their like; error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

from typing import Any

from migrated.errors import LocalProtocolError
from migrated.wire.primitives import encode_be32
from migrated.wire.pull import Parser
from migrated.wire.vmstate_rows import Described, Kind, Loading
from migrated.wire.vmstate_table import Description, load_state, save_state


class Struct(Kind):
    """Another object, in place; no version is written for it, so ``version_id`` never changes: by default today's."""

    def __init__(self, description: Description, version_id: int | None = None) -> None:
        self.description = description
        self.version_id = description.version_id if version_id is None else version_id
        self.varies = bool(description.subsections) or any(row.varies for row in description.fields)

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the object's bytes and its table."""
        if value is None:
            raise LocalProtocolError(f"there is no {self.description.name}")
        state, described = save_state(self.description, value, self.version_id)
        return state, {"type": "struct", "struct": described, "size": len(state)}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[Any]:
        """Fill the object that is there, or a new one."""
        value = self.description.new() if current is None else current
        yield from load_state(self.description, value, self.version_id, loading)
        return value


class Pointer(Kind):
    """What a pointer leads to. The stream does not say whether it leads anywhere: it must, unless a new one is made."""

    def __init__(self, target: Kind, *, alloc: bool) -> None:
        self._target = target
        self._alloc = alloc
        self.varies = target.varies

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the target's bytes."""
        if value is None:
            raise LocalProtocolError("the pointer leads nowhere")
        return self._target.save(value, owner)

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[Any]:
        """Load the target."""
        if current is None and not self._alloc:
            raise LocalProtocolError("the pointer leads nowhere; make the object first, or use alloc=True")
        return (yield from self._target.load(current, owner, loading))


class Nullable(Kind):
    """An element of an array of pointers: the character 0 where there is none. Both ends must know where that is."""

    varies = True
    _marker = ord("0")

    def __init__(self, target: Kind) -> None:
        self._target = target

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the target's bytes, or the mark."""
        if value is None:
            return bytes([self._marker]), {"type": "nullptr", "size": 1}
        return self._target.save(value, owner)

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[Any]:
        """Load the target, or take the mark where there is none here."""
        if current is not None:
            return (yield from self._target.load(current, owner, loading))
        byte = yield from loading.take_number(1)
        if byte != self._marker:
            raise loading.refusal(
                "get_nullptr expected VMS_NULLPTR_MARKER", expected=f"{self._marker:#x}", found=f"{byte:#x}"
            )
        return None


class Temporary(Kind):
    """A struct that only exists while it is saved or loaded; its attribute ``parent`` is the object."""

    def __init__(self, description: Description) -> None:
        self._struct = Struct(description)
        self.varies = self._struct.varies

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the bytes of a new one, which its `pre_save` fills from the parent."""
        state, described = self._struct.save(self._make(owner), owner)
        return state, {"type": "tmp", **described["struct"], "size": len(state)}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[None]:
        """Fill a new one, which its `post_load` carries over to the parent."""
        yield from self._struct.load(self._make(owner), owner, loading)

    def _make(self, owner: Any) -> Any:
        made = self._struct.description.new()
        made.parent = owner
        return made


class LinkedList(Kind):
    """Objects of any number: each behind a 1, the end is a 0. ``type_name``: qtailq or qlist, which look alike."""

    #: How long it is, no stream says before its end.
    varies = True

    def __init__(self, type_name: str, element: Struct, limit: int) -> None:
        self._type_name = type_name
        self._element = element
        self._limit = limit

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the bytes of all elements."""
        if len(value) > self._limit:
            raise LocalProtocolError(f"at most {self._limit} elements, not {len(value)}")
        state = b"".join(b"\1" + self._element.save(one, owner)[0] for one in value) + b"\0"
        return state, {"type": self._type_name, "size": len(state)}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[list[Any]]:
        """Make a list of new objects."""
        values: list[Any] = []
        while (yield from _another(loading)):
            _admit_next(len(values), self._limit, loading)
            values.append((yield from self._element.load(None, owner, loading)))
        return values


class Tree(Kind):
    """A balanced tree: the number of nodes, each behind a 1 as key and value, and a 0.

    A direct key is 64 bits wide: a dict here, written in ascending order. A key that is a struct: a list of pairs.
    """

    varies = True

    def __init__(self, key: Struct | None, value: Struct, limit: int) -> None:
        self._key = key
        self._value = value
        self._limit = limit

    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the bytes of all nodes."""
        pairs = sorted(value.items()) if self._key is None else list(value)
        if len(pairs) > self._limit:
            raise LocalProtocolError(f"at most {self._limit} nodes, not {len(pairs)}")
        state = bytearray(encode_be32(len(pairs)))
        for key, node in pairs:
            state += b"\1" + (key.to_bytes(8, "big") if self._key is None else self._key.save(key, owner)[0])
            state += self._value.save(node, owner)[0]
        state += b"\0"
        return bytes(state), {"type": "gtree", "size": len(state)}

    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[dict[int, Any] | list[tuple[Any, Any]]]:
        """Make a tree of new keys and values."""
        count = loading.admit((yield from loading.take_number(4)), self._limit)
        pairs: list[tuple[Any, Any]] = []
        while (yield from _another(loading)):
            if len(pairs) == count:
                raise loading.refusal("a tree that goes on", expected=f"{count} nodes", found="another one")
            if self._key is None:
                key = yield from loading.take_number(8)
            else:
                key = yield from self._key.load(None, owner, loading)
            pairs.append((key, (yield from self._value.load(None, owner, loading))))
        if len(pairs) != count:
            raise loading.refusal("a tree that ends early", expected=f"{count} nodes", found=str(len(pairs)))
        if self._key is not None:
            return pairs
        if len(tree := dict(pairs)) != count:
            raise loading.refusal("a tree with a key twice", expected=f"{count} keys", found=str(len(tree)))
        return tree


def _another(loading: Loading) -> Parser[bool]:
    byte = yield from loading.take_number(1)
    if byte > 1:
        raise loading.refusal("neither another element nor the end", expected="1 or 0", found=str(byte))
    return bool(byte)


def _admit_next(so_far: int, limit: int, loading: Loading) -> None:
    if so_far == limit:
        raise loading.refusal("a list that is too long", expected=f"at most {limit} elements", found="more")
    loading.admit(1, 1)

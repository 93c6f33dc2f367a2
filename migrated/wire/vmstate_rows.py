"""What VMState descriptions are made of: kinds of values, the rows of the table, and the account of a load.

The rule of the file: nothing the stream says is a count, a size or an object before it was held against a limit, and
the account (`Loading`) goes with everything that is loaded. Saving gives bytes and what they are at once, so that a
description can never tell another story than the bytes. Standard library only: the client imports this module.

Source of the format: QEMU's VMState; error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, Unpack

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.pull import Parser

#: A test of one row: (object, version of the stream) -> is the row there?
Test = Callable[[Any, int], bool]
#: What a value is, as the VMDESCRIPTION says it: "type", perhaps "struct", "size".
Described = dict[str, Any]

#: As large as a state that an attached workload hands over may be.
BODY_MAX_BYTES = 1 << 30
#: A count that a stream gives, per row: far beyond the queues and tables of devices. Rows can say otherwise.
COUNT_MAX = 1 << 16
#: All such counts of one body together: a list in a list in a list is still one body. About 1 GiB of Python objects.
ELEMENTS_MAX = 1 << 20
#: A stream gives no more at once.
PIECE_BYTES = 64 << 10


class Loading:
    """What one load has taken so far. ``offset``: where in the stream its first byte stands, for errors."""

    def __init__(
        self, offset: int = 0, *, body_max_bytes: int = BODY_MAX_BYTES, elements_max: int = ELEMENTS_MAX
    ) -> None:
        self.offset = offset
        self._end = offset + body_max_bytes
        self._body_max_bytes = body_max_bytes
        self._elements_left = self._elements_max = elements_max

    def take(self, count: int) -> Parser[bytes]:
        """Take exactly ``count`` bytes; memory grows with what has arrived."""
        if self.offset + count > self._end:
            raise self.refusal("too much state", expected=f"at most {self._body_max_bytes} bytes", found="more")
        if 0 < count <= PIECE_BYTES:
            self.offset += count
            return (yield count)
        body = bytearray()
        while len(body) < count:
            piece = yield min(PIECE_BYTES, count - len(body))
            self.offset += len(piece)
            body += piece
        return bytes(body)

    def take_number(self, size: int) -> Parser[int]:
        """Take an unsigned number of ``size`` bytes."""
        return int.from_bytes((yield from self.take(size)), "big")

    def peek(self, count: int) -> Parser[bytes]:
        """Look at the next ``count`` bytes; fewer where the state ends."""
        return (yield -count)

    def admit(self, count: int, limit: int) -> int:
        """Hold the number of elements of one row against its limit, and against what one body may have in all."""
        if not 0 <= count <= limit:
            raise self.refusal("a count out of range", expected=f"0 to {limit}", found=str(count))
        self._elements_left -= count
        if self._elements_left < 0:
            limit_text = f"at most {self._elements_max} in one body"
            raise self.refusal("too many elements", expected=limit_text, found="more")
        return count

    def refusal(self, what: str, *, expected: str = "", found: str = "") -> RemoteProtocolError:
        """Return the error for what was taken last; the row that it belongs to says where that is."""
        return RemoteProtocolError(what, expected=expected, found=found)


class RowOptions(TypedDict, total=False):
    """What every row of a table may say besides its name and kind."""

    since: int
    """The version the row came with: older streams do not have it."""
    when: Test
    """Instead of ``since``: whether the row is there."""
    attribute: str
    """The attribute of the object, where its name is another than the row's."""


class Kind(ABC):
    """How a value of one kind looks on the wire. Called with a name, it gives a row: ``uint32("count")``."""

    #: Two values may differ in size or in what they consist of, although nothing in the stream counts them.
    varies = False

    @abstractmethod
    def save(self, value: Any, owner: Any) -> tuple[bytes, Described]:
        """Return the bytes of a value and what they are. ``owner`` is the object that the row is about."""

    @abstractmethod
    def load(self, current: Any, owner: Any, loading: Loading) -> Parser[Any]:
        """Return the value that the stream has; ``current`` is the present one, None where there is none."""

    def save_all(self, values: Sequence[Any], owner: Any) -> tuple[bytes, list[Described]]:
        """Return the bytes of an array's elements, and what each is."""
        saved = [self.save(value, owner) for value in values]
        return b"".join(state for state, _ in saved), [described for _, described in saved]

    def load_all(self, currents: Sequence[Any], owner: Any, loading: Loading) -> Parser[list[Any]]:
        """Return an array's elements, as many as there are ``currents``."""
        values = []
        for index, current in enumerate(currents):
            try:
                values.append((yield from self.load(current, owner, loading)))
            except RemoteProtocolError as error:
                error.what = f"[{index}] {error.what}"
                raise
        return values

    def __call__(self, name: str, **options: Unpack[RowOptions]) -> Row:
        return Single(name, self, **options)


class Row(ABC):
    """One row of a description."""

    def __init__(self, name: str, **options: Unpack[RowOptions]) -> None:
        self.name = name
        self.since = options.get("since", 0)
        self.when = options.get("when")
        self.attribute = options.get("attribute", name)

    @property
    def varies(self) -> bool:
        """True when two objects may differ in whether, or how, this row is there."""
        return self.when is not None

    def exists(self, owner: Any, version_id: int) -> bool:
        """Say whether the row is in a stream of that version."""
        return self.since <= version_id if self.when is None else self.when(owner, version_id)

    @abstractmethod
    def save(self, owner: Any) -> tuple[bytes, list[Described]]:
        """Return the row's bytes and its entries in the VMDESCRIPTION, without their names."""

    @abstractmethod
    def load(self, owner: Any, loading: Loading) -> Parser[None]:
        """Set the row's attribute to what the stream has."""

    def _present(self, owner: Any) -> Any:
        return getattr(owner, self.attribute, None)


class Single(Row):
    """One value."""

    def __init__(self, name: str, kind: Kind, **options: Unpack[RowOptions]) -> None:
        super().__init__(name, **options)
        self.kind = kind

    @property
    def varies(self) -> bool:
        """True when two objects may differ in this row."""
        return super().varies or self.kind.varies

    def save(self, owner: Any) -> tuple[bytes, list[Described]]:
        """Return the value's bytes and entry."""
        state, described = self.kind.save(getattr(owner, self.attribute), owner)
        return state, [described]

    def load(self, owner: Any, loading: Loading) -> Parser[None]:
        """Set the attribute to the value that the stream has."""
        setattr(owner, self.attribute, (yield from self.kind.load(self._present(owner), owner, loading)))


class Unattached(Single):
    """A kind that has to do with the object as a whole, or with nothing: there is no attribute."""

    def save(self, owner: Any) -> tuple[bytes, list[Described]]:
        """Return the bytes and entry."""
        state, described = self.kind.save(None, owner)
        return state, [described]

    def load(self, owner: Any, loading: Loading) -> Parser[None]:
        """Take what the stream has."""
        yield from self.kind.load(None, owner, loading)


@dataclass(frozen=True, slots=True)
class Validate:
    """No bytes: a check that must hold, at either end. ``name`` is what it says."""

    name: str
    check: Test
    since: ClassVar[int] = 0
    varies: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Count:
    """How many: a number, or the attribute of the object that has it, times ``multiply``. Bounded by ``limit``."""

    value: int | str
    multiply: int = 1
    limit: int = COUNT_MAX

    def of(self, owner: Any) -> int:
        """Return the number for this object. Raises LocalProtocolError when it is beyond the limit."""
        if isinstance(self.value, int):
            return self.value
        count: int = getattr(owner, self.value) * self.multiply
        if not 0 <= count <= self.limit:
            raise LocalProtocolError(f"'{self.value}' must be 0 to {self.limit // self.multiply}, not {count}")
        return count

    def admitted(self, owner: Any, loading: Loading) -> int:
        """Return the number that the stream gave before."""
        if isinstance(self.value, int):
            return self.value
        return loading.admit(getattr(owner, self.value) * self.multiply, self.limit)


class Array(Row):
    """Elements in order. ``start``: only some of a list; ``rows``: a list of so many lists of equal length."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        count: Count,
        *,
        start: int | None = None,
        rows: int = 0,
        **options: Unpack[RowOptions],
    ) -> None:
        super().__init__(name, **options)
        self.kind = kind
        self.count = count
        self.start = start
        self.rows = rows

    @property
    def varies(self) -> bool:
        """True when two objects may differ in this row."""
        return super().varies or self.kind.varies

    def save(self, owner: Any) -> tuple[bytes, list[Described]]:
        """Return the elements' bytes; one entry where all are alike, one for each where not."""
        count = self.count.of(owner)
        values = self._flat(getattr(owner, self.attribute))
        chosen = values if self.start is None else values[self.start : self.start + count]
        if len(chosen) != count:
            raise LocalProtocolError(f"expected {count} elements, found {len(chosen)}")
        state, described = self.kind.save_all(chosen, owner)
        if count < 2:
            return state, described
        first = described[0]
        if not self.kind.varies and all(one is first or one == first for one in described):
            return state, [{"array_len": count, **first}]
        return state, [{"index": index, **one} for index, one in enumerate(described)]

    def load(self, owner: Any, loading: Loading) -> Parser[None]:
        """Fill the elements that are there, in place where they are objects; make those that are not."""
        count = self.count.admitted(owner, loading)
        present = self._present(owner)
        start = self.start or 0
        values = [] if present is None else self._flat(present)[start : start + count]
        values += [None] * (count - len(values))
        loaded = yield from self.kind.load_all(values, owner, loading)
        if self.start is None:
            setattr(owner, self.attribute, self._nested(loaded))
        elif isinstance(present, list) and len(present) >= start + count:
            present[start : start + count] = loaded
        else:
            raise LocalProtocolError(f"'{self.attribute}' must be a list of at least {start + count} elements")

    def _flat(self, values: Sequence[Any]) -> list[Any]:
        if not self.rows:
            return list(values)
        return [value for row in values for value in row]

    def _nested(self, values: list[Any]) -> list[Any]:
        if not self.rows:
            return values
        width = len(values) // self.rows
        return [values[at : at + width] for at in range(0, len(values), width)]

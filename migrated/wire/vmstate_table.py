"""`VMState`, the description of an object as a table of rows, and what saves and loads by it.

The rule of the file: fields in order, then subsections, each with its own; a description knows its name, its versions
and its rows, and nothing about where the bytes go. Loading fills the object that is there, so what a stream does not
have keeps the value that it had, or that `pre_load` gave it. Standard library only: the client imports this module.

    pre_save -> fields -> [ 0x05, name, version, fields ... ]* -> post_save
    versions -> pre_load -> fields -> [ 0x05 ... ]* -> post_load

Source of the format: QEMU's vmstate_save_state, vmstate_load_state; error texts are QEMU's.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

from migrated.errors import LocalProtocolError, MigratedError, RemoteProtocolError
from migrated.wire.primitives import COUNTED_STRING_MAX_BYTES, decode_name, encode_be32, encode_counted_string
from migrated.wire.pull import Parser
from migrated.wire.vmstate_rows import Described, Loading, Row, Validate

SUBSECTION = 0x05
#: What is raised when an object is not what its description says.
_NO_VALUE = (LocalProtocolError, AttributeError, TypeError, ValueError, OverflowError)


class VMState:
    """A description. Subclass it, fill in the table; nobody makes objects of it. Hooks are static methods."""

    name: ClassVar[str]
    """The section's name, behind the id of the device's owner if it has one. A subsection's is PARENT/SUFFIX."""
    version_id: ClassVar[int] = 1
    """The version that is written."""
    minimum_version_id: ClassVar[int]
    """The oldest version that is read; by default, and in each subclass anew, the one that is written."""
    priority: ClassVar[int] = 0
    """Higher ones are saved, and so loaded, first."""
    fields: ClassVar[tuple[Row | Validate, ...]] = ()
    subsections: ClassVar[tuple[type[VMState], ...]] = ()
    labels: ClassVar[tuple[str, ...]]
    """The names of the rows as the VMDESCRIPTION has them: those that occur more than once are numbered."""

    @staticmethod
    def new() -> Any:
        """Make an object to load into, where there is none yet: an element of a list, a value of a tree."""
        return SimpleNamespace()

    @staticmethod
    def needed(obj: Any) -> bool:
        """Say whether there is something to send. A subsection, or a whole section, is left out where there is not."""
        return True

    @staticmethod
    def pre_save(obj: Any) -> None:
        """Prepare the object for being saved."""

    @staticmethod
    def post_save(obj: Any) -> None:
        """Undo what `pre_save` did; called also when saving failed."""

    @staticmethod
    def pre_load(obj: Any) -> None:
        """Give the object the values that rows and subsections have which an older stream lacks."""

    @staticmethod
    def post_load(obj: Any, version_id: int) -> None:
        """Make the object consistent with what came. What it raises refuses the state."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "minimum_version_id" not in cls.__dict__:
            cls.minimum_version_id = cls.version_id
        _check(cls)
        counts = Counter(row.name for row in cls.fields)
        seen: Counter[str] = Counter()
        labels = []
        for row in cls.fields:
            labels.append(row.name if counts[row.name] == 1 else f"{row.name}[{seen[row.name]}]")
            seen[row.name] += 1
        cls.labels = tuple(labels)


Description = type[VMState]


def _check(cls: Description) -> None:
    """Raise TypeError for a description that no stream could carry: found when it is written down, not in use."""
    name = getattr(cls, "name", "")
    if not 1 <= len(name.encode()) <= COUNTED_STRING_MAX_BYTES or not name.isprintable():
        raise TypeError(f"{cls.__name__}.name must be 1 to {COUNTED_STRING_MAX_BYTES} printable bytes, not {name!r}")
    if not 0 <= cls.minimum_version_id <= cls.version_id < 1 << 32:
        raise TypeError(f"{name}: versions must be 0 <= minimum_version_id <= version_id < 2^32")
    for row in cls.fields:
        if row.since > cls.version_id:
            raise TypeError(f"{name}: row '{row.name}' is there since {row.since}, beyond version_id {cls.version_id}")
    names = [sub.name for sub in cls.subsections]
    if wrong := [sub for sub in names if not sub.startswith(f"{name}/") or names.count(sub) > 1]:
        raise TypeError(f"{name}: its subsections have different names, {name}/SUFFIX, and not {wrong[0]!r}")


class Saved(NamedTuple):
    """An object's bytes, and what they are in the shape of the VMDESCRIPTION."""

    state: bytes
    described: Described


# -- saving ----------------------------------------------------------------------------------------------------


def save_state(description: Description, obj: Any, version_id: int | None = None) -> Saved:
    """Save an object. ``version_id``: as that older version had it (without subsections it did not know).

    Raises LocalProtocolError when a value is not what its row says, MigratedError when a hook fails.
    """
    if version_id is None:
        version_id = description.version_id
    if not description.minimum_version_id <= version_id <= description.version_id:
        raise LocalProtocolError(f"{description.name} has no version {version_id} any more, or yet")
    _hook("pre-save", description, obj)
    try:
        state, entries = _save_fields(description, obj, version_id)
        described: Described = {"vmsd_name": description.name, "version": version_id, "fields": entries}
        for sub in description.subsections:
            if sub.needed(obj):
                saved = save_state(sub, obj)
                state += bytes([SUBSECTION]) + encode_counted_string(sub.name) + encode_be32(sub.version_id)
                state += saved.state
                described.setdefault("subsections", []).append(saved.described)
    finally:
        _hook("post-save", description, obj)
    return Saved(bytes(state), described)


def _save_fields(description: Description, obj: Any, version_id: int) -> tuple[bytearray, list[Described]]:
    state = bytearray()
    entries: list[Described] = []
    for row, label in zip(description.fields, description.labels, strict=True):
        if isinstance(row, Validate):
            if not row.check(obj, version_id):
                raise LocalProtocolError(f"Input validation failed: {description.name}/{row.name}")
        elif row.exists(obj, version_id):
            try:
                part, described = row.save(obj)
            except _NO_VALUE as error:
                raise LocalProtocolError(f"Save of field {description.name}/{label} failed: {error}") from error
            state += part
            entries.extend({"name": label, **entry} for entry in described)
    return state, entries


def _hook(which: str, description: Description, obj: Any, *more: Any) -> None:
    hook = getattr(description, which.replace("-", "_"))
    try:
        hook(obj, *more)
    except MigratedError:
        raise
    except Exception as error:  # the author's code: whatever it raises is said together with whose it is
        raise MigratedError(f"{which} failed: {description.name}: {error!r}") from error


# -- loading ---------------------------------------------------------------------------------------------------


def load_state(description: Description, obj: Any, version_id: int, loading: Loading) -> Parser[None]:
    """Load an object from a stream of that version.

    Raises RemoteProtocolError, LocalProtocolError when the object lacks what a row needs, MigratedError from a hook.
    """
    check_version(description, version_id)
    _hook("pre-load", description, obj)
    for row, label in zip(description.fields, description.labels, strict=True):
        if isinstance(row, Validate):
            if not row.check(obj, version_id):
                raise RemoteProtocolError(f"Input validation failed: {description.name}/{row.name}")
        elif row.exists(obj, version_id):
            yield from _load_row(f"{description.name}:{label}", row, obj, loading)
    yield from _load_subsections(description, obj, loading)
    _hook("post-load", description, obj, version_id)


def check_version(description: Description, version_id: int) -> None:
    """Raise RemoteProtocolError unless this description reads streams of that version."""
    if version_id > description.version_id:
        raise RemoteProtocolError(
            f"{description.name}: incoming version_id {version_id} is too new for local version_id"
            f" {description.version_id}"
        )
    if version_id < description.minimum_version_id:
        raise RemoteProtocolError(
            f"{description.name}: incoming version_id {version_id} is too old for local minimum version_id "
            f" {description.minimum_version_id}"
        )


def _load_row(what: str, row: Row, obj: Any, loading: Loading) -> Parser[None]:
    began = loading.offset
    try:
        yield from row.load(obj, loading)
    except RemoteProtocolError as error:
        error.what = f"Failed to load {what}: {error.what}"
        error.offset = began if error.offset is None else error.offset
        raise
    except _NO_VALUE as error:
        raise LocalProtocolError(f"Failed to load {what}: {error}") from error


def _load_subsections(description: Description, obj: Any, loading: Loading) -> Parser[None]:
    known = {sub.name: sub for sub in description.subsections}
    prefix = description.name.encode()
    loaded: set[str] = set()
    while True:
        # Whether this is a subsection of ours is only known by its name: nothing is taken before that.
        head = yield from loading.peek(2)
        if len(head) < 2 or head[0] != SUBSECTION or head[1] < len(prefix) + 1:
            return
        seen = yield from loading.peek(2 + len(prefix))
        if seen[2:] != prefix:
            return
        began = loading.offset
        raw = yield from loading.take(2 + head[1])
        name = decode_name(raw[2:], "the name of a subsection")
        if name not in known or name in loaded:
            raise RemoteProtocolError(
                f"subsection {name} of {description.name} is " + ("here twice" if name in loaded else "unknown here"),
                offset=began, expected="one of " + (", ".join(known) or "none"), found=name,
            )  # fmt: skip
        loaded.add(name)
        version_id = yield from loading.take_number(4)
        yield from load_state(known[name], obj, version_id, loading)

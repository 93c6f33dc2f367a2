"""What a field of an attach message may hold: one check per kind of field.

The rule of the file: a check looks at a value that JSON gave and says yes or no; its ``expected`` says in words what it
wants. Standard library only: the client imports this module through `wire.attach`.
"""

from __future__ import annotations

from typing import Protocol

#: A name's length is one byte in the migration stream.
MAX_NAME_BYTES = 255
#: Larger than any feature list and descriptor list there is.
MAX_LIST = 16


class Check(Protocol):
    """One kind of field."""

    expected: str

    def __call__(self, value: object) -> bool: ...


class Integer:
    """An integer within bounds; JSON's true and 1.0 are none."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high
        self.expected = f"an integer from {low} to {high}"

    def __call__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self._low <= value <= self._high


class Text:
    """A text of so many UTF-8 bytes; with ``one_line``, printable only (names go into logs and messages)."""

    def __init__(self, low: int, high: int, *, one_line: bool = True) -> None:
        self._low, self._high, self._one_line = low, high, one_line
        self.expected = f"a text of {low} to {high} UTF-8 bytes" + (" without control characters" if one_line else "")

    def __call__(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        try:
            length = len(value.encode())
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            return False
        return self._low <= length <= self._high and not (self._one_line and not value.isprintable())


class Choice:
    """One of a few words."""

    def __init__(self, *choices: str) -> None:
        self._choices = choices
        self.expected = "one of " + ", ".join(choices)

    def __call__(self, value: object) -> bool:
        return isinstance(value, str) and value in self._choices


class Flag:
    """True or false."""

    expected = "true or false"

    def __call__(self, value: object) -> bool:
        return isinstance(value, bool)


class Names:
    """A short list of different names."""

    expected = f"a list of at most {MAX_LIST} names without repetition"
    _name = Text(1, MAX_NAME_BYTES)

    def __call__(self, value: object) -> bool:
        if not isinstance(value, list | tuple) or len(value) > MAX_LIST:
            return False
        return all(self._name(name) for name in value) and len(set(value)) == len(value)


def shown(value: object) -> str:
    """Return a short form of somebody else's value; its whole repr could be large or refuse to be made."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[:60]
    text = repr(value) if not isinstance(value, list | dict) else f"a JSON {type(value).__name__} of {len(value)}"
    return text if len(text) <= 80 else text[:77] + "..."

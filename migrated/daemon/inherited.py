"""A descriptor that whoever started the daemon left open for it: ``incoming = "fd:NUMBER"``.

The rule of the file: it is taken before the daemon opens anything, so that the number means what the starter meant, and
under a number nobody inherits from the daemon in turn.
"""

from __future__ import annotations

import os

from migrated.errors import CommandError, ConfigError
from migrated.transport.address import FdAddress, parse_address

#: Below are the standard streams.
_FIRST_FREE = 3


def take_inherited(uri: str | None) -> tuple[str, int] | None:
    """Return (name, descriptor) for ``fd:NUMBER``, None for any other URI. Raises ConfigError."""
    number = inherited_number(uri)
    if number is None:
        return None
    try:
        # What this process opened itself is never inheritable.
        if not os.get_inheritable(number):
            raise OSError
        fd = os.dup(number)  # not inheritable
    except (OSError, OverflowError):
        raise ConfigError(
            "incoming",
            f"fd:{number}",
            f"no descriptor {number} was inherited; expected one that is left open for the daemon, as in"
            f" 'migrated ... {number}< FILE' or by systemd (StandardInput=socket, OpenFile=)",
        ) from None
    _forget(number)
    return str(number), fd


def inherited_number(uri: str | None) -> int | None:
    """Return NUMBER of ``fd:NUMBER``, None for any other URI."""
    try:
        address = parse_address(uri or "")
    except CommandError:
        return None
    named = isinstance(address, FdAddress) and address.name.isascii() and address.name.isdigit()
    return int(address.name) if isinstance(address, FdAddress) and named else None


def _forget(number: int) -> None:
    """Close the original; standard input is at its end from then on. Output stays: the log uses it."""
    if number >= _FIRST_FREE:
        os.close(number)
    elif number == 0:
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, number)
        os.close(null)

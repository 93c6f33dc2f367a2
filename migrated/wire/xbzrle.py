"""XBZRLE: a page as what is new in it since it was last sent.

The rule of the file: pure bytes; who keeps the old page, and whether it is the one that the other end has, is not
decided here. A delta is runs, in turn of bytes that stay and of new ones, each with its length in front; the new bytes
stand there as they are. What stays at the end of the page is left out.

    length     1 byte below 0x80, else its low 7 bits | 0x80, then the rest (0x3fff at most)
    first run  stays, and may be empty; no other may

Source of the format: QEMU, XBZRLE version 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.wire.ram import PAGE

Bytes = NDArray[np.uint8]

#: A gap of this many bytes costs as much as the two lengths around it: shorter ones are sent as new.
_GAP_BYTES = 2
_MORE, _LOW = 0x80, 0x7F


def encode_delta(old: Bytes, new: Bytes) -> bytes | None:
    """Return the delta from one page to another: empty where they are equal, None where it is as long as a page."""
    changed = np.flatnonzero(old != new)
    if not len(changed):
        return b""
    breaks = np.flatnonzero(np.diff(changed) > _GAP_BYTES + 1)
    starts = changed[np.concatenate(([0], breaks + 1))].tolist()
    ends = (changed[np.concatenate((breaks, [len(changed) - 1]))] + 1).tolist()
    parts, behind, content = [], 0, new.tobytes()
    for start, end in zip(starts, ends, strict=True):
        parts += [_encode_length(start - behind), _encode_length(end - start), content[start:end]]
        behind = end
    delta = b"".join(parts)
    return delta if len(delta) < PAGE else None


def apply_delta(delta: memoryview, page: Bytes) -> None:
    """Make an old page, in place, what a delta says. Raises RemoteProtocolError; the page may then be half of each."""
    behind = at = 0
    while at < len(delta):
        stays, at = _length(delta, at)
        fresh, at = _length(delta, at)
        if not fresh or (not stays and behind):
            raise _bad("an empty run")
        start, behind = behind + stays, behind + stays + fresh
        if behind > PAGE:
            raise _bad(f"a run up to byte {behind} of the page")
        if at + fresh > len(delta):
            raise _bad("an end within a run")
        page[start:behind] = np.frombuffer(delta, np.uint8, fresh, at)
        at += fresh


def _length(delta: memoryview, at: int) -> tuple[int, int]:
    """Return the length at ``at``, and the position behind it."""
    if at >= len(delta):
        raise _bad("an end before a length")
    low = delta[at]
    if not low & _MORE:
        return low, at + 1
    if at + 1 >= len(delta) or delta[at + 1] & _MORE:
        raise _bad("a length of more than two bytes")
    return (delta[at + 1] << 7) | (low & _LOW), at + 2


def _encode_length(length: int) -> bytes:
    return bytes((length,)) if length < _MORE else bytes((length & _LOW | _MORE, length >> 7))


def _bad(found: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        "Failed to load XBZRLE page - decode error!", section="ram", expected="runs within a page", found=found
    )

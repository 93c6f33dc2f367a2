"""For tests of descriptions: an object goes through the wire and comes out somewhere else, in one line.

The rule of the file: what the destination would say against a stream, these functions say, too. Standard library only.
"""

from __future__ import annotations

from typing import TypeVar

from migrated.wire.vmstate import Description, dump, restore

T = TypeVar("T")


def transfer(source: Description, obj: object, target: Description, into: T, *, version_id: int | None = None) -> T:
    """Save ``obj`` as ``source`` says, load it into ``into`` as ``target`` says, and return that.

    The two may be an older and a newer description of one device. ``version_id``: what an older version of ``source``
    would have sent. Raises what the destination raises: RemoteProtocolError for a stream that it refuses.
    """
    version_sent = source.version_id if version_id is None else version_id
    restore(target, into, dump(source, obj, version_sent), version_sent)
    return into


def round_trip(description: Description, obj: object, into: T) -> T:
    """Transfer to the same description; raise AssertionError unless what came out saves as what went in."""
    transfer(description, obj, description, into)
    sent, again = dump(description, obj), dump(description, into)
    if sent != again:
        raise AssertionError(f"{description.name}: sent {sent.hex()}, and what was loaded saves as {again.hex()}")
    return into

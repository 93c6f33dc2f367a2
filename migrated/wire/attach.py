"""The attach protocol between a machine's daemon and its workloads: every message, coded and checked.

The rule of the file: one packet (``SOCK_SEQPACKET``) is one JSON object of at most 64 KiB; a field that is missing, of
the wrong type or out of bounds is refused by name with what was expected and found; a field nobody knows is ignored, so
that both ends may grow. Standard library only: the client imports this module.

Descriptors travel beside the packet (SCM_RIGHTS); which message carries which is said in its docstring. Ids are chosen
by whoever asks, per direction, and come back in the answer. Source: docs/attach-protocol.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.attach_fields import MAX_NAME_BYTES, Check, Choice, Flag, Integer, Names, Text, shown

VERSION = 1
#: The kernel's default socket buffer (net.core.wmem_default, 208 KiB) takes three of these; ours are far smaller.
MAX_MESSAGE_BYTES = 64 * 1024
#: An error's text is for people: longer ones are cut by the sender.
MAX_ERROR_BYTES = 4096
#: Half of the 47 bits of user address space that x86-64 has without five page table levels.
MAX_BLOCK_BYTES = 1 << 46
MAX_ADDRESS = (1 << 64) - 1
#: A device state travels as a memfd that both ends read into memory.
MAX_STATE_BYTES = 1 << 30
#: In JSON inside of JSON a character may take two: this fits a message in any case. What is longer is left out.
MAX_DESCRIPTION_BYTES = 30_000
#: QEMU's priorities are 0 to 8.
MAX_PRIORITY = 255
#: Ids and versions stay within what every language's JSON library can hold exactly (2^53) and the stream has (2^32).
MAX_ID = (1 << 53) - 1
MAX_UINT32 = (1 << 32) - 1

PAUSES = ("cooperative", "signal")
CLIENT_STATES = ("fresh", "running", "stopped", "standby", "moved")
MACHINE_STATES = ("running", "stopped", "incoming", "moved")
#: The descriptors of `Hello`, in the order in which they may be named.
HELLO_FDS = ("pagemap", "tracking", "sync")


def _field(check: Check, default: Any = MISSING) -> Any:
    return field(metadata={"check": check}, default=default)


def _id() -> Any:
    return _field(Integer(0, MAX_ID))


def _name() -> Any:
    return _field(Text(1, MAX_NAME_BYTES))


def _error() -> Any:
    return _field(Text(0, MAX_ERROR_BYTES, one_line=False))


def _size(low: int, high: int = MAX_BLOCK_BYTES) -> Any:
    return _field(Integer(low, high))


# -- workload to daemon -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message. Descriptors: those named in ``fds``, in that order (a subset of HELLO_FDS)."""

    version: int = _field(Integer(1, MAX_UINT32))
    name: str = _name()
    pause: str = _field(Choice(*PAUSES))
    state: str = _field(Choice(*CLIENT_STATES))
    fds: tuple[str, ...] = _field(Names())
    features: tuple[str, ...] = _field(Names(), ())


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """May I declare this block, or does the machine have it? ``size`` 0: only map it if it exists."""

    id: int = _id()
    name: str = _name()
    size: int = _size(0)
    page_size: int = _field(Integer(1, MAX_UINT32), 4096)


@dataclass(frozen=True, slots=True)
class MapRequest:
    """I mapped the whole block at ``address``. Descriptor: the block's memfd, also of a block that existed."""

    id: int = _id()
    name: str = _name()
    address: int = _field(Integer(0, MAX_ADDRESS))
    size: int = _size(1)


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """I have a device whose state is to travel with the machine."""

    id: int = _id()
    name: str = _name()
    instance_id: int = _field(Integer(0, MAX_UINT32), 0)
    version_id: int = _field(Integer(0, MAX_UINT32), 1)
    priority: int = _field(Integer(0, MAX_PRIORITY), 0)


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything is declared."""

    id: int = _id()


@dataclass(frozen=True, slots=True)
class Standby:
    """The machine moved away, my blocks may be overwritten; I wait for a machine to arrive in them."""

    id: int = _id()


@dataclass(frozen=True, slots=True)
class Bye:
    """I leave on purpose. No answer."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """Answer to `Stop`: nothing of mine writes to the machine's memory any more."""

    id: int = _id()


@dataclass(frozen=True, slots=True)
class Running:
    """Answer to `Cont`."""

    id: int = _id()


@dataclass(frozen=True, slots=True)
class Saved:
    """Answer to `Save`. Descriptor: a sealable memfd whose whole content is the state.

    ``description`` says what the bytes are: JSON of the shape that a device has in the VMDESCRIPTION.
    """

    id: int = _id()
    description: str = _field(Text(0, MAX_DESCRIPTION_BYTES), "")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Answer to `Load`: the device took the state."""

    id: int = _id()


@dataclass(frozen=True, slots=True)
class Failed:
    """Answer to any request of the daemon that could not be met."""

    id: int = _id()
    error: str = _error()


# -- daemon to workload -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to `Hello`. ``peer`` says where the machine is when it moved."""

    version: int = _field(Integer(1, MAX_UINT32))
    machine: str = _name()
    state: str = _field(Choice(*MACHINE_STATES))
    peer: str = _field(Text(0, MAX_ERROR_BYTES), "")


@dataclass(frozen=True, slots=True)
class Refused:
    """You may not attach, or you broke the protocol; the connection ends here. ``again``: a later try may succeed."""

    error: str = _error()
    again: bool = _field(Flag(), True)


@dataclass(frozen=True, slots=True)
class BlockAnswer:
    """Answer to `BlockRequest`. Descriptor: the memfd of ``size`` bytes to map, if it exists."""

    id: int = _id()
    exists: bool = _field(Flag())
    size: int = _field(Integer(0, MAX_BLOCK_BYTES), 0)


@dataclass(frozen=True, slots=True)
class Ok:
    """Your request is met."""

    id: int = _id()


@dataclass(frozen=True, slots=True)
class Error:
    """Your request is refused, the connection goes on. ``again``: the reason may pass, try the same again later."""

    id: int = _id()
    error: str = _error()
    again: bool = _field(Flag(), False)


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop writing and say `Stopped` within ``deadline_ms``; stay stopped until `Cont`."""

    id: int = _id()
    deadline_ms: int = _field(Integer(0, MAX_UINT32))


@dataclass(frozen=True, slots=True)
class Cont:
    """Go on, then say `Running`."""

    id: int = _id()


@dataclass(frozen=True, slots=True)
class Save:
    """Give me the state of a device."""

    id: int = _id()
    device: str = _name()
    instance_id: int = _field(Integer(0, MAX_UINT32))


@dataclass(frozen=True, slots=True)
class Load:
    """Take this state of a device. Descriptor: a memfd of ``size`` bytes, sealed against every change."""

    id: int = _id()
    device: str = _name()
    instance_id: int = _field(Integer(0, MAX_UINT32))
    version_id: int = _field(Integer(0, MAX_UINT32))
    size: int = _size(0, MAX_STATE_BYTES)


@dataclass(frozen=True, slots=True)
class Throttle:
    """Work only (100 - percent) % of the time; 0 ends it. No answer."""

    percent: int = _field(Integer(0, 99))


@dataclass(frozen=True, slots=True)
class Moved:
    """The machine runs at ``peer`` now. No answer."""

    peer: str = _field(Text(0, MAX_ERROR_BYTES))


FromWorkload = (
    Hello | BlockRequest | MapRequest | DeviceRequest | Ready | Standby | Bye
    | Stopped | Running | Saved | Loaded | Failed
)  # fmt: skip
FromDaemon = (
    Welcome | Refused | BlockAnswer | Ok | Error | Stop | Cont | Save | Load | Throttle | Moved
)  # fmt: skip

FROM_WORKLOAD: Mapping[str, type[FromWorkload]] = {
    "hello": Hello,
    "block": BlockRequest,
    "map": MapRequest,
    "device": DeviceRequest,
    "ready": Ready,
    "standby": Standby,
    "bye": Bye,
    "stopped": Stopped,
    "running": Running,
    "saved": Saved,
    "loaded": Loaded,
    "error": Failed,
}
FROM_DAEMON: Mapping[str, type[FromDaemon]] = {
    "welcome": Welcome,
    "refused": Refused,
    "block": BlockAnswer,
    "ok": Ok,
    "error": Error,
    "stop": Stop,
    "cont": Cont,
    "save": Save,
    "load": Load,
    "throttle": Throttle,
    "moved": Moved,
}
_TYPES = {cls: name for table in (FROM_WORKLOAD, FROM_DAEMON) for name, cls in table.items()}

_M = TypeVar("_M", FromWorkload, FromDaemon)


def encode_message(message: FromWorkload | FromDaemon) -> bytes:
    """Return the packet of a message. LocalProtocolError when a field breaks the protocol: our bug."""
    content: dict[str, object] = {"type": _TYPES[type(message)]}
    for item in fields(message):
        value = getattr(message, item.name)
        if not item.metadata["check"](value):
            raise LocalProtocolError(
                f"attach message '{content['type']}', field '{item.name}': expected"
                f" {item.metadata['check'].expected}, found {shown(value)}"
            )
        content[item.name] = value
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def parse_from_workload(packet: bytes) -> FromWorkload:
    """Return the message in a packet that a workload sent. Raises RemoteProtocolError."""
    return _parse(packet, FROM_WORKLOAD)


def parse_from_daemon(packet: bytes) -> FromDaemon:
    """Return the message in a packet that a daemon sent. Raises RemoteProtocolError."""
    return _parse(packet, FROM_DAEMON)


def cut_text(text: str, limit_bytes: int = MAX_ERROR_BYTES) -> str:
    """Return ``text`` as a sender may put it into an error: valid UTF-8 of at most ``limit_bytes``."""
    return text.encode(errors="replace")[:limit_bytes].decode(errors="ignore")


def cut_name(text: str) -> str:
    """Return ``text`` as one printable line that fits a name."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return cut_text(printable, MAX_NAME_BYTES) or "?"


def _parse(packet: bytes, table: Mapping[str, type[_M]]) -> _M:
    if len(packet) > MAX_MESSAGE_BYTES:
        raise _refusal("attach message", f"at most {MAX_MESSAGE_BYTES} bytes", f"{len(packet)} bytes")
    try:
        # The C parser raises RecursionError on a depth bomb and ValueError on numbers of thousands of digits.
        content = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise _refusal("attach message", "one JSON object in UTF-8", shown(packet)) from error
    if not isinstance(content, dict):
        raise _refusal("attach message", "one JSON object in UTF-8", shown(content))
    kind = content.get("type")
    cls = table.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise _refusal("attach message, field 'type'", "one of " + ", ".join(table), _found(content, "type"))
    return cls(**_checked_fields(content, str(kind), cls))


def _checked_fields(content: dict[str, Any], kind: str, cls: type[Any]) -> dict[str, Any]:
    values = {}
    for item in fields(cls):
        if item.name not in content and item.default is not MISSING:
            continue
        check: Check = item.metadata["check"]
        value = content.get(item.name)
        if not check(value):
            raise _refusal(f"attach message '{kind}', field '{item.name}'", check.expected, _found(content, item.name))
        values[item.name] = tuple(value) if isinstance(value, list) else value
    return values


def _refusal(what: str, expected: str, found: str) -> RemoteProtocolError:
    return RemoteProtocolError(what, section="attach", expected=expected, found=found)


def _found(content: Mapping[str, Any], name: str) -> str:
    return shown(content[name]) if name in content else "no such field"

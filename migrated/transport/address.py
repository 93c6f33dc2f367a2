"""Migration URIs, as QEMU writes them.

The rule of the file: pure parsing, no look-ups and no I/O. Error texts are QEMU's.

    tcp:HOST:PORT[,ipv4[=on|off]][,ipv6[=on|off]][,to=PORT]      HOST empty or in [brackets] for IPv6
    unix:PATH    fd:NAME    exec:COMMAND    file:PATH[,offset=SIZE]
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from migrated.errors import CommandError

_SIZE = re.compile(r"(?P<number>0[xX][0-9a-fA-F]+|[0-9]+)(?P<suffix>[bkmgtpeBKMGTPE]?)")
_SHIFTS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SWITCH = {"": True, "=on": True, "=off": False}
_OFFSET = ",offset="


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """``ipv4`` and ``ipv6`` allow or forbid a family (None: not said); ``to`` is the last port a listener may take."""

    host: str
    port: int
    ipv4: bool | None = None
    ipv6: bool | None = None
    to: int | None = None

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)

    @property
    def is_loopback(self) -> bool:
        """True when nobody outside this host can be meant. A name other than ``localhost`` never counts."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A descriptor by the name it was given with ``getfd``, or by its number."""

    name: str

    def __str__(self) -> str:
        return f"fd:{self.name}"


@dataclass(frozen=True, slots=True)
class ExecAddress:
    """A shell command whose standard input (outgoing) or output (incoming) is the stream."""

    command: str

    def __str__(self) -> str:
        return f"exec:{self.command}"


@dataclass(frozen=True, slots=True)
class FileAddress:
    path: str
    offset: int = 0

    def __str__(self) -> str:
        return f"file:{self.path}"


Address = TcpAddress | UnixAddress | FdAddress | ExecAddress | FileAddress


def parse_address(uri: str) -> Address:
    """Return the address in ``uri``. Raises CommandError with QEMU's text."""
    scheme, colon, rest = uri.partition(":")
    if not colon or "\0" in uri:
        raise CommandError(f"unknown migration protocol: {uri}")
    match scheme:
        case "tcp":
            return _parse_tcp(rest)
        case "unix" if rest:
            return UnixAddress(rest)
        case "fd" if rest:
            return FdAddress(rest)
        case "exec" if rest.strip():
            return ExecAddress(rest)
        case "file":
            return _parse_file(rest)
        case "unix" | "fd" | "exec":
            raise CommandError(f"error parsing address '{uri}'")
        case _:
            raise CommandError(f"unknown migration protocol: {uri}")


def join_host_port(host: str, port: int | str) -> str:
    """Return ``host:port``, with brackets where the host is an IPv6 literal."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_tcp(text: str) -> TcpAddress:
    error = CommandError(f"error parsing address '{text}'")
    match = re.fullmatch(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:,\[\]]*)):(?P<port>[0-9]+)(?P<options>(?:,[^,]*)*)", text)
    if match is None:
        raise error
    host = match["six"] or match["host"] or ""
    port = _port(match["port"], error)
    switches: dict[str, bool] = {}
    to: int | None = None
    for option in match["options"].split(",")[1:]:
        if (name := option[:4]) in ("ipv4", "ipv6") and option[4:] in _SWITCH:
            switches[name] = _SWITCH[option[4:]]
        elif option.startswith("to="):
            to = _port(option[3:], error)
        else:
            raise error
    if to is not None and to < port:
        raise error
    if switches.get("ipv4") is False and switches.get("ipv6") is False:
        raise CommandError("ipv4 and ipv6 cannot both be off")
    return TcpAddress(host, port, switches.get("ipv4"), switches.get("ipv6"), to)


def _port(text: str, error: CommandError) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise error
    return int(text)


def _parse_file(text: str) -> FileAddress:
    path, comma, size = text.rpartition(_OFFSET)
    if not comma:
        path, size = text, "0"
    if not path:
        raise CommandError(f"error parsing address 'file:{text}'")
    match = _SIZE.fullmatch(size)
    # More digits than 2^64 has cannot fit either; checked first because int() of a long text is slow.
    if match is None or len(size) > 20:
        raise CommandError(f"file URI has bad offset {size}")
    offset = int(match["number"], 0 if match["number"].lower().startswith("0x") else 10)
    offset <<= _SHIFTS[match["suffix"].lower()]
    if offset >= 2**63:
        raise CommandError(f"file URI has bad offset {size}")
    return FileAddress(path, offset)
